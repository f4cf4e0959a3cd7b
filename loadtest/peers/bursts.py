"""Bursts of arrivals at once, through the project's one load generator."""

import asyncio
from collections.abc import Sequence

import httpx

from loadtest.peers.process import PeerFailed
from loadtest.report import LoadReport, summarize
from loadtest.request import Clock, RequestRecord, stream_request

REQUEST_S = 900.0


def run_bursts(
    url: str, model: str, bursts: Sequence[list[list[int]]], output: int
) -> list[LoadReport]:
    """One report for each burst, in order; each begins when the one before has ended.

    Raises:
        PeerFailed: some request failed, or was not answered with `output` tokens that came as
            a stream: a server that leaves work out is not to look fast.
    """
    return asyncio.run(_run(url, model, bursts, output))


async def _run(
    url: str, model: str, bursts: Sequence[list[list[int]]], output: int
) -> list[LoadReport]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    reports = []
    async with httpx.AsyncClient(timeout=REQUEST_S, limits=limits, trust_env=False) as client:
        for prompts in bursts:
            report = await _burst(client, f"{url}/v1/completions", model, prompts, output)
            _check(report, prompts, output)
            reports.append(report)
    return reports


async def _burst(
    client: httpx.AsyncClient, url: str, model: str, prompts: list[list[int]], output: int
) -> LoadReport:
    records = [RequestRecord(number, "completion", 0.0) for number in range(len(prompts))]
    clock = Clock()
    async with asyncio.timeout(REQUEST_S):
        await asyncio.gather(
            *(
                stream_request(client, url, _body(model, prompt, output), record, clock)
                for prompt, record in zip(prompts, records, strict=True)
            )
        )
    return summarize({"url": url, "model": model, "burst": len(prompts)}, records, 0.0)


def _body(model: str, prompt: list[int], output: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _check(report: LoadReport, prompts: list[list[int]], output: int) -> None:
    if report.errors:
        kind, error = next(iter(report.errors.items()))
        raise PeerFailed(f"{error.count} of {report.requests} requests: {kind}: {error.example}")
    for record, prompt in zip(report.records, prompts, strict=True):
        if record.output_tokens != output:
            raise PeerFailed(f"{record.output_tokens} tokens came instead of {output}")
        if not record.gaps_s:
            raise PeerFailed("an answer came in one piece")
        if abs(record.prompt_tokens - len(prompt)) > 1:  # one more: a server may begin the text
            raise PeerFailed(f"{record.prompt_tokens} prompt tokens instead of {len(prompt)}")

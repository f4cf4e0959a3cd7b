"""Undisturbed answers to every case, recorded before anything is hurt."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from loadtest.chaos.waiting import ChaosError
from loadtest.chaos.workload import undisturbed
from loadtest.oracle import compare
from loadtest.request import Clock, RequestRecord, stream_request
from loadtest.runner import Call
from loadtest.transcript import Transcript

AT_ONCE = 6
_REQUEST_S = 300.0
_MOST_UNSTEADY = 0.1  # share of cases


@dataclass(frozen=True, slots=True)
class Golden:
    """What each case is to be answered with.

    Attributes:
        calls: the cases that can be judged.
        answers: theirs, in the same order.
        unsteady: cases left out, since alone and among others they were answered differently:
            fp32 sums in another order, with two tokens as good as equally likely.
        tokens_per_second: of the run with several at once.
        alone: answers to all cases asked one by one, unsteady ones too.
    """

    calls: list[Call]
    answers: list[Transcript]
    unsteady: int
    tokens_per_second: float
    alone: list[Transcript] = field(default_factory=list, repr=False)

    @property
    def mean_tokens(self) -> float:
        """Of an answer."""
        return sum(answer.received for answer in self.answers) / len(self.answers)


async def record(
    url: str, calls: Sequence[Call], alone: Sequence[Transcript] | None = None
) -> Golden:
    """Asks for everything twice: one by one, and several at once.

    Args:
        alone: what another server, of whatever layout, answered one by one; None: ask.

    Raises:
        ChaosError: a request failed with nothing disturbing it, or too many are unsteady.
    """
    if alone is None:
        alone, _ = await _ask(url, calls, 1)
    among, seconds = await _ask(url, calls, AT_ONCE)
    steady = [
        (call, answer)
        for call, answer, again in zip(calls, alone, among, strict=True)
        if compare(answer, again).right
    ]
    unsteady = len(calls) - len(steady)
    if unsteady > _MOST_UNSTEADY * len(calls):
        raise ChaosError(f"{unsteady} of {len(calls)} answers differ without any fault")
    tokens = sum(answer.received for answer in among)
    return Golden(
        [call for call, _ in steady],
        [answer for _, answer in steady],
        unsteady,
        tokens / seconds,
        list(alone),
    )


async def _ask(url: str, calls: Sequence[Call], at_once: int) -> tuple[list[Transcript], float]:
    """Answers in order, and how long they took together."""
    room = asyncio.Semaphore(at_once)
    clock = Clock()
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=_REQUEST_S, trust_env=False) as client:

        async def ask(number: int, call: Call) -> tuple[RequestRecord, Transcript]:
            entry = RequestRecord(number, call.kind, 0.0)
            body, path = undisturbed(call).body, f"{url}/v1/{call.path}"
            async with room:
                return entry, await stream_request(client, path, body, entry, clock)

        told = await asyncio.gather(*(ask(n, call) for n, call in enumerate(calls)))
    for entry, said in told:
        if not entry.succeeded:
            raise ChaosError(f"undisturbed, {entry.kind}: {entry.error}: {entry.message}")
        if said.received != said.output_tokens:
            counts = f"usage says {said.output_tokens} tokens, {said.received} came"
            raise ChaosError(f"undisturbed, {entry.kind}: {counts}")
    answers = [said for _, said in told]
    return answers, time.monotonic() - started

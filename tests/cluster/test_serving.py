"""What a client gets from a real cluster: HAProxy, ingress, router, engine, 2 × 2 ranks."""

import asyncio
import json
import math
import os
import random
import re
import socket
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from tests.cluster.server import CLIENT_TIMEOUT_S, Server
from tests.cluster.waiting import until
from tests.model.oracle import NANO, oracle

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

PROMPT = "def main():\n"
QUESTION = "Write a Python function `read_file`. Read a file."


def expected_text(prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    with torch.inference_mode():
        out = oracle("nano").reference.generate(
            torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_the_ready_line_says_what_is_served(server: Server) -> None:
    assert re.fullmatch(
        rf"ready {server.url} model=nano dtype=float32 stages=2 expert_parallel=2 engines=1 "
        r"cache_tokens=16384",
        server.ready_line,
    )


def test_greedy_text_is_that_of_transformers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="nano", prompt=PROMPT, max_tokens=64, temperature=0)
    assert answer.choices[0].text == expected_text(PROMPT, 64)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_carries_the_same_text_as_the_whole_answer(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(
        model="nano", messages=messages, max_tokens=60, temperature=0
    )  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(
            model="nano",
            messages=messages,
            max_tokens=60,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )  # type: ignore[call-overload]
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert "def read_file" in text
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == whole.choices[0].finish_reason
    assert set(finishes[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return (
            client.completions.create(
                model="nano", prompt="def ", max_tokens=24, temperature=1.0, seed=seed
            )
            .choices[0]
            .text
        )

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    free = (
        client.completions.create(model="nano", prompt=PROMPT, max_tokens=40, temperature=0)
        .choices[0]
        .text
    )
    stop = free[12:18]
    held = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop]
    ).choices[0]
    assert held.text == free[: free.index(stop)]
    assert held.finish_reason == "stop"


def test_logprobs_are_those_of_transformers(client: openai.OpenAI) -> None:
    ids = [4091, 300, 301, 302, 303]
    answer = client.completions.create(
        model="nano", prompt=ids, max_tokens=6, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    row = oracle("nano").logits(ids)[-1].log_softmax(-1)
    assert logprobs.token_logprobs[0] == pytest.approx(float(row.max()), abs=1e-4)
    assert sorted(logprobs.top_logprobs[0].values())[-3:] == pytest.approx(
        sorted(row.topk(3).values.tolist()), abs=1e-4
    )
    assert len(logprobs.tokens) == answer.usage.completion_tokens == 6  # type: ignore[union-attr]


def test_several_prompts_and_choices_come_back_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="nano", prompt=["def a", "def b"], n=2, max_tokens=3, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_the_end_token_ends_unless_it_is_ignored(client: openai.OpenAI) -> None:
    free = client.completions.create(
        model="nano", prompt="x", max_tokens=150, temperature=0, extra_body={"ignore_eos": True}
    )
    assert free.choices[0].finish_reason == "length"
    assert free.usage is not None
    assert free.usage.completion_tokens == 150


def test_a_second_turn_finds_its_prefix_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "# cached prefix\n" * 40
    first = client.completions.create(model="nano", prompt=prompt, max_tokens=4, temperature=0)
    again = client.completions.create(model="nano", prompt=prompt, max_tokens=4, temperature=0)
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 64
    assert again.choices[0].text == first.choices[0].text


BAD = {
    "no such model": ({"model": "other", "prompt": "x"}, 404),
    "unknown field": ({"model": "nano", "prompt": "x", "speed": 3}, 400),
    "not honoured": ({"model": "nano", "prompt": "x", "n": 3, "best_of": 2}, 400),
    "wrong type": ({"model": "nano", "prompt": "x", "max_tokens": "7"}, 400),
    "bool for int": ({"model": "nano", "prompt": "x", "n": True}, 400),
    "huge n": ({"model": "nano", "prompt": "x", "n": 10**9}, 400),
    "too long": ({"model": "nano", "prompt": "x", "max_tokens": 10**6}, 400),
    "token outside": ({"model": "nano", "prompt": [4096]}, 400),
    "empty": ({"model": "nano", "prompt": []}, 400),
}


def test_bad_requests_are_clear_errors_and_harm_nobody(
    server: Server, client: openai.OpenAI
) -> None:
    for what, (body, status) in BAD.items():
        response = post(server, json=body)
        assert response.status_code == status, what
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}, what
    good = client.completions.create(model="nano", prompt="def ", max_tokens=2, temperature=0)
    assert good.choices[0].text


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    response = post(server, content=b"{not json")
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def post(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", timeout=CLIENT_TIMEOUT_S, **body)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]


def test_live_and_ready(server: Server) -> None:
    assert server.get("/livez").status_code == 200
    assert server.get("/readyz").status_code == 200


async def test_metrics_cover_every_process_of_the_fleet(server: Server) -> None:
    def instances(name: str) -> set[str]:
        return {labels["instance"] for labels, _ in server.samples(f"expertline_{name}")}

    def cells() -> set[tuple[str, str]]:
        samples = server.samples("expertline_stage_compute_seconds_total")
        return {(labels["stage"], labels["rank"]) for labels, _ in samples}

    # Who answers a scrape late is missing from it. Ingress, router, engine, four ranks.
    await until(lambda: len(instances("process_open_fds")) == 7)
    await until(lambda: cells() == {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")})
    names = ("request_ttft_seconds_count", "leases_total", "step_seconds_count")
    await until(lambda: all(instances(name) for name in (*names, "exchange_bytes_total")))


async def stream(server: Server, index: int, leave_after: float) -> int:
    """One streamed request, left after so many events; how many came."""
    body = {
        "model": "nano",
        "prompt": f"# {index}\ndef ",
        "max_tokens": 64,
        "temperature": 0.8,
        "seed": index,
        "stream": True,
        "ignore_eos": True,
    }
    events = 0
    async with (
        httpx.AsyncClient(timeout=CLIENT_TIMEOUT_S) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
            if line.startswith("data: "):
                assert "error" not in json.loads(line.removeprefix("data: "))
                events += 1
                if events > leave_after:
                    break
    return events


async def test_16_streams_with_random_cancellations_leak_nothing(server: Server) -> None:
    numbers = random.Random(1)
    warm = [stream(server, i, float("inf")) for i in range(16)]
    await asyncio.gather(*warm)

    def total(name: str, processes: int, **labels: str) -> float:
        """Infinite while one of them is late to answer."""
        values = [value for _, value in server.samples(f"expertline_{name}", **labels)]
        return sum(values) if len(values) == processes else math.inf

    def quiet() -> bool:
        return total("requests_running", 1) == 0 and total("streams_open", 1) == 0

    await until(quiet)
    before: list[float] = []

    def remembered() -> bool:
        before[:] = total("process_open_fds", 7), total("asyncio_tasks", 3)
        return math.inf not in before

    await until(remembered)
    files, tasks = before
    for round_ in range(3):
        leave = [numbers.choice([0, 2, 10, float("inf")]) for _ in range(16)]
        await asyncio.gather(*(stream(server, 100 * round_ + i, n) for i, n in enumerate(leave)))
    await until(quiet)
    await until(lambda: total("pages", 2, state="held") == 0)
    await until(lambda: total("requests_waiting", 1) == 0)
    await until(lambda: total("reserved_tokens", 1) == 0)
    await until(lambda: server.metric("expertline_disconnects_total") > 0)
    await until(lambda: total("process_open_fds", 7) <= files + 8)
    await until(lambda: total("asyncio_tasks", 3) <= tasks + 4)


def test_internal_ports_are_on_loopback_and_survive_garbage(
    server: Server, client: openai.OpenAI
) -> None:
    def ports() -> list[int]:
        return [port for pid in server.pids() for port in own_ports(pid)]

    heard = 0
    for port in ports():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as probe:
                probe.sendall(b"GET / HTTP/1.1\r\n\r\n\0\xff" + os.urandom(200))
        except ConnectionRefusedError:
            assert port not in ports()  # closed since they were listed
        else:
            heard += 1
    assert heard > 7  # metrics of six processes, router, engine's two, gloo's
    good = client.completions.create(model="nano", prompt="def ", max_tokens=4, temperature=0)
    assert good.choices[0].text


def own_ports(pid: int) -> list[int]:
    """Ports that a router, engine or rank process listens on, all of them on loopback.

    But for those on all interfaces that are Ray's, which its token protects: a worker's, and a
    replica's second one for calls from handles.
    """
    try:
        process = psutil.Process(pid)
        title = " ".join(process.cmdline())
        if not re.search(r"ServeReplica:expertline:(Router|Engine)|ray::Rank", title):
            return []
        connections = process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return []
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    own = [address.port for address in listening if address.ip == "127.0.0.1"]
    rays = 2 if "ServeReplica" in title else 1
    assert len(listening) - len(own) <= rays, (title, listening)
    return own

"""What a client gets from a real cluster: HAProxy, ingress, router, engine, 2 × 2 ranks."""

import asyncio
import json
import os
import random
import re
import socket

import httpx
import openai
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from tests.cluster.server import Server
from tests.model.oracle import NANO, oracle
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PROMPTS = ["def main():\n", "import os\n\n\nclass Reader:\n", "for i in range(10):"]
QUESTION = "Write a Python function `read_file`. Read a file."


def metric(server: Server, name: str, **labels: str) -> float:
    """Sum of a family's samples that have these labels, over all processes."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(client: openai.OpenAI, prompt: str) -> None:
    answer = client.completions.create(model="nano", prompt=prompt, max_tokens=64, temperature=0)
    assert answer.choices[0].text == expected_text(prompt, 64)
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
        client.completions.create(model="nano", prompt=PROMPTS[0], max_tokens=40, temperature=0)
        .choices[0]
        .text
    )
    stop = free[12:18]
    held = client.completions.create(
        model="nano", prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop]
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


@pytest.mark.parametrize(("body", "status"), BAD.values(), ids=BAD)
def test_a_bad_request_is_a_clear_error_and_harms_nobody(
    server: Server, client: openai.OpenAI, body: dict[str, object], status: int
) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    good = client.completions.create(model="nano", prompt="def ", max_tokens=2, temperature=0)
    assert good.choices[0].text


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=b"{not json")
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]


def test_live_and_ready(server: Server) -> None:
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_metrics_cover_every_process_of_the_fleet(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    cells = {
        (sample.labels["stage"], sample.labels["rank"])
        for sample in families["expertline_stage_compute_seconds"].samples
    }
    assert cells == {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")}
    for name in ("request_ttft_seconds", "leases", "step_seconds", "exchange_bytes"):
        assert f"expertline_{name}" in families
    instances = {s.labels["instance"] for s in families["expertline_process_open_fds"].samples}
    assert len(instances) == 7  # ingress, router, engine, four ranks


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
        httpx.AsyncClient(timeout=60) as client,
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

    def quiet() -> bool:
        running = metric(server, "expertline_requests_running")
        return running == 0 and metric(server, "expertline_streams_open") == 0

    await until(quiet, 20)
    files = metric(server, "expertline_process_open_fds")
    tasks = metric(server, "expertline_asyncio_tasks")
    for round_ in range(3):
        leave = [numbers.choice([0, 2, 10, float("inf")]) for _ in range(16)]
        await asyncio.gather(*(stream(server, 100 * round_ + i, n) for i, n in enumerate(leave)))
    await until(quiet, 20)
    await until(lambda: metric(server, "expertline_pages", state="held") == 0, 20)
    assert metric(server, "expertline_requests_waiting") == 0
    assert metric(server, "expertline_reserved_tokens") == 0
    assert metric(server, "expertline_disconnects_total") > 0
    await until(lambda: metric(server, "expertline_process_open_fds") <= files + 8, 30)
    await until(lambda: metric(server, "expertline_asyncio_tasks") <= tasks + 4, 30)


def test_internal_ports_are_on_loopback_and_survive_garbage(
    server: Server, client: openai.OpenAI
) -> None:
    ports = [port for pid in server.pids() for port in own_ports(pid)]
    assert len(ports) > 7  # metrics of six processes, router, engine's two, gloo's
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
            probe.sendall(b"GET / HTTP/1.1\r\n\r\n\0\xff" + os.urandom(200))
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

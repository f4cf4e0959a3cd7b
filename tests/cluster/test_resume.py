"""Two engines: one is killed under streams, then the router under requests; nobody notices."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.cluster.server import Server, running_server
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TOKENS = 120
KILL_AFTER = 20
PROMPTS = ["def add(a, b):\n", "import os\n", "class Node:\n", "for i in range(10):\n"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """nano in fp32, twice, one rank each."""
    with running_server(
        "--replicas", "2", "--dtype", "float32", "--cache-tokens", "4096"
    ) as running:
        yield running


@dataclass
class Stream:
    """What a client got, and when."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)

    @property
    def longest_gap(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def replicas(server: Server, deployment: str) -> list[int]:
    """Processes of a deployment."""
    title = f"ServeReplica:expertline:{deployment}".encode()
    found = []
    for pid in server.pids():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if title in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def body(index: int, **more: Any) -> dict[str, Any]:
    """Every second one is sampled, with its own seed."""
    sampling = {"temperature": 0} if index % 2 else {"temperature": 0.8, "seed": index}
    ask = {"model": "nano", "prompt": PROMPTS[index % len(PROMPTS)], "max_tokens": TOKENS}
    return ask | sampling | {"ignore_eos": True} | more


async def chunks(client: httpx.AsyncClient, ask: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json=ask) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


async def listen(client: httpx.AsyncClient, index: int, into: Stream) -> None:
    ask = body(index, stream=True, stream_options={"include_usage": True})
    async for chunk in chunks(client, ask):
        assert "error" not in chunk, chunk
        into.usage = chunk.get("usage") or into.usage
        for choice in chunk["choices"]:
            into.text += choice["text"]
            into.times.append(time.monotonic())
            if choice["finish_reason"]:
                into.finishes.append(choice["finish_reason"])


async def streams(client: httpx.AsyncClient, count: int) -> list[Stream]:
    """So many at once; `into` fills while they run."""
    got = [Stream() for _ in range(count)]
    await asyncio.gather(*(listen(client, index, got[index]) for index in range(count)))
    return got


async def ready_engines(client: httpx.AsyncClient) -> int:
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("expertline_fleet_engines{")]
    return sum(int(float(line.split()[-1])) for line in lines if 'state="ready"' in line)


async def test_an_engine_that_is_killed_costs_its_streams_a_pause_and_nothing_else(
    pair: Server,
) -> None:
    async with httpx.AsyncClient(base_url=pair.url, timeout=120) as client:
        undisturbed = await streams(client, 4)
        disturbed = [Stream() for _ in undisturbed]
        running = [
            asyncio.create_task(listen(client, index, into)) for index, into in enumerate(disturbed)
        ]
        await until(lambda: all(len(one.times) >= KILL_AFTER for one in disturbed), 60)
        victim = replicas(pair, "Engine")[0]
        os.kill(victim, signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*running), 120)
        for before, after in zip(undisturbed, disturbed, strict=True):
            assert after.text == before.text
            assert after.finishes == ["length"]
            assert after.usage == before.usage
            assert after.usage["completion_tokens"] == TOKENS
        metrics = (await client.get("/metrics")).text
        assert (
            sum(
                float(line.split()[-1])
                for line in metrics.splitlines()
                if line.startswith("expertline_resumed_total{")
            )
            >= 1
        )
        deadline = time.monotonic() + 60
        while await ready_engines(client) < 2:
            assert time.monotonic() < deadline, "the engine was not replaced"
            await asyncio.sleep(0.2)


async def test_a_router_that_is_killed_fails_no_request(pair: Server) -> None:
    async with httpx.AsyncClient(base_url=pair.url, timeout=60) as client:
        ask = body(1, max_tokens=4)
        text = (await client.post("/v1/completions", json=ask)).json()["choices"][0]["text"]
        (router,) = replicas(pair, "Router")
        os.kill(router, signal.SIGKILL)
        asked = 0
        while router in replicas(pair, "Router") or not replicas(pair, "Router") or asked < 40:
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=ask) for _ in range(4))
            )
            assert [a.json()["choices"][0]["text"] for a in answers] == [text] * 4
            asked += len(answers)

"""An engine is killed under streams, then the router under requests; nobody notices."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.cluster.server import CLIENT_TIMEOUT_S, Server
from tests.cluster.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

TOKENS = 400  # so many that streams still run when something is killed
KILL_AFTER = 20
PROMPTS = ["def add(a, b):\n", "import os\n", "class Node:\n", "for i in range(10):\n"]


@dataclass
class Stream:
    """What a client got."""

    text: str = ""
    chunks: int = 0
    finishes: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)


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
            into.chunks += 1
            if choice["finish_reason"]:
                into.finishes.append(choice["finish_reason"])


async def test_an_engine_that_is_killed_costs_its_streams_a_pause_and_nothing_else(
    server: Server,
) -> None:
    victim = server.find("ServeReplica:expertline:Engine")[0]
    resumed = server.metric("expertline_resumed_total")
    async with httpx.AsyncClient(base_url=server.url, timeout=CLIENT_TIMEOUT_S) as client:
        undisturbed = [Stream() for _ in PROMPTS]
        await asyncio.gather(*(listen(client, *each) for each in enumerate(undisturbed)))
        disturbed = [Stream() for _ in PROMPTS]
        running = [asyncio.create_task(listen(client, *each)) for each in enumerate(disturbed)]
        await until(lambda: all(one.chunks >= KILL_AFTER for one in disturbed))
        os.kill(victim, signal.SIGKILL)
        await asyncio.gather(*running)
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.text == before.text
        assert after.finishes == ["length"]
        assert after.usage == before.usage
        assert after.usage["completion_tokens"] == TOKENS
    await until(lambda: server.metric("expertline_resumed_total") >= resumed + 1)
    await until(lambda: server.metric("expertline_fleet_engines", state="ready") == 2, 240)


async def test_a_router_that_is_killed_fails_no_request(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=CLIENT_TIMEOUT_S) as client:
        ask = body(1, max_tokens=4)
        text = (await client.post("/v1/completions", json=ask)).json()["choices"][0]["text"]
        (router,) = server.find("ServeReplica:expertline:Router")
        os.kill(router, signal.SIGKILL)
        asked = 0
        while asked < 40 or not set(server.find("ServeReplica:expertline:Router")) - {router}:
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=ask) for _ in range(4))
            )
            assert [a.json()["choices"][0]["text"] for a in answers] == [text] * 4
            asked += len(answers)

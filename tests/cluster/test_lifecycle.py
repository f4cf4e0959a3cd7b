"""How a server starts, what happens when its parts die, and how it ends under a stream."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cluster.server import CLIENT_TIMEOUT_S, STOP_TIMEOUT_S, Server, running_server
from tests.cluster.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ASK = {"model": "nano", "prompt": "def ", "temperature": 0, "ignore_eos": True}
SHORT, LONG, ENDLESS = 4, 400, 4000  # tokens
NEVER_S = 3600.0  # to finish what runs: nothing is ended for want of time
REPAIRS = "expertline_gang_repair_seconds_count"


@dataclass
class Stream:
    """What a client has got so far."""

    text: str = ""
    chunks: int = 0
    done: bool = False


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    settings = {
        "model": {"dtype": "float32"},
        "gang": {"cache_tokens": 4096},
        "engine": {"drain_timeout_s": NEVER_S},
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@asynccontextmanager
async def streaming(
    server: Server, tokens: int
) -> AsyncIterator[tuple[Stream, asyncio.Task[None]]]:
    """A stream that runs; it is over with the body, if not before."""
    stream = Stream()

    async def read() -> None:
        body = ASK | {"max_tokens": tokens, "stream": True}
        url = f"{server.url}/v1/completions"
        async with (
            httpx.AsyncClient(timeout=CLIENT_TIMEOUT_S) as client,
            client.stream("POST", url, json=body) as response,
        ):
            assert response.status_code == 200
            async for line in response.aiter_lines():
                stream.done = stream.done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    stream.text += "".join(choice["text"] for choice in event.get("choices", ()))
                    stream.chunks += 1

    reading = asyncio.create_task(read())
    try:
        await until(lambda: stream.chunks >= 8 or reading.done())
        yield stream, reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def ended(server: Server) -> None:
    """The server has ended by itself, as it should, with everything that was of it."""
    await until(lambda: server.process.poll() is not None, STOP_TIMEOUT_S)
    await until(lambda: not server.pids(), STOP_TIMEOUT_S)
    assert server.process.returncode == 0


async def test_a_server_outlives_its_router_and_a_rank_and_ends_after_its_streams(
    config: str,
) -> None:
    with running_server("--config", config, "--stages", "2") as server:
        answer = text_of(server, SHORT)
        (router,) = server.find("ServeReplica:expertline:Router")
        os.kill(router, signal.SIGKILL)
        for _ in range(20):  # none fails, whether the router is away or back
            assert text_of(server, SHORT) == answer
        await until(lambda: bool(set(server.find("Router")) - {router}))
        repairs = server.metric(REPAIRS)
        (victim, *_) = server.find("ray::Rank")
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in server.find("ray::Rank"))
        await until(lambda: server.metric(REPAIRS) >= repairs + 1, 240)
        await until(lambda: server.ready)
        assert text_of(server, SHORT) == answer
        whole = text_of(server, LONG)
        assert len(server.pids()) > 5
        async with streaming(server, LONG) as (stream, reading):
            server.process.send_signal(signal.SIGINT)
            await reading
        assert stream.done
        assert stream.text == whole
        await ended(server)


async def test_a_second_ctrl_c_ends_a_server_at_once_and_nothing_is_left(config: str) -> None:
    with running_server("--config", config) as server:
        async with streaming(server, ENDLESS) as (stream, reading):
            server.process.send_signal(signal.SIGINT)
            await until(lambda: "finishing what runs" in server.log.read_text(errors="replace"))
            heard = stream.chunks
            await until(lambda: stream.chunks > heard or reading.done())
            assert not reading.done()  # the first one lets it run
            server.process.send_signal(signal.SIGINT)
            await ended(server)
            await asyncio.wait([reading], timeout=CLIENT_TIMEOUT_S)
        assert not stream.done


def text_of(server: Server, tokens: int) -> str:
    response = server.complete(**ASK, max_tokens=tokens)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])

"""A rank that dies under Ray while a client streams: the client sees a pause and nothing else."""

import json
import os
import signal

import httpx
import psutil
import pytest

from tests.cluster.server import Server
from tests.cluster.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ASK = {
    "model": "nano",
    "prompt": "def main():\n",
    "max_tokens": 240,
    "temperature": 0,
    "ignore_eos": True,
}
REPAIRS = "expertline_gang_repair_seconds_count"
Cells = dict[tuple[str, str], str]


async def test_a_stream_outlives_a_rank_and_its_engine_stays(server: Server) -> None:
    ranks, engine = server.find("ray::Rank"), server.find("ServeReplica:expertline:Engine")
    assert (len(ranks), len(engine)) == (4, 1)
    before, repairs = await all_cells(server), server.metric(REPAIRS)
    victim = ranks[-1]
    (lost,) = [cell for cell, instance in before.items() if instance in listening(victim)]
    calm = server.complete(**ASK).json()
    text, killed = "", False
    async with (
        httpx.AsyncClient(timeout=300) as client,
        client.stream(
            "POST", f"{server.url}/v1/completions", json=ASK | {"stream": True}
        ) as response,
    ):
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            text += event["choices"][0]["text"]
            if not killed:
                os.kill(victim, signal.SIGKILL)
                killed = True
    assert text == calm["choices"][0]["text"]
    await until(lambda: server.metric(REPAIRS) >= repairs + 1)
    assert server.find("ServeReplica:expertline:Engine") == engine
    await until(lambda: server.ready)
    await until(lambda: len(server.find("ray::Rank")) == 4)
    assert set(ranks) - set(server.find("ray::Rank")) == {victim}
    # The new rank's metrics are found as well, and are those of the cell that was lost.
    after = await all_cells(server)
    assert {cell for cell in before if after[cell] != before[cell]} == {lost}


async def all_cells(server: Server) -> Cells:
    """Which instance is which stage and rank, once all four answer in time."""
    cells: Cells = {}

    def answered() -> bool:
        samples = server.samples("expertline_cache_bytes")
        cells.update({(at["stage"], at["rank"]): at["instance"] for at, _ in samples})
        return len(samples) == 4

    await until(answered)
    return cells


def listening(pid: int) -> set[str]:
    """The addresses that a process listens on."""
    connections = psutil.Process(pid).net_connections("tcp")
    heard = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    return {f"{address.ip}:{address.port}" for address in heard}

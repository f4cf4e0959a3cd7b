"""How a server starts, what it leaves behind, and what happens when its parts die."""

import os
import signal
import time

import httpx
import pytest

from tests.cluster.server import Server, running_server
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def find(server: Server, title: str) -> list[int]:
    """Processes of this server whose title contains a text."""
    found = []
    for pid in server.pids():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if title.encode() in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


async def test_a_server_outlives_its_router_and_a_rank_and_leaves_nothing_behind() -> None:
    with running_server("--stages", "2", "--cache-tokens", "2048") as server:
        ask = {"model": "nano", "prompt": "def ", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=ask).json()
        (router,) = find(server, "ServeReplica:expertline:Router")
        os.kill(router, signal.SIGKILL)
        for _ in range(20):  # none fails, whether the router is away or back
            response = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=30)
            assert response.json()["choices"][0]["text"] == answer["choices"][0]["text"]
        await until(lambda: router not in find(server, "Router") and bool(find(server, "Router")))
        (victim, *_) = find(server, "ray::Rank")
        os.kill(victim, signal.SIGKILL)
        await until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, 10)
        await until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, 90)
        again = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=30).json()
        assert again["choices"][0]["text"] == answer["choices"][0]["text"]
        pids = server.pids()
        assert len(pids) > 5
    deadline = time.monotonic() + 20
    while server.pids() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.pids() == []
    assert server.process.returncode == 0

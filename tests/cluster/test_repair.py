"""A rank that dies under Ray while a client streams: the client sees a pause and nothing else."""

import json
import os
import signal

import httpx
import pytest

from tests.cluster.server import Server
from tests.cluster.test_lifecycle import find
from tests.cluster.test_serving import metric
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ASK = {
    "model": "nano",
    "prompt": "def main():\n",
    "max_tokens": 240,
    "temperature": 0,
    "ignore_eos": True,
}


async def test_a_stream_outlives_a_rank_and_its_engine_stays(server: Server) -> None:
    ranks, engine = find(server, "ray::Rank"), find(server, "ServeReplica:expertline:Engine")
    assert (len(ranks), len(engine)) == (4, 1)
    repairs = metric(server, "expertline_gang_repair_seconds_count")
    text, victim = "", None
    async with httpx.AsyncClient(timeout=180) as client:
        calm = (await client.post(f"{server.url}/v1/completions", json=ASK)).json()
        async with client.stream(
            "POST", f"{server.url}/v1/completions", json=ASK | {"stream": True}
        ) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event
                text += event["choices"][0]["text"]
                if victim is None:
                    victim = ranks[-1]
                    os.kill(victim, signal.SIGKILL)
    assert text == calm["choices"][0]["text"]
    assert metric(server, "expertline_gang_repair_seconds_count") == repairs + 1
    assert find(server, "ServeReplica:expertline:Engine") == engine
    await until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, 30)
    after = find(server, "ray::Rank")
    assert len(after) == 4
    assert set(ranks) - set(after) == {victim}
    text = httpx.get(f"{server.url}/metrics").text
    assert text.count("expertline_cache_bytes{") == 4  # the new rank's metrics are found as well

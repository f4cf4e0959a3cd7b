"""Several nodes for real: where ranks are placed, and what the loss of a cable or the head costs.

A head without CPUs and three workers, each in a network namespace; 2 stages × 2 ranks on two of
the workers, so that the third can take over.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.local_ray import serve_environment
from loadtest.chaos.nodes import Node, NodeCluster, NodeSpec, node_cluster, why_not
from loadtest.chaos.redis_store import redis_store, why_no_redis
from tests.cluster.test_serving import expected_text
from tests.waiting import until

REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=f"several nodes: {REASON}"),
]

NO_REDIS = why_no_redis()
PORT = 8000  # of every node's own address
START_TIMEOUT_S = 240.0
PROMPT = "def main():\n"
LONG, SHORT = 300, 16
SETTINGS = {
    "model": {"dtype": "float32"},
    "gang": {
        "stages": 2,
        "expert_parallel": 2,
        "cache_tokens": 4096,
        "device": "cpu",
        "cpus": 1.4,  # of three: two ranks to a node
        "step_timeout_s": 20.0,  # also what forming a group may take
    },
    "ingress": {"host": "0.0.0.0", "port": PORT},
    "secret": "of the internal ports of this test",
}


@dataclass(frozen=True)
class Fleet:
    """A served model on several nodes."""

    cluster: NodeCluster
    up: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Of the node that `expertline up` runs on, which nobody kills."""
        return f"http://{self.cluster.nodes[1].address}:{PORT}"

    def with_title(self, title: str) -> list[Node]:
        return [node for node in self.cluster.nodes if node.titled(title)]

    async def answer(self, tokens: int) -> str:
        body = {"model": "nano", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        async with httpx.AsyncClient(timeout=180) as client:
            response = await client.post(
                f"{self.url}/v1/completions", json=body | {"ignore_eos": True}
            )
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def metric(self, name: str) -> list[tuple[dict[str, str], float]]:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        return [(x.labels, x.value) for each in families for x in each.samples if x.name == name]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="xl", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = serve_environment(folder, longest_stream_s=600)
        specs = [NodeSpec(cpus=0), *(NodeSpec(cpus=3) for _ in range(3))]
        store = partial(redis_store, folder=folder) if NO_REDIS is None else None
        with node_cluster(specs, folder, environment, store) as cluster:
            (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
            command = [sys.executable, "-c", "from deploy.cli import main; main()", "up"]
            up = cluster.spawn(
                cluster.nodes[1],
                [*command, "--config", str(folder / "settings.yaml")],
                folder / "up.log",
                RAY_ADDRESS=cluster.address,
            )
            _wait_ready(up, folder / "up.log")
            yield Fleet(cluster, up)


def _wait_ready(up: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any(line.startswith(b"ready ") for line in log.read_bytes().splitlines()):
        text = log.read_text(errors="replace")[-3000:]
        assert up.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


async def test_a_stage_stays_inside_a_node_and_stages_lie_on_several(fleet: Fleet) -> None:
    assert await fleet.answer(SHORT) == expected_text(PROMPT, SHORT)
    where: dict[str, set[str]] = {}
    for labels, _ in fleet.metric("expertline_stage_compute_seconds_total"):
        where.setdefault(labels["stage"], set()).add(labels["instance"].rsplit(":", 1)[0])
    assert sorted(where) == ["0", "1"]
    assert [len(hosts) for hosts in where.values()] == [1, 1]
    assert where["0"] != where["1"]
    assert len(fleet.with_title("ray::Rank")) == 2


async def test_a_request_outlives_the_cable_of_a_node_that_works_on_it(fleet: Fleet) -> None:
    expected = await fleet.answer(LONG)
    keep = {fleet.cluster.nodes[1].name}
    keep |= {node.name for title in ("Ingress", "Router") for node in fleet.with_title(title)}
    victims = [node for node in fleet.with_title("ray::Rank") if node.name not in keep]
    if not victims:
        pytest.skip("ingress, router and ranks were placed together")
    asked = asyncio.create_task(fleet.answer(LONG))
    await until(lambda: sum(v for _, v in fleet.metric("expertline_requests_running")) > 0, 60)
    fleet.cluster.link(victims[0], up=False)
    assert await asked == expected
    await asyncio.to_thread(fleet.cluster.kill, victims[0])
    fleet.cluster.link(victims[0], up=True)
    await asyncio.to_thread(fleet.cluster.start, victims[0])


@pytest.mark.skipif(NO_REDIS is not None, reason=str(NO_REDIS))
async def test_tokens_flow_without_a_head_and_another_one_takes_over(fleet: Fleet) -> None:
    expected = await fleet.answer(LONG)
    asked = asyncio.create_task(fleet.answer(LONG))
    await until(lambda: sum(v for _, v in fleet.metric("expertline_requests_running")) > 0, 60)
    await asyncio.to_thread(fleet.cluster.kill, fleet.cluster.head)
    assert await asked == expected
    assert expected.startswith(await fleet.answer(SHORT))
    await asyncio.to_thread(fleet.cluster.start, fleet.cluster.head)
    assert await fleet.answer(LONG) == expected
    (home,) = fleet.with_title("ServeReplica:expertline:Engine")
    (engine,) = home.titled("ServeReplica:expertline:Engine")
    os.kill(engine, signal.SIGKILL)  # only a controller that is back can replace it
    assert await fleet.answer(LONG) == expected

"""Parts that leave or are replaced while clients use them: no request is lost.

Two engines of one rank each behind two ingresses. Every answer is greedy, and so must be what the
same request gets undisturbed, whoever served it and however often it was moved.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import yaml

from tests.cluster.server import Server, running_server
from tests.cluster.test_lifecycle import find
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SETTINGS = {
    "model": {"dtype": "float32"},
    "gang": {"cache_tokens": 4096},
    "engine": {"replicas": 2, "drain_timeout_s": 1.0},
    "ingress": {"replicas": 2},
    "secret": "of the internal ports of this test",
}
ASK = {"model": "nano", "prompt": "def ", "temperature": 0, "ignore_eos": True}
LONG, SHORT = 400, 24  # tokens
UPDATE = """
import json, sys
import ray
from ray import serve

ray.init(address="auto", log_to_driver=False)
from serving.app import APP_NAME, build

serve.run_many([serve.RunTarget(build(json.loads(sys.argv[1])), name=APP_NAME, route_prefix="/")])
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("settings") / "settings.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    with running_server("--config", str(config)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[int, str]:
    """What `ASK` is answered with, by length."""
    return {n: asyncio.run(answer(server, n, stream=False)) for n in (LONG, SHORT)}


async def answer(server: Server, tokens: int, stream: bool) -> str:
    """The text that a request gets; whatever is wrong with its answer raises."""
    body = ASK | {"max_tokens": tokens, "stream": stream}
    url = f"{server.url}/v1/completions"
    async with httpx.AsyncClient(timeout=120) as client:
        if not stream:
            response = await client.post(url, json=body)
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])
        text, done = "", False
        async with client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
                done = done or line == "data: [DONE]"
        assert done, "the stream was cut"
        return text


@asynccontextmanager
async def load(server: Server, expected: dict[int, str]) -> AsyncIterator[list[str]]:
    """Clients that ask again and again while the body runs; yields the answers so far."""
    over, answers = asyncio.Event(), list[str]()

    async def client(tokens: int, stream: bool) -> None:
        while not over.is_set():
            text = await answer(server, tokens, stream)
            assert text == expected[tokens]
            answers.append(text)

    async with asyncio.TaskGroup() as clients:
        for tokens, stream in ((LONG, True), (LONG, False), (SHORT, True), (SHORT, False)):
            clients.create_task(client(tokens, stream))
        try:
            yield answers
        finally:
            over.set()


async def more(answers: list[str], count: int) -> None:
    """Until so many more answers have come."""
    wanted = len(answers) + count
    await until(lambda: len(answers) >= wanted, 120)


def run(server: Server, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that finds the server's cluster."""
    environment = os.environ | {"RAY_TMPDIR": str(server.workdir), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


async def test_an_engine_that_is_drained_hands_over_what_it_runs(
    server: Server, expected: dict[int, str]
) -> None:
    main = "from deploy.cli import main; main()"
    before = find(server, "ServeReplica:expertline:Engine")
    async with load(server, expected) as answers:
        await more(answers, 2)
        refused = await asyncio.to_thread(run, server, main, "drain", "--engine", "nobody")
        assert refused.returncode == 2
        known = refused.stderr.split("there is: ")[1].strip().split(", ")
        assert len(known) == 2
        done = await asyncio.to_thread(run, server, main, "drain", "--engine", known[0])
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"drained {known[0]} in "), done.stdout
        await more(answers, 4)
        await until(lambda: len(find(server, "ServeReplica:expertline:Engine")) == 2, 120)
    assert set(find(server, "ServeReplica:expertline:Engine")) != set(before)


async def test_what_a_dead_ingress_left_unanswered_is_answered_by_another(
    server: Server, expected: dict[int, str]
) -> None:
    asked = [asyncio.create_task(answer(server, LONG, stream=False)) for _ in range(8)]
    await until(lambda: running(server) >= 6, 60)
    victim = find(server, "ServeReplica:expertline:Ingress")[0]
    os.kill(victim, signal.SIGKILL)
    assert set(await asyncio.gather(*asked)) == {expected[LONG]}
    await until(lambda: len(find(server, "ServeReplica:expertline:Ingress")) == 2, 120)


def running(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("expertline_requests_running{")]
    return round(sum(float(line.split()[-1]) for line in lines))


async def test_an_update_of_everything_under_load_fails_no_request(
    server: Server, expected: dict[int, str]
) -> None:
    """To one engine, whose predecessor stops before it starts: requests wait meanwhile."""
    before = set(find(server, "ServeReplica:expertline"))
    changed = SETTINGS | {"engine": {"replicas": 1, "drain_timeout_s": 1.0}}
    async with load(server, expected) as answers:
        await more(answers, 2)
        done = await asyncio.to_thread(run, server, UPDATE, json.dumps(changed))
        assert done.returncode == 0, done.stderr[-2000:]
        await until(lambda: not before & set(find(server, "ServeReplica:expertline")), 180)
        await more(answers, 4)

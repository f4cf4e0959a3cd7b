"""Clients of the pair: every answer is greedy, and so is what it must be, whoever served it and
however often it was moved."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.cluster.server import Server
from tests.cluster.waiting import until

SETTINGS: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "gang": {"cache_tokens": 4096},
    "engine": {"replicas": 2, "drain_timeout_s": 1.0},
    "router": {"queue_timeout_s": 400.0},
    "ingress": {"replicas": 2},
    "secret": "of the internal ports of this test",
}
ASK = {"model": "nano", "prompt": "def ", "temperature": 0, "ignore_eos": True}
LONG, SHORT = 400, 24  # tokens
_REQUEST_S = 300.0


async def answer(server: Server, tokens: int, stream: bool) -> str:
    """The text that a request gets; whatever is wrong with its answer raises."""
    body = ASK | {"max_tokens": tokens, "stream": stream}
    url = f"{server.url}/v1/completions"
    async with httpx.AsyncClient(timeout=_REQUEST_S) as client:
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
    await until(lambda: len(answers) >= wanted, 300)


def run(server: Server, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that finds the server's cluster."""
    environment = os.environ | {"RAY_TMPDIR": str(server.workdir), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

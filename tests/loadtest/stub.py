"""A server on the loopback that streams what a script says, well or badly."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

Events = list[str | float]  # data of events, and seconds to wait between them


def chunk(text: str = "", finish: str | None = None, index: int = 0, **extra: Any) -> str:
    choice = {"index": index, "text": text, "finish_reason": finish}
    return json.dumps({"id": "cmpl-1", "choices": [choice], "usage": None} | extra)


def usage(prompt: int = 7, completion: int = 6) -> str:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return json.dumps({"id": "cmpl-1", "choices": [], "usage": counts})


GOOD: Events = [chunk("def"), 0.02, chunk(" f():"), 0.02, chunk("", "stop"), usage(), "[DONE]"]


class Stub:
    """Answers request number i with `script(i)`: events to stream, or a whole response."""

    def __init__(self) -> None:
        self.script: Callable[[int], Events | Response] = lambda number: GOOD
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.url = ""
        self._numbers = itertools.count()
        self.app = FastAPI()
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/{path:path}")(self._answer)

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "stub-model"}]})

    async def _answer(self, path: str, request: Request) -> Response:
        number = next(self._numbers)  # before anything is awaited: no two have the same
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.paths.append(path)
        answer = self.script(number)
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(_stream(answer), media_type="text/event-stream")


async def _stream(events: Events) -> AsyncIterator[str]:
    yield ": a comment that clients skip\n\n"
    for event in events:
        if isinstance(event, str):
            yield f"data: {event}\n\n"
        else:
            await asyncio.sleep(event)


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    """The stub, served from a thread of its own."""
    config = uvicorn.Config(stub.app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline, "the stub did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    stub.url = f"http://127.0.0.1:{port}"
    try:
        yield stub
    finally:
        server.should_exit = True
        thread.join(60)

"""An OpenAI-compatible server that says what a test tells it to: no model, no Ray.

Runs uvicorn in a thread of the test's process. Each POST takes the next scripted answer.
"""

import asyncio
import json
import math
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

MODELS = ("scripted", "other")


@dataclass(frozen=True, slots=True)
class Scripted:
    """One streamed answer.

    Args:
        tokens: one event each.
        text: all of it, in the last event, where the tokens are not the text themselves.
        unsaid: tokens after them that are not part of the text, as an end token is.
        ending: `hang` keeps the stream open until the client goes, `cut` closes it in the middle.
        refused: a message, sent with status 400 in place of a stream.
    """

    tokens: tuple[str, ...] = ()
    text: str = ""
    unsaid: tuple[str, ...] = ()
    ending: Literal["done", "error", "hang", "cut"] = "done"
    error: str = "The engine is gone."
    refused: str | None = None
    pause_s: float = 0.0


@dataclass(slots=True)
class Seen:
    """A request that arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(slots=True)
class ScriptedApi:
    """The server as a test sees it.

    Attributes:
        key: if set, requests without it are refused.
        seen: the POSTs so far; `asked` counts those that were not refused for their key.
        gone: set when a client leaves an answer that hangs.
    """

    url: str = ""
    key: str | None = None
    answers: deque[Scripted] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gone: threading.Event = field(default_factory=threading.Event)

    def app(self) -> FastAPI:
        api = FastAPI()
        api.add_api_route("/v1/models", self._models)
        api.add_api_route("/v1/chat/completions", self._answer, methods=["POST"])
        api.add_api_route("/v1/completions", self._answer, methods=["POST"])
        return api

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"data": [{"id": name} for name in MODELS]})

    async def _answer(self, request: Request) -> Response:
        seen = Seen(request.url.path, dict(request.headers), await request.json())
        self.seen.append(seen)
        if refusal := self._refused(request):
            return refusal
        self.asked.release()
        answer = self.answers.popleft()
        if answer.refused is not None:
            return JSONResponse({"error": {"message": answer.refused}}, status_code=400)
        events = self._events(answer, _chat_choice if "messages" in seen.body else _text_choice)
        return StreamingResponse(events, media_type="text/event-stream")

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "This key is unknown."}}, status_code=401)

    async def _events(
        self, answer: Scripted, choice: Callable[[str, str | None], dict[str, Any]]
    ) -> AsyncIterator[str]:
        for token in answer.tokens:
            yield _event({"choices": [choice("" if answer.text else token, token)]})
            await asyncio.sleep(answer.pause_s)
        if answer.ending == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.gone.set()
        if answer.ending == "cut":
            raise ConnectionError("scripted")
        if answer.ending == "error":
            yield _event({"error": {"message": answer.error}})
            return
        for token in answer.unsaid:
            yield _event({"choices": [choice("", token)]})
        yield _event({"choices": [{**choice(answer.text, None), "finish_reason": "stop"}]})
        count = len(answer.tokens) + len(answer.unsaid)
        yield _event({"choices": [], "usage": {"completion_tokens": count}})
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def alternatives(token: str) -> dict[str, float]:
    """The token at one half, and five less likely ones."""
    others = {f"{token}{n}": math.log(0.25 / 2**n) for n in range(5)}
    return {token: math.log(0.5), **others}


def _chat_choice(text: str, token: str | None) -> dict[str, Any]:
    entries = [
        {"token": name, "logprob": logprob, "bytes": list(name.encode())}
        for name, logprob in alternatives(token or "").items()
    ]
    content = [{**entries[0], "top_logprobs": entries[:5]}] if token is not None else []
    return {
        "index": 0,
        "delta": {"content": text} if text else {},
        "logprobs": {"content": content},
    }


def _text_choice(text: str, token: str | None) -> dict[str, Any]:
    tokens = [token] if token is not None else []
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [math.log(0.5) for _ in tokens],
        "top_logprobs": [alternatives(token) for token in tokens],
        "text_offset": [0 for _ in tokens],
    }
    return {"index": 0, "text": text, "logprobs": logprobs}


@contextmanager
def scripted_api(extend: Callable[[FastAPI], None] = lambda api: None) -> Iterator[ScriptedApi]:
    """A running server.

    Args:
        extend: adds routes of its own before the start.
    """
    scripted = ScriptedApi()
    app = scripted.app()
    extend(app)
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # who comes early waits in line
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            scripted.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            yield scripted
        finally:
            server.should_exit = True
            thread.join()

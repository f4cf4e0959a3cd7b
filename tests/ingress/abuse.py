"""What tests send abuse with: requests as they stand, and somebody else's stream beside them."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message

from serving.api.endpoints import ENDPOINTS, Endpoint
from serving.engine.request import FinishReason, RequestStats, TokenOutput
from serving.fleet import GenerateCall, TokenFrame
from tests.ingress.stack import ScriptedEngine, Stack, stack
from tests.ingress.test_routes import SCRIPT, TEXT, TOKENIZER

T = TypeVar("T")
ATTEMPTS = 5  # at what takes too long: others work on this machine, too
SLOWEST_S = 5.0  # of an answer: 0.1 s is the aim, the rest is for a busy machine
BUSIEST_S = 1.0  # of CPU time on the event loop, which others' work does not lengthen as much
LARGEST_REFUSAL = 4096
CANARY = "c4n4ry"
BESIDE = "beside"
PACE_S = 0.002

MESSAGES = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    "completions": {"model": "nano", "prompt": "x", "max_tokens": 4},
    "chat": {"model": "nano", "messages": MESSAGES, "max_tokens": 4},
    "responses": {"model": "nano", "input": "x", "max_output_tokens": 4},
    "messages": {"model": "nano", "messages": MESSAGES, "max_tokens": 4},
    "count_tokens": {"model": "nano", "messages": MESSAGES},
    "tokenize": {"prompt": "x"},
    "detokenize": {"tokens": [1]},
}
BY_NAME: dict[str, Endpoint] = {each.name: each for each in ENDPOINTS if each.body is not None}


def fields(name: str) -> list[str]:
    body = BY_NAME[name].body
    assert body is not None
    return [info.alias or key for key, info in body.model_fields.items()]


def nested(opening: str, closing: str, levels: int) -> str:
    return opening * levels + "1" + closing * levels


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, how long the server took over it, and how much of that its loop was busy."""

    status: int
    body: bytes
    seconds: float
    busy_s: float


async def ask(app: ASGIApp, path: str, body: bytes, request_id: str = "") -> Reply:
    """Sends a request as a server would hand it over; the client stays until the end."""
    status, parts = 0, []
    given = iter([{"type": "http.request", "body": body}])

    async def receive() -> Message:
        for message in given:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"test"), (b"x-request-id", request_id.encode())],
    }
    started, busy = time.perf_counter(), time.thread_time()
    try:
        async with asyncio.timeout(120):
            await app(scope, receive, send)
    except Exception:
        if not status:
            raise  # else the client has its 500, and the server's log the rest
    ended, busy_until = time.perf_counter(), time.thread_time()
    return Reply(status, b"".join(parts), ended - started, busy_until - busy)


class Beside:
    """Somebody else's stream: paced, without an end of its own."""

    def __init__(self, it: Stack) -> None:
        self._it = it
        self._others = it.engine._speak
        self._enough = asyncio.Event()
        it.engine._speak = self._speak  # type: ignore[method-assign]
        body = BODIES["completions"] | {"ignore_eos": True, "max_tokens": 4000, "stream": True}
        self._reply = asyncio.create_task(
            ask(it.app, "/v1/completions", json.dumps(body).encode(), BESIDE)
        )

    async def complete(self) -> None:
        """Lets it end; every token must have come, in order."""
        assert not self._reply.done()
        self._enough.set()
        *chunks, done, rest = (await self._reply).body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
        text = "".join(choice["text"] for choice in choices)
        assert text == (TEXT * (len(text) // len(TEXT) + 1))[: len(text)]
        assert len(chunks) >= self.tokens > 0
        assert choices[-1]["finish_reason"] == "length"

    async def _speak(self, call: GenerateCall) -> None:
        if not call.request_id.startswith(BESIDE):
            await self._others(call)
            return
        self.tokens = 0
        while not self._enough.is_set():
            self._send(call, None)
            await asyncio.sleep(PACE_S)
        self._send(call, FinishReason.LENGTH)

    def _send(self, call: GenerateCall, finish: FinishReason | None) -> None:
        engine: ScriptedEngine = self._it.engine
        stats = RequestStats(2, cached_tokens=0, generated_tokens=self.tokens + 1)
        token = SCRIPT[self.tokens % len(SCRIPT)]
        output = TokenOutput(call.request_id, token, finish=finish, stats=stats if finish else None)
        engine._send(call, TokenFrame(tokens=[output]))
        self.tokens += 1


@dataclass(slots=True)
class Gap:
    """The longest time for which an event loop did nothing else, and its process worked.

    A machine that stands still holds up the loop, too, but then nobody here uses its processor.
    """

    seconds: float = 0.0
    worked_s: float = 0.0
    _task: "asyncio.Task[None] | None" = field(default=None, repr=False)

    def within(self, bound_s: float) -> bool:
        """By work alone; who only waits, as others' work may make us, gets four times as much."""
        return self.worked_s < bound_s and self.seconds < 4 * bound_s

    async def __aenter__(self) -> "Gap":
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0.01)
        self.seconds = self.worked_s = 0.0
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.sleep(0.005)
        assert self._task is not None
        self._task.cancel()

    async def _watch(self) -> None:
        pause = 0.001
        while True:
            before, busy = time.perf_counter(), time.process_time()
            await asyncio.sleep(pause)
            late, busy = time.perf_counter() - before - pause, time.process_time() - busy
            self.seconds = max(self.seconds, late)
            self.worked_s = max(self.worked_s, min(late, busy))


@dataclass(slots=True)
class Server:
    """A stack on a loop of its own, for tests that are not coroutines, as hypothesis wants them."""

    it: Stack
    loop: asyncio.AbstractEventLoop
    times: dict[str, float] = field(default_factory=dict)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(300)

    def post(self, name: str, body: bytes, label: str) -> Reply:
        """The reply, which keeps what is promised of all of them; the first that is in time."""
        for _ in range(ATTEMPTS):
            reply = self.do(ask(self.it.app, BY_NAME[name].path, body))
            if reply.seconds < SLOWEST_S and reply.busy_s < BUSIEST_S:
                break
        label = f"{name}: {label}"
        self.times[label] = reply.busy_s
        assert reply.status == 200 or 400 <= reply.status < 500, (label, reply.body)
        assert reply.seconds < SLOWEST_S, label
        assert reply.busy_s < BUSIEST_S, label
        if reply.status != 200:
            refusal = json.loads(reply.body)
            keys = {"message", "type", "param", "code"}
            if name in ("messages", "count_tokens"):
                keys = {"message", "type"}
            assert set(refusal["error"]) == keys, label
            assert len(reply.body) < LARGEST_REFUSAL, label
            assert CANARY not in reply.body.decode(), (label, reply.body)
        return reply

    def busiest(self) -> str:
        most = sorted(self.times.items(), key=lambda item: -item[1])[:5]
        return ", ".join(f"{label}: {seconds * 1e3:.0f} ms" for label, seconds in most)


@asynccontextmanager
async def disturbed(**given: Any) -> AsyncIterator[Stack]:
    """A stack with a stream beside; whoever leaves it must have left nothing behind."""
    async with stack(SCRIPT, **given) as it:
        first = await ask(it.app, "/v1/chat/completions", json.dumps(BODIES["chat"]).encode())
        assert first.status == 200
        beside = Beside(it)
        yield it
        await beside.complete()
        last = await ask(it.app, "/v1/completions", json.dumps(BODIES["completions"]).encode())
        (choice,) = json.loads(last.body)["choices"]
        assert choice["text"] == TOKENIZER.decode(SCRIPT[:4])
        await it.quiet()


@contextmanager
def serving(**given: Any) -> Iterator[Server]:
    gc.collect()
    gc.freeze()  # what other tests left behind is not the server's to look through
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    context = disturbed(**given)
    try:
        server = Server(asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(), loop)
        yield server
        server.do(context.__aexit__(None, None, None))
        print(f"\n{len(server.times)} requests, the busiest: {server.busiest()}")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        gc.unfreeze()


def with_value(name: str, key: str, raw: str) -> bytes:
    """A good body but for one field, whose value is given as it stands."""
    rest = {k: v for k, v in BODIES[name].items() if k != key}
    return f'{json.dumps(rest)[:-1]}{", " if rest else ""}"{key}": {raw}}}'.encode()

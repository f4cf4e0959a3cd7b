"""Several generations as one answer: all at once, or as one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, suppress

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.delta import Delta
from serving.api.sse import WAITING
from serving.ingress.generation import Generation

_SEND = "expertline.send"  # in a request's scope
_MOST_UNREAD = 64  # deltas of all choices; what a client is slower to read waits further back

Refine = Callable[[Delta], Delta]


class DirectSend:
    """ASGI middleware that lets a stream's events pass by what lies between it and the stream.

    FastAPI's layers only watch for the head of an answer, which goes through them; for every event
    of every stream each of them would cost a call.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_SEND] = send
        await self._app(scope, receive, send)


class EventStream(StreamingResponse):
    """A stream of events that owns what it streams from, even if it is never read.

    Args:
        keep_alive_s: after so long without an event a comment says that the stream is alive.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], owned: AsyncExitStack, keep_alive_s: float
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.owned = owned
        self.owned.push_async_callback(events.aclose)
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._direct: Send | None = None  # past what lies between, if there is such a way
        self._said = False  # something, since the last look
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._direct = scope.get(_SEND)
        with suppress(ClientDisconnect):
            async with self.owned:
                await super().__call__(scope, receive, send)
                if not self._complete:
                    raise ClientDisconnect

    async def stream_response(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        send = self._direct or send
        keeping = asyncio.create_task(self._keep_alive(send))
        try:
            async for chunk in self._events:
                self._said = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._complete = True

    async def _keep_alive(self, send: Send) -> None:
        """Whole events are sent, one at a time, so that a comment always falls between two."""
        while True:
            await asyncio.sleep(self._keep_alive_s)
            if not self._said:
                await send({"type": "http.response.body", "body": WAITING, "more_body": True})
            self._said = False


class Choice:
    """One generation, and what is made of its deltas (calls out of text) before they are shown."""

    def __init__(self, generation: Generation, refine: Refine | None = None) -> None:
        self.generation = generation
        self._refine = refine

    def deltas(self) -> AsyncIterator[Delta]:
        """What the generation's are made into, as they come."""
        deltas = self.generation.deltas()
        return deltas if self._refine is None else _refined(deltas, self._refine)

    async def whole(self) -> Delta:
        whole = Delta()
        async for delta in self.deltas():
            whole.add(delta)
        return whole


async def _refined(deltas: AsyncIterator[Delta], refine: Refine) -> AsyncIterator[Delta]:
    async for delta in deltas:
        yield refine(delta)


def merged(choices: Sequence[Choice]) -> AsyncIterator[Delta]:
    """Deltas of all choices as they come."""
    return choices[0].deltas() if len(choices) == 1 else _merged(choices)


async def _merged(choices: Sequence[Choice]) -> AsyncIterator[Delta]:
    arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MOST_UNREAD)

    async def pump(index: int, choice: Choice) -> None:
        try:
            async for delta in choice.deltas():
                delta.choice = index
                await arrived.put(delta)
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(i, choice)) for i, choice in enumerate(choices)]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

"""Several generations as one answer: all at once, or as one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, suppress

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.api.delta import Delta
from serving.ingress.generation import Generation

Refine = Callable[[Delta], Delta]


class EventStream(StreamingResponse):
    """A stream of events that owns what it streams from, even if it is never read."""

    def __init__(self, events: AsyncGenerator[bytes], owned: AsyncExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.owned = owned
        self.owned.push_async_callback(events.aclose)
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            async with self.owned:
                await super().__call__(scope, receive, send)
                if not self._complete:
                    raise ClientDisconnect

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._complete = True


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


async def merged(choices: Sequence[Choice]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several choices as they come, each with the choice's index."""
    if len(choices) == 1:
        async for delta in choices[0].deltas():
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def pump(index: int, choice: Choice) -> None:
        try:
            async for delta in choice.deltas():
                arrived.put_nowait((index, delta))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

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

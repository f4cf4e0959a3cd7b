"""The engine's end of the token streams: one connection from each ingress, a frame per step.

Who asked for what is known here: a request belongs to the ingress that sent it, and ends with
that ingress's stream. An ingress that hears nothing for long takes the engine for lost, so every
stream has a beat besides its tokens; it also says what the engine is about.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence

from serving.engine.request import Finish, FinishReason, Output, PromptScores, TokenOutput
from serving.fleet import (
    BEAT_S,
    STREAM_CODEC,
    Cancel,
    Condition,
    EngineBeat,
    StreamHello,
    TokenFrame,
)
from serving.telemetry.logs import get_logger
from serving.wire import Channel, ChannelServer, WireError

log = get_logger("engine")


class TokenStreams:
    """All ingresses of one engine, and the requests that it runs for them.

    Args:
        cancel: ends a request in the engine; its id may be unknown there.
    """

    def __init__(self, secret: bytes, cancel: Callable[[str], None]) -> None:
        self._cancel = cancel
        self._condition = Condition.SERVING
        self._channels: dict[str, Channel] = {}
        self._owners: dict[str, str] = {}  # request id → ingress id
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._server = ChannelServer(secret, STREAM_CODEC, self._serve)
        self._beating: asyncio.Task[None] | None = None

    @property
    def requests(self) -> list[str]:
        """Ids of all that run here."""
        return list(self._owners)

    @property
    def condition(self) -> Condition:
        return self._condition

    @condition.setter
    def condition(self, condition: Condition) -> None:
        """What the engine is about from now on; the ingresses are told at once."""
        self._condition = condition
        self._tell()

    async def start(self, host: str) -> int:
        """Listens; returns the port."""
        self._beating = asyncio.create_task(self._beat(), name="engine-beat")
        return await self._server.start(host)

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        await self._server.close()

    async def cut(self) -> None:
        """Ends every stream, after what was sent on it."""
        for channel in list(self._channels.values()):
            await channel.close()

    def open(self, request_id: str, ingress_id: str) -> "asyncio.Future[None]":
        """A request begins; the future is done when it has ended, one way or another.

        Raises:
            RuntimeError: the ingress has no stream to this engine.
        """
        if ingress_id not in self._channels:
            raise RuntimeError("the ingress has no token stream to this engine")
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owners[request_id] = ingress_id
        self._ends[request_id] = end
        return end

    def forget(self, request_id: str) -> None:
        """Nothing more is sent for a request."""
        self._owners.pop(request_id, None)
        self._ends.pop(request_id, None)

    def move(self, request_ids: Sequence[str], reason: str) -> None:
        """Ends requests here and asks their ingresses to go on with them elsewhere."""
        for request_id in request_ids:
            self._cancel(request_id)
        self.emit([Finish(each, FinishReason.MOVED, reason) for each in request_ids])

    def emit(self, outputs: Sequence[Output]) -> None:
        """Sends one frame to each ingress that a step had news for."""
        frames: dict[str, TokenFrame] = defaultdict(TokenFrame)
        for output in outputs:
            ingress_id = self._owners.get(output.request_id)
            if ingress_id is None:
                continue
            if isinstance(output, TokenOutput):
                frames[ingress_id].tokens.append(output)
            elif isinstance(output, PromptScores):
                frames[ingress_id].scores.append(output)
            else:
                frames[ingress_id].ended.append(output)
            end = self._ends.get(output.request_id)
            if output.ends and end is not None and not end.done():
                end.set_result(None)
        for ingress_id, frame in frames.items():
            channel = self._channels.get(ingress_id)
            if channel is not None:
                self._send(ingress_id, channel, frame)

    def _send(self, ingress_id: str, channel: Channel, message: TokenFrame | EngineBeat) -> None:
        try:
            channel.send(message)
        except WireError:
            log.event("WARNING", "ingress.stalled", ingress=ingress_id)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._tell()

    def _tell(self) -> None:
        for ingress_id, channel in self._channels.items():
            self._send(ingress_id, channel, EngineBeat(self._condition))

    async def _serve(self, channel: Channel) -> None:
        hello = await channel.receive()
        if not isinstance(hello, StreamHello):
            return
        self._channels[hello.ingress_id] = channel
        channel.send(hello)  # from here on requests of this ingress can be served
        channel.send(EngineBeat(self._condition))
        try:
            with contextlib.suppress(WireError):
                while True:
                    message = await channel.receive()
                    if isinstance(message, Cancel):
                        self._end(message.request_id)
            log.event("INFO", "ingress.left", ingress=hello.ingress_id)
        finally:
            if self._channels.get(hello.ingress_id) is channel:
                del self._channels[hello.ingress_id]
                for request_id in [k for k, v in self._owners.items() if v == hello.ingress_id]:
                    self._end(request_id)

    def _end(self, request_id: str) -> None:
        """Nobody waits for a request any more: its pages are free when this returns."""
        end = self._ends.get(request_id)
        if end is not None and not end.done():
            self._cancel(request_id)
            end.set_result(None)

"""One engine as an ingress sees it: the connection that its tokens come over."""

import asyncio
from collections.abc import Callable

from serving.fleet import (
    STREAM_CODEC,
    Cancel,
    Condition,
    EngineBeat,
    EngineHello,
    StreamHello,
    TokenFrame,
)
from serving.telemetry.logs import get_logger
from serving.wire import Channel, WireError, connect

log = get_logger("fleet")
_RECONNECT_S = 0.2


class EngineStream:
    """The connection to one engine, kept up for as long as the engine is in the fleet.

    A connection outlives the engine's place in the fleet: a router that has just started knows
    no engine yet, and an engine that is leaving finishes what it has.

    Args:
        deliver: called with what the engine sends.
        changed: called when the engine has become able to take requests, or has changed otherwise.
        lost: called with the requests that a lost connection carried.
        ended: called when neither a connection nor a place in the fleet is left.
    """

    def __init__(
        self,
        engine: EngineHello,
        ingress_id: str,
        secret: bytes,
        deliver: Callable[[TokenFrame], None],
        changed: Callable[[], None],
        lost: Callable[[set[str]], None],
        ended: Callable[["EngineStream"], None],
    ) -> None:
        self.engine = engine
        self.listed = True  # has a place in the fleet
        self.requests: set[str] = set()  # this ingress's own, running there now
        self.condition = Condition.SERVING
        self.missed = 0  # beats of the ingress since the engine was last heard
        self.repairing = 0  # beats of the ingress since it is under repair
        self._ingress_id = ingress_id
        self._secret = secret
        self._deliver = deliver
        self._changed = changed
        self._lost = lost
        self._ended = ended
        self._channel: Channel | None = None
        self._settled = asyncio.Event()  # connected, or never to be
        self._task = asyncio.create_task(self._run(), name=f"stream-{engine.engine_id}")

    @property
    def connected(self) -> bool:
        return self._channel is not None

    async def opened(self) -> bool:
        """Waits for the connection; False if it will not come."""
        await self._settled.wait()
        return self.connected

    def cancel(self, request_id: str) -> None:
        """Tells the engine that nobody waits for a request; a lost engine knows anyway."""
        if self._channel is not None:
            try:
                self._channel.send(Cancel(request_id))
            except WireError:
                return

    def abort(self) -> None:
        """Gives the connection up: the engine has not been heard for too long."""
        if self._channel is not None:
            self._channel.abort()

    def stop(self) -> None:
        self._task.cancel()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self.listed:
                try:
                    channel = await connect(
                        self.engine.host, self.engine.port, self._secret, STREAM_CODEC
                    )
                except WireError:
                    await asyncio.sleep(_RECONNECT_S)
                    continue
                await self._serve(channel)
        finally:
            self._settled.set()
            self._ended(self)

    async def _serve(self, channel: Channel) -> None:
        try:
            channel.send(StreamHello(self._ingress_id))
            await channel.receive()  # the engine's echo: it knows this stream now
            self._channel = channel
            self.missed, self.condition = 0, Condition.SERVING
            self._settled.set()
            self._changed()
            while True:
                message = await channel.receive()
                self.missed = 0
                if isinstance(message, TokenFrame):
                    self._deliver(message)
                elif isinstance(message, EngineBeat) and message.condition is not self.condition:
                    self.condition = message.condition
                    self._changed()
        except WireError:
            log.event("INFO", "stream.lost", engine=self.engine.engine_id)
        finally:
            self._settled.clear()
            self._channel = None
            channel.abort()
            self._lost(self.requests)  # the engine ends them too: it has nobody to tell

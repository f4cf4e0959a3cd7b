"""A connection to the router that is always being kept up, for engines and ingresses.

A router that is stopped, or cut off, closes no connection: silence for long ends it from here.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from serving.fleet import BEAT_S, ROUTER_CODEC, RouterBeat
from serving.telemetry.logs import get_logger
from serving.wire import Channel, WireError, connect

log = get_logger("router-link")
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5)


class RouterLink:
    """Finds the router through its Serve handle, connects, and connects again when it is lost.

    Args:
        handle: the Router deployment's handle; its `address` method is called.
        hello: makes the first message of each connection.
        receive: called with every message of the router but its beats.
        opened: called when a connection has been made and the hello is sent.
        lost: called when a connection ends.
        silence_s: how long a connection may be silent.
    """

    def __init__(
        self,
        handle: Any,
        secret: bytes,
        hello: Callable[[], Any],
        receive: Callable[[Any], None] = lambda message: None,
        lost: Callable[[], None] = lambda: None,
        opened: Callable[[], None] = lambda: None,
        silence_s: float = 3.0,
    ) -> None:
        self._handle = handle
        self._secret = secret
        self._hello = hello
        self._receive = receive
        self._lost = lost
        self._opened = opened
        self._most_missed = silence_s / BEAT_S
        self._missed = 0
        self._channel: Channel | None = None
        self._task = asyncio.create_task(self._run(), name="router-link")

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def send(self, message: Any) -> None:
        """Sends if there is a connection.

        Raises:
            WireError: there is none now.
        """
        if self._channel is None:
            raise WireError("no connection to the router")
        self._channel.send(message)

    def tell(self, message: Any) -> None:
        """Sends if there is a connection; a router that is away is told nothing."""
        with contextlib.suppress(WireError):
            self.send(message)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                host, port = await self._handle.address.remote()
                channel = await connect(host, port, self._secret, ROUTER_CODEC)
            except Exception as error:  # Serve's own errors have no common base
                log.event("DEBUG", "router.unreachable", error=type(error).__name__)
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                continue
            failures = 0
            await self._serve(channel)

    async def _serve(self, channel: Channel) -> None:
        watching = asyncio.create_task(self._watch(channel), name="router-watch")
        try:
            channel.send(self._hello())
            self._channel = channel
            self._opened()
            while True:
                message = await channel.receive()
                self._missed = 0
                if not isinstance(message, RouterBeat):
                    self._receive(message)
        except WireError as error:
            log.event("INFO", "router.lost", reason=str(error))
        finally:
            self._channel = None
            watching.cancel()
            channel.abort()
            self._lost()

    async def _watch(self, channel: Channel) -> None:
        """Counts its own beats and not the clock: a process that was held up itself has not
        yet looked at what has come meanwhile."""
        self._missed = 0
        while self._missed < self._most_missed:
            await asyncio.sleep(BEAT_S)
            self._missed += 1
        log.event("WARNING", "router.silent")
        channel.abort()

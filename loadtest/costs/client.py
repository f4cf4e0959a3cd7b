"""A client that reads many streams for little: it counts events and looks at nothing else.

Open loop: streams begin when they are due, whatever the earlier ones do. Whether the answers are
right is for `loadtest.sse` and the tests to say; here only their number and their times count.
"""

import asyncio
import time
from collections.abc import Sequence

from loadtest.costs.server import HOST

_STATUS = b"HTTP/1.1 200 "
_EVENT_END = b"\n\n"
_BEGUN = 2  # events: the first one comes before any token
_POLL_S = 0.05


class ClientError(Exception):
    """Streams did not begin, or ended early; the message says how many."""


class _Stream(asyncio.Protocol):
    """One connection with one request."""

    def __init__(self, request: bytes, owner: "StreamClient") -> None:
        self._request = request
        self._owner = owner
        self._tail = b""  # the last byte: an event's end may be cut in two
        self._last = 0.0
        self.events = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._tail and not data.startswith(_STATUS):
            self._owner.failures.append(data[:200].decode(errors="replace"))
        events = (self._tail + data).count(_EVENT_END)
        self._tail = data[-1:]
        if events:
            self.events += events
            self._owner.took(events, now - self._last)
            self._last = now

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:
            self._owner.failures.append("a stream ended early")


class StreamClient:
    """Streams of one server.

    Attributes:
        events: of all streams so far.
        failures: what went wrong, in the server's words.
    """

    def __init__(self, port: int) -> None:
        self.events = 0
        self.failures: list[str] = []
        self._port = port
        self._streams: list[_Stream] = []
        self._gaps_s: list[float] = []

    def __len__(self) -> int:
        return len(self._streams)

    async def open(self, requests: Sequence[bytes], rate: float, timeout_s: float) -> None:
        """Begins a stream for each request, `rate` a second, and waits until all have tokens.

        Raises:
            ClientError: not all of them did in time.
        """
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        opening = set()
        for number, request in enumerate(requests):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            stream = _Stream(request, self)
            self._streams.append(stream)
            connecting = loop.create_connection(lambda s=stream: s, HOST, self._port)  # type: ignore[misc]
            opening.add(asyncio.create_task(connecting))
        await asyncio.gather(*opening)
        deadline = time.perf_counter() + timeout_s
        while any(stream.events < _BEGUN for stream in self._streams):
            self.check()
            if time.perf_counter() > deadline:
                raise ClientError(f"not all of {len(self)} streams began within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    def check(self) -> None:
        """Raises ClientError if any stream has failed."""
        if self.failures:
            count = len(self.failures)
            raise ClientError(f"{count} of {len(self)} streams failed: {self.failures[0]}")

    def took(self, events: int, gap_s: float) -> None:
        """A stream has had events at once; the first of them after a gap."""
        self.events += events
        self._gaps_s.append(gap_s)
        if events > 1:
            self._gaps_s += [0.0] * (events - 1)

    async def watch(self, seconds: float) -> list[float]:
        """The gaps between events of a stream, of all streams, for so long; in seconds."""
        self._gaps_s = []
        await asyncio.sleep(seconds)
        self.check()
        return self._gaps_s

    async def close(self) -> None:
        """Ends all streams, finished or not."""
        for stream in self._streams:
            transport, stream.transport = stream.transport, None
            if transport is not None:
                transport.abort()
        self._streams.clear()
        await asyncio.sleep(0)

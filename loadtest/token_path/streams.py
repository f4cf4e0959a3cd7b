"""Many streams at once, read as cheaply as possible: what is measured shares the machine.

Not a load generator: nothing arrives while it is measured. Each stream is one connection whose
bytes are searched for events and never parsed.
"""

import asyncio
import json
import time
from itertools import pairwise

_EVENT = b"data: "
_STATUS_OK = b"HTTP/1.1 200"


class TokenStream(asyncio.Protocol):
    """One open answer.

    Attributes:
        events: events that have come.
        arrivals: when something with events in it came, monotonic seconds.
        problem: why this is no stream, if so.
    """

    def __init__(self, request: bytes) -> None:
        self.events = 0
        self.arrivals: list[float] = []
        self.problem = ""
        self._request = request
        self._begun = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            if not data.startswith(_STATUS_OK):
                self.problem = data[:200].decode(errors="replace")
        events = data.count(_EVENT)
        if events:
            self.events += events
            self.arrivals.append(time.monotonic())

    def connection_lost(self, exc: Exception | None) -> None:
        self.problem = self.problem or "the stream ended"

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def gaps_s(self, since: float, until: float) -> list[float]:
        """Between arrivals of a time window."""
        inside = [at for at in self.arrivals if since <= at <= until]
        return [later - earlier for earlier, later in pairwise(inside)]


async def open_streams(host: str, port: int, count: int, max_tokens: int) -> list[TokenStream]:
    """So many chat streams, opened one after another."""
    loop = asyncio.get_running_loop()
    opened = []
    for number in range(count):
        request = _request(host, port, number, max_tokens)
        _, stream = await loop.create_connection(lambda r=request: TokenStream(r), host, port)  # type: ignore[misc]
        opened.append(stream)
    return opened


def _request(host: str, port: int, number: int, max_tokens: int) -> bytes:
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": f"Question {number}."}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded

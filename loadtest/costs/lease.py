"""What a lease costs at the router: its CPU for a request and for the release after it.

The router's own connection handlers run over channels in memory. Between two of a handler's
reads lies all that the router does for a message: decoding, the queue, the choice among the
engines, the grant's encoding, the metrics; all but the kernel's part in a socket.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from loadtest.costs.result import Result
from loadtest.report import Distribution
from serving.config import Settings
from serving.engine.pages import PAGE_TOKENS
from serving.fleet import ROUTER_CODEC, EngineHello, IngressHello, LeaseRelease, LeaseRequest
from serving.router.router import Router
from serving.wire import Channel, WireError

TARGET_US = 200.0
_HOST = "127.0.0.1"
_HEADER = 4  # a frame's length stands before what `Codec.decode` takes
_PROMPT_PAGES = 32
_SHARED_PAGES = 16  # of a prompt: what it has in common with others of its prefix
_OUTPUT_TOKENS = 512
_LEASES_AN_ENGINE = 16  # held at any time
_ENGINE_TOKENS = 1_000_000  # room for more: what is measured are grants
_TENANTS = 20


def measure(engines: int = 64, prefixes: int = 10_000, leases: int = 10_000) -> Result:
    """CPU of so many leases and their releases, over a fleet whose prefix index is full."""
    asked, released, grants = asyncio.run(_run(engines, prefixes, leases))
    both = [1e6 * (ask + release) for ask, release in zip(asked, released, strict=True)]
    whole = Distribution.of(both)
    return Result(
        name="lease",
        title=f"router CPU of a lease, p99 ({engines} engines, {prefixes} prefixes)",
        value=whole.p99,
        unit="µs",
        target=TARGET_US,
        details={
            "engines": engines,
            "prefixes": prefixes,
            "grants": grants,
            "lease_us": asdict(whole),
            "request_us": asdict(Distribution.of(1e6 * ask for ask in asked)),
            "release_us": asdict(Distribution.of(1e6 * release for release in released)),
        },
    )


async def _run(engines: int, prefixes: int, leases: int) -> tuple[list[float], list[float], int]:
    """CPU seconds of each request and of each release; and how many grants there were in all."""
    traffic = _Traffic(prefixes, held=engines * _LEASES_AN_ENGINE)
    with tempfile.TemporaryDirectory() as folder:
        router = _LocalRouter.__new__(_LocalRouter)
        settings = {
            "internal_host": _HOST,
            "telemetry": {"targets_directory": Path(folder), "log_level": "WARNING"},
            "router": {"prefix_entries": prefixes * _PROMPT_PAGES},
        }
        await router.__init__(Settings.model_validate(settings), b"")  # type: ignore[misc]
        members = [
            asyncio.create_task(router._serve(cast(Channel, _Member(f"engine-{number}"))))
            for number in range(engines)
        ]
        await asyncio.sleep(0)  # they say hello
        channel = _Measured(traffic.frames(leases))
        try:
            await router._serve(cast(Channel, channel))
        except WireError:
            pass  # the traffic has ended
        finally:
            for member in members:
                member.cancel()
            await asyncio.gather(*members, return_exceptions=True)
            await router.close()
    counted = channel.spent_s[-2 * leases :]
    return counted[0::2], counted[1::2], channel.grants


class _LocalRouter(Router):
    """Ends by `close`: only Serve awaits `__del__`."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    async def close(self) -> None:
        await Router.__del__(self)


class _Member:
    """The router's connection to an engine that says hello and nothing more."""

    def __init__(self, name: str) -> None:
        self._hello: EngineHello | None = EngineHello(
            name, _HOST, 9000, "m", _ENGINE_TOKENS, _ENGINE_TOKENS, []
        )

    async def receive(self) -> Any:
        hello, self._hello = self._hello, None
        if hello is None:
            await asyncio.Event().wait()
        return hello


class _Measured:
    """The router's connection to an ingress, whose reads say what the message before them cost."""

    def __init__(self, frames: Iterator[bytes]) -> None:
        self.spent_s: list[float] = []
        self.grants = 0
        self._frames = frames
        self._since = 0.0

    async def receive(self) -> Any:
        self.spent_s.append(time.thread_time() - self._since)
        frame = next(self._frames, None)
        if frame is None:
            raise WireError("the traffic has ended")
        self._since = time.thread_time()
        return ROUTER_CODEC.decode(frame)

    def send(self, message: object) -> None:
        self.send_frame(ROUTER_CODEC.frame(message))
        self.grants += 1

    def send_frame(self, frame: bytes) -> None: ...


class _Traffic:
    """An ingress's messages: a lease of each prefix, then such as are measured."""

    def __init__(self, prefixes: int, held: int) -> None:
        self._numbers = random.Random(0)
        self._prefixes = [self._pages(_SHARED_PAGES) for _ in range(prefixes)]
        self._held = held

    def frames(self, measured: int) -> Iterator[bytes]:
        """Ends with `measured` times a request and the release of an older lease."""
        yield _framed(IngressHello("ingress", f"{_HOST}:1"))
        warm = max(len(self._prefixes), self._held)
        for number in range(warm + measured):
            shared = self._numbers.choice(self._prefixes)
            if number < warm:
                shared = self._prefixes[number % len(self._prefixes)]
            yield _framed(self._request(number, shared))
            if number >= self._held:
                yield _framed(LeaseRelease(f"r{number - self._held}"))

    def _request(self, number: int, shared: list[bytes]) -> LeaseRequest:
        pages = shared + self._pages(_PROMPT_PAGES - _SHARED_PAGES)
        tenant, tokens = f"tenant-{number % _TENANTS}", _PROMPT_PAGES * PAGE_TOKENS
        return LeaseRequest(f"r{number}", tenant, 0, tokens, _OUTPUT_TOKENS, pages, 30.0)

    def _pages(self, count: int) -> list[bytes]:
        return [self._numbers.randbytes(16) for _ in range(count)]


def _framed(message: object) -> bytes:
    return ROUTER_CODEC.frame(message)[_HEADER:]

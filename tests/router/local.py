"""A router in the test's own process, without Serve."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import patch

from serving.config import Settings
from serving.router import router as module
from serving.router.router import Router

SECRET = b"a secret of the test"
HOST = "127.0.0.1"


class LocalRouter(Router):
    """Ends by `close`: only Serve awaits `__del__`."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    async def close(self) -> None:
        await Router.__del__(self)


class NoExporter:
    """No HTTP server and no thread; its own tests are in tests/telemetry."""

    address = f"{HOST}:1"

    def __init__(self, *args: object) -> None: ...

    def close(self) -> None: ...


async def new_router(**router: object) -> LocalRouter:
    """A router with these settings of its own; whoever makes it closes it.

    Engines of a test need no beat, unless it sets how long they may be silent.
    """
    router = {"silence_s": 3600} | router
    settings = Settings.model_validate({"internal_host": HOST, "router": router})
    made = LocalRouter.__new__(LocalRouter)
    with patch.object(module, "MetricsExporter", NoExporter):
        await made.__init__(settings, SECRET)  # type: ignore[misc]  # as Serve does
    return made


@asynccontextmanager
async def local_router(**router: object) -> AsyncIterator[LocalRouter]:
    """A router for the time of the body."""
    made = await new_router(**router)
    try:
        yield made
    finally:
        await made.close()


class RouterHandle:
    """What Serve's handle to the router does, for whatever router there is now."""

    def __init__(self, router: Router | None = None) -> None:
        self.router = router
        self.address = self

    async def remote(self) -> tuple[str, int]:
        if self.router is None:
            raise RuntimeError("no replica")
        return self.router.address()

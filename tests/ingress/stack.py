"""An ingress with a real router and a scripted engine, over real connections, without Ray."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from serving import wire
from serving.config import Settings
from serving.engine.request import Finish, FinishReason, RequestStats, TokenOutput
from serving.fleet import (
    ROUTER_CODEC,
    STREAM_CODEC,
    Cancel,
    EngineHello,
    GenerateCall,
    StreamHello,
    TokenFrame,
)
from serving.ingress.fleet import FleetClient
from serving.ingress.routes import Routes
from serving.ingress.service import GenerationService
from serving.router.router import Router
from serving.telemetry.metrics import IngressMetrics, new_registry
from serving.wire import Channel, ChannelServer
from tests.waiting import until

SECRET = b"a secret of the test"
HOST = "127.0.0.1"
END = 4092


class ScriptedEngine:
    """Says the ids of `script`, one frame each, then its end token; may fail or hang half-way."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.fail_after: int | None = None
        self.hang_after: int | None = None
        self.calls: list[GenerateCall] = []
        self.cancelled: list[str] = []
        self.streams: dict[str, Channel] = {}
        self._server = ChannelServer(SECRET, STREAM_CODEC, self._serve)
        self._to_router: Channel | None = None

    async def join(self, router: Router, limit: int = 4096) -> None:
        port = await self._server.start(HOST)
        self._to_router = await wire.connect(*router.address(), SECRET, ROUTER_CODEC)
        self._to_router.send(EngineHello("engine", HOST, port, "nano", limit, limit, []))

    async def leave(self) -> None:
        await self._server.close()
        if self._to_router is not None:
            self._to_router.abort()

    def options(self, session_id: str) -> Any:
        assert session_id == "engine"
        return self

    @property
    def generate(self) -> Any:
        return self

    def remote(self, call: GenerateCall) -> Awaitable[str | None]:
        return self._generate(call)

    async def _generate(self, call: GenerateCall) -> str | None:
        self.calls.append(call)
        stats = RequestStats(len(call.prompt) // 4, cached_tokens=0)
        script = [*self.script, END] if END in call.stop_token_ids else self.script * 100
        for position, token in enumerate(script[: call.max_tokens]):
            if position == self.fail_after:
                failure = Finish(call.request_id, FinishReason.ERROR, "the row was not a number")
                self._send(call, TokenFrame(ended=[failure]))
                return None
            if position == self.hang_after:
                await asyncio.Event().wait()
            stats.generated_tokens += 1
            output = TokenOutput(call.request_id, token, -0.5, [(token, -0.5), (7, -1.5)])
            if token == END:
                output.finish, output.stats = FinishReason.STOP, stats
            elif position == call.max_tokens - 1:
                output.finish, output.stats = FinishReason.LENGTH, stats
            self._send(call, TokenFrame(tokens=[output]))
            await asyncio.sleep(0)
        return None

    def _send(self, call: GenerateCall, frame: TokenFrame) -> None:
        self.streams[call.ingress_id].send(frame)

    async def _serve(self, channel: Channel) -> None:
        hello = await channel.receive()
        assert isinstance(hello, StreamHello)
        self.streams[hello.ingress_id] = channel
        channel.send(hello)
        while True:
            message = await channel.receive()
            assert isinstance(message, Cancel)
            self.cancelled.append(message.request_id)


class RouterHandle:
    """What Serve's handle to the router does for an ingress."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.address = self

    async def remote(self) -> tuple[str, int]:
        return self._router.address()


class Stack:
    """The parts, and a client of them."""

    def __init__(
        self, router: Router, engine: ScriptedEngine, fleet: FleetClient, http: httpx.AsyncClient
    ) -> None:
        self.router = router
        self.engine = engine
        self.fleet = fleet
        self.http = http

    async def quiet(self) -> None:
        """Waits until no lease is held and no inbox is open."""
        await until(lambda: self.router.status()["leases"] == 0)
        assert not self.fleet._inboxes
        assert not self.fleet._pending


@asynccontextmanager
async def stack(
    tmp_path: Path, script: list[int], engine_joins: bool = True, **ingress: Any
) -> AsyncIterator[Stack]:
    settings = Settings.model_validate(
        {
            "internal_host": HOST,
            "ingress": ingress,
            "router": {"queue_timeout_s": 2},
            "telemetry": {"targets_directory": tmp_path / "targets", "log_level": "WARNING"},
        }
    )
    router = Router.__new__(Router)
    await router.__init__(settings, SECRET)  # type: ignore[misc]  # as Serve does
    engine = ScriptedEngine(script)
    metrics = IngressMetrics(new_registry())
    fleet = FleetClient(RouterHandle(router), SECRET, "ingress", f"{HOST}:1")
    service = GenerationService(settings, fleet, engine, metrics)
    routes = Routes(settings, service, fleet, metrics)
    if engine_joins:
        await engine.join(router)
        await until(lambda: fleet.ready)
    transport = httpx.ASGITransport(routes.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        try:
            yield Stack(router, engine, fleet, http)
        finally:
            await fleet.close()
            await engine.leave()
            await routes.close()
            service.close()
            await router.__del__()

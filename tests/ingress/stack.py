"""An ingress with a real router and a scripted engine, over real connections, without Ray."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from serving import wire
from serving.config import Settings
from serving.engine.request import Finish, FinishReason, PromptScores, RequestStats, TokenOutput
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
from tests.router.local import HOST, SECRET, LocalRouter, RouterHandle, new_router
from tests.waiting import until

END = 4092


class Response:
    """What a Serve handle returns: the call goes on when nobody awaits it, until `cancel`."""

    def __init__(self, call: Coroutine[Any, Any, str | None]) -> None:
        self._task = asyncio.create_task(call)

    def __await__(self) -> Generator[Any, None, str | None]:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


class ScriptedEngine:
    """Says the ids of `script`, one frame each, then its end token; may fail or hang half-way."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.fail_after: int | None = None
        self.fail_only = ""  # how the id of a request ends that is to fail
        self.hang_after: int | None = None
        self.calls: list[GenerateCall] = []
        self.running = 0
        self.cancelled: list[str] = []
        self.streams: dict[str, Channel] = {}
        self._server = ChannelServer(SECRET, STREAM_CODEC, self._serve)
        self._to_router: Channel | None = None

    async def join(self, router: Router, tokens: int) -> None:
        port = await self._server.start(HOST)
        self._to_router = await wire.connect(*router.address(), SECRET, ROUTER_CODEC)
        self._to_router.send(EngineHello("engine", HOST, port, "nano", tokens, tokens, []))

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

    def remote(self, call: GenerateCall) -> "Response":
        return Response(self._generate(call))

    async def _generate(self, call: GenerateCall) -> str | None:
        self.calls.append(call)
        self.running += 1
        try:
            await self._speak(call)
        finally:
            self.running -= 1
        return None

    async def _speak(self, call: GenerateCall) -> None:
        stats = RequestStats(len(call.prompt) // 4, cached_tokens=0)
        if call.sampling.prompt_logprobs is not None:
            self._score(call)
        if call.max_tokens == 0:
            finish = Finish(call.request_id, FinishReason.LENGTH, stats=stats)
            self._send(call, TokenFrame(ended=[finish]))
        script = [*self.script, END] if END in call.stop_token_ids else self.script * 100
        for position, token in enumerate(script[: call.max_tokens]):
            if position == self.fail_after and call.request_id.endswith(self.fail_only):
                failure = Finish(call.request_id, FinishReason.ERROR, "the row was not a number")
                self._send(call, TokenFrame(ended=[failure]))
                return
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

    def _score(self, call: GenerateCall) -> None:
        """Prompt scores, the position being the score, in two frames."""
        count = len(call.request().prompt)
        for places in (range(1, count // 2), range(max(1, count // 2), count)):
            values = [-float(place) for place in places]
            scores = PromptScores(call.request_id, places.start, values, [[] for _ in values])
            self._send(call, TokenFrame(scores=[scores]))

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


class Stack:
    """The parts, and a client of them."""

    def __init__(
        self,
        router: LocalRouter,
        engine: ScriptedEngine,
        fleet: FleetClient,
        service: GenerationService,
        registry: CollectorRegistry,
        app: FastAPI,
        http: httpx.AsyncClient,
    ) -> None:
        self.router = router
        self.engine = engine
        self.fleet = fleet
        self.service = service
        self.registry = registry
        self.app = app
        self.http = http

    async def quiet(self) -> None:
        """Waits until no lease is held, no call runs and no inbox is open."""
        await until(lambda: self.router.status()["leases"] == self.engine.running == 0)
        assert not self.fleet._inboxes
        assert not self.fleet._pending


@asynccontextmanager
async def stack(
    script: list[int],
    engine_joins: bool = True,
    engine_tokens: int = 4096,
    model: dict[str, Any] | None = None,
    **ingress: Any,
) -> AsyncIterator[Stack]:
    settings = Settings.model_validate(
        {
            "internal_host": HOST,
            "model": model or {},
            "ingress": ingress,
            "router": {"queue_timeout_s": 2},
        }
    )
    router = await new_router()
    engine = ScriptedEngine(script)
    registry = new_registry()
    metrics = IngressMetrics(registry)
    fleet = FleetClient(RouterHandle(router), SECRET, "ingress", f"{HOST}:1", settings)
    service = GenerationService(settings, fleet, engine, metrics)
    routes = Routes(settings, service, fleet, metrics)
    if engine_joins:
        await engine.join(router, engine_tokens)
        await until(lambda: fleet.ready)
    app = routes.app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        try:
            yield Stack(router, engine, fleet, service, registry, app, http)
        finally:
            await fleet.close()
            await engine.leave()
            await routes.close()
            service.close()
            await router.close()

"""An ingress with a real router and scripted engines, over real connections, without Ray."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from serving import wire
from serving.config import Settings
from serving.engine.request import (
    EngineStats,
    Finish,
    FinishReason,
    PromptScores,
    RequestStats,
    TokenOutput,
)
from serving.fleet import (
    BEAT_S,
    ROUTER_CODEC,
    STREAM_CODEC,
    Cancel,
    Condition,
    EngineBeat,
    EngineHello,
    EngineReport,
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
_IDLE = EngineStats(0, 0, 64, [], 0, 0, 0)


class Response:
    """What a Serve handle returns: the call goes on when nobody awaits it, until `cancel`."""

    def __init__(self, call: Coroutine[Any, Any, str | None]) -> None:
        self._task = asyncio.create_task(call)

    def __await__(self) -> Generator[Any, None, str | None]:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


class ScriptedEngine:
    """Says the ids of `script`, one frame each, then its end token; may fail, hang or die half-way.

    What a request brings along from an earlier engine is not said again.
    """

    def __init__(self, script: list[int], name: str = "engine") -> None:
        self.script = script
        self.name = name
        self.condition = Condition.SERVING
        self.cached_tokens = 0
        self.awake = asyncio.Event()  # cleared, it says nothing, as if it was stopped
        self.awake.set()
        self.hung = 0  # how often it has
        self.fail_after: int | None = None
        self.fail_only = ""  # how the id of a request ends that is to fail
        self.hang_after: int | None = None
        self.calls: list[GenerateCall] = []
        self.running = 0
        self.cancelled: list[str] = []
        self.streams: dict[str, Channel] = {}
        self._server = ChannelServer(SECRET, STREAM_CODEC, self._serve)
        self._to_router: Channel | None = None
        self._beating: asyncio.Task[None] | None = None
        self._dead = asyncio.Event()

    async def join(self, router: Router, tokens: int) -> None:
        port = await self._server.start(HOST)
        self._to_router = await wire.connect(*router.address(), SECRET, ROUTER_CODEC)
        self._to_router.send(EngineHello(self.name, HOST, port, "nano", tokens, tokens, []))
        self._beating = asyncio.create_task(self._beat())

    async def leave(self) -> None:
        """Closes its connections; calls that it has taken stay open."""
        if self._beating is not None:
            self._beating.cancel()
        await self._server.close()
        if self._to_router is not None:
            self._to_router.abort()

    async def die(self) -> None:
        """As a process does: calls fail, too."""
        self._dead.set()
        await self.leave()

    def say(self, request_id: str, token: int) -> None:
        """A token to every ingress, whether or not it was asked for."""
        for channel in self.streams.values():
            channel.send(TokenFrame(tokens=[TokenOutput(request_id, token)]))

    def move(self, call: GenerateCall) -> None:
        """Asks for a request to be continued elsewhere."""
        moved = Finish(call.request_id, FinishReason.MOVED, "draining")
        self.streams[call.ingress_id].send(TokenFrame(ended=[moved]))

    def turn(self, condition: Condition) -> None:
        self.condition = condition
        self.tell()

    async def _beat(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(BEAT_S)

    def tell(self) -> None:
        """Its beat, to router and ingresses."""
        if not self.awake.is_set():
            return
        with contextlib.suppress(wire.WireError):
            if self._to_router is not None:
                self._to_router.send(EngineReport(_IDLE, self.condition))
            for channel in self.streams.values():
                channel.send(EngineBeat(self.condition))

    async def _generate(self, call: GenerateCall) -> str | None:
        self.calls.append(call)
        self.running += 1
        speaking = asyncio.ensure_future(self._speak(call))
        dying = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait((speaking, dying), return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise RuntimeError("the actor died")
            return await speaking
        finally:
            speaking.cancel()
            dying.cancel()
            self.running -= 1

    async def _speak(self, call: GenerateCall) -> None:
        stats = RequestStats(len(call.prompt) // 4 - call.generated, self.cached_tokens)
        if call.sampling.prompt_logprobs is not None:
            self._score(call)
        if call.max_tokens == 0:
            finish = Finish(call.request_id, FinishReason.LENGTH, stats=stats)
            self._send(call, TokenFrame(ended=[finish]))
        script = [*self.script, END] if END in call.stop_token_ids else self.script * 100
        first, end = call.generated, call.generated + call.max_tokens
        for position, token in enumerate(script[first:end], first):
            if position == self.fail_after and call.request_id.endswith(self.fail_only):
                failure = Finish(call.request_id, FinishReason.ERROR, "the row was not a number")
                self._send(call, TokenFrame(ended=[failure]))
                return
            if position == self.hang_after:
                self.hung += 1
                await asyncio.Event().wait()
            await self.awake.wait()
            stats.generated_tokens += 1
            output = TokenOutput(call.request_id, token, -0.5, [(token, -0.5), (7, -1.5)])
            if token == END:
                output.finish, output.stats = FinishReason.STOP, stats
            elif position == end - 1:
                output.finish, output.stats = FinishReason.LENGTH, stats
            elif position == first:
                output.stats = stats
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
        channel.send(EngineBeat(self.condition))
        while True:
            message = await channel.receive()
            assert isinstance(message, Cancel)
            self.cancelled.append(message.request_id)


class EngineHandle:
    """What Serve's handle to the engines does: a call goes to the replica that its lease names."""

    def __init__(self, engines: dict[str, ScriptedEngine]) -> None:
        self._engines = engines

    def options(self, session_id: str) -> "EngineHandle":
        if session_id not in self._engines:
            raise RuntimeError("no such replica")
        return EngineHandle({"": self._engines[session_id]})

    @property
    def generate(self) -> "EngineHandle":
        return self

    def remote(self, call: GenerateCall) -> Response:
        return Response(self._engines[""]._generate(call))


class Stack:
    """The parts, and a client of them."""

    def __init__(
        self,
        router: LocalRouter,
        engines: dict[str, ScriptedEngine],
        fleet: FleetClient,
        service: GenerationService,
        registry: CollectorRegistry,
        app: FastAPI,
        http: httpx.AsyncClient,
    ) -> None:
        self.router = router
        self.engines = engines
        self.engine = next(iter(engines.values()))
        self.fleet = fleet
        self.service = service
        self.registry = registry
        self.app = app
        self.http = http

    async def quiet(self) -> None:
        """Waits until no lease is held, no call runs and no inbox is open."""
        await until(lambda: self.router.status()["leases"] == 0)
        await until(lambda: not any(engine.running for engine in self.engines.values()))
        assert not self.fleet._inboxes
        assert not self.fleet._pending


@asynccontextmanager
async def stack(
    script: list[int],
    engine_joins: bool = True,
    engine_tokens: int = 4096,
    model: dict[str, Any] | None = None,
    engines: tuple[str, ...] = ("engine",),
    queue_timeout_s: float = 60.0,
    **ingress: Any,
) -> AsyncIterator[Stack]:
    settings = Settings.model_validate(
        {
            "internal_host": HOST,
            "model": model or {},
            "ingress": ingress,
            "router": {"queue_timeout_s": queue_timeout_s},
        }
    )
    router = await new_router()
    scripted = {name: ScriptedEngine(script, name) for name in engines}
    registry = new_registry()
    metrics = IngressMetrics(registry)
    fleet = FleetClient(RouterHandle(router), SECRET, "ingress", f"{HOST}:1", settings)
    service = GenerationService(settings, fleet, EngineHandle(scripted), metrics)
    routes = Routes(settings, service, fleet, metrics)
    if engine_joins:
        for engine in scripted.values():
            await engine.join(router, engine_tokens)
        await until(lambda: fleet.serving == len(scripted))
    app = routes.app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        try:
            yield Stack(router, scripted, fleet, service, registry, app, http)
        finally:
            await fleet.close()
            for engine in scripted.values():
                await engine.leave()
            await routes.close()
            service.close()
            await router.close()

"""The ingress's side of the fleet: leases from the router, token streams from the engines.

One TCP connection to every engine carries the tokens of all this ingress's requests there. The
ingress remembers the fleet that the router last told it of, so that it can choose an engine by
itself while the router is away. Whoever finds no engine at all waits for one, within its time.
"""

import asyncio
from dataclasses import replace
from typing import Any

from serving.api.errors import ApiError
from serving.config import Settings
from serving.fleet import (
    BEAT_S,
    Condition,
    Fleet,
    IngressHello,
    LeaseGrant,
    LeaseHeld,
    LeaseRefusal,
    LeaseRelease,
    LeaseRequest,
    TokenFrame,
)
from serving.ingress.engine_stream import EngineStream
from serving.ingress.inbox import Inbox, Inboxes
from serving.router.link import RouterLink
from serving.telemetry.logs import get_logger

log = get_logger("fleet")
_GRACE_S = 0.5  # the router's own refusal of a late request comes first
_RETRY_S = 0.05  # before another engine is asked for
_GIVE_UP = 10  # times the silence that is taken for loss: then the connection is given up


class FleetClient:
    """Everything an ingress knows of router and engines."""

    def __init__(
        self, router: Any, secret: bytes, ingress_id: str, metrics_address: str, settings: Settings
    ) -> None:
        self.ingress_id = ingress_id
        self.metrics_addresses: list[str] = []
        self._secret = secret
        self._settings = settings
        self._silence_s = settings.router.silence_s
        self._streams: dict[str, EngineStream] = {}
        self._inboxes = Inboxes()
        self._pending: dict[str, tuple[LeaseRequest, asyncio.Future[str]]] = {}
        self._held: dict[str, LeaseHeld | None] = {}  # None: a place in the router's queue
        self._listed = 0  # engines that the router now connected has told of
        self._longest: int | None = None  # request that the fleet could hold when last seen
        self._known = asyncio.Event()  # that it is
        hello = IngressHello(ingress_id, metrics_address)
        self._link = RouterLink(
            router,
            secret,
            lambda: hello,
            self._from_router,
            self._router_lost,
            self._router_found,
            self._silence_s,
        )
        self._watching = asyncio.create_task(self._watch(), name="fleet-watch")

    @property
    def serving(self) -> int:
        """How many engines would take a request now."""
        return sum(map(self._serves, self._streams.values()))

    @property
    def ready(self) -> bool:
        """Whether a request would find an engine now."""
        return any(map(self._serves, self._streams.values()))

    @property
    def max_request_tokens(self) -> int | None:
        """Longest prompt + output that some engine can hold, or could while there was one;
        None before the first."""
        return self._longest

    async def longest_request(self, timeout_s: float) -> int:
        """`max_request_tokens`, once it is known.

        Raises:
            ApiError: 503, it is not known in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            message = "No engine is ready to serve the model yet."
            raise ApiError(503, message, retry_after_s=2) from None
        assert self._longest is not None
        return self._longest

    def open(self, request_id: str) -> Inbox:
        """An inbox must be open before the request is sent to an engine."""
        return self._inboxes.open(request_id)

    async def acquire(self, request: LeaseRequest) -> str:
        """The engine that may run the request; waits in the router's queue.

        Raises:
            ApiError: 400 too long for any engine, 429 queue full, 503 no engine in time.
        """
        full = self._blind and len(self._pending) > self._settings.router.queue_limit
        if full and not request.continued:
            raise ApiError(429, "The server's queue is full; try again later.", retry_after_s=1)
        self._held[request.request_id] = None
        try:
            async with asyncio.timeout(request.deadline_s + _GRACE_S):
                while True:
                    engine_id = await self._leased(request)
                    self._held[request.request_id] = LeaseHeld(request, engine_id)
                    stream = await self._opened(engine_id)
                    if stream is not None:
                        break
                    request = replace(request, avoid=engine_id)
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            message = "No engine became free in time."
            raise ApiError(503, message, retry_after_s=1) from None
        stream.requests.add(request.request_id)
        return engine_id

    def close_request(self, request_id: str, engine_id: str | None, finished: bool) -> None:
        """Ends all that was held for a request; cancels it unless it has finished."""
        self._inboxes.pop(request_id, None)
        for stream in self._streams.values():
            stream.requests.discard(request_id)
        if not finished and engine_id in self._streams:
            self._streams[engine_id].cancel(request_id)
        self._release(request_id)

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._link.close()
        for stream in list(self._streams.values()):
            await stream.close()

    def tick(self) -> None:
        """Once a beat: looks which engines are silent, and which clients do not read.

        Counts its own beats and not the clock: a process that was held up itself has not yet
        looked at what has come meanwhile.
        """
        for stream in list(self._streams.values()):
            stream.missed += 1
            under_repair = stream.condition is Condition.REPAIRING
            stream.repairing = stream.repairing + 1 if under_repair else 0
            if stream.requests and self.ready:
                self._move_on(stream)
            if stream.missed * BEAT_S > _GIVE_UP * self._silence_s:
                stream.abort()
        self._place_pending()
        most = self._settings.ingress.max_unread_tokens
        for request_id in self._inboxes.stalled(most):
            self._end_stalled(request_id)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self.tick()

    def _move_on(self, stream: EngineStream) -> None:
        """Another engine serves: nobody need wait for one that is silent or long under repair."""
        if self._silent(stream):
            self._inboxes.lose(stream.requests, "silent")
        elif stream.repairing * BEAT_S > self._settings.engine.move_after_s:
            self._inboxes.lose(stream.requests, "repair")

    def _silent(self, stream: EngineStream) -> bool:
        return stream.missed * BEAT_S > self._silence_s

    def _serves(self, stream: EngineStream) -> bool:
        serving = stream.connected and stream.condition is Condition.SERVING
        return serving and not self._silent(stream)

    def _end_stalled(self, request_id: str) -> None:
        """A client that does not read costs itself its request, and nobody else memory."""
        log.event("WARNING", "client.stalled", request=request_id)
        self._inboxes[request_id].fail(ApiError(408, "The client does not read its answer."))
        held = self._held.get(request_id)
        engine_id = None if held is None else held.engine_id
        self.close_request(request_id, engine_id, finished=False)

    def _release(self, request_id: str) -> None:
        if request_id in self._held:
            del self._held[request_id]
            self._link.tell(LeaseRelease(request_id))

    async def _leased(self, request: LeaseRequest) -> str:
        """The router's word, or a choice of our own, which may name an engine that is gone."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = request, future
        try:
            self._ask(request, future)
            return await future
        finally:
            del self._pending[request.request_id]

    async def _opened(self, engine_id: str) -> EngineStream | None:
        """The stream of a leased engine; None if it does not come to be."""
        stream = self._streams.get(engine_id)
        try:
            async with asyncio.timeout(self._silence_s):
                if stream is not None and await stream.opened():
                    return stream
        except TimeoutError:
            log.event("WARNING", "stream.unreachable", engine=engine_id)
        return None

    def _ask(self, request: LeaseRequest, future: "asyncio.Future[str]") -> None:
        if not (self._blind and self._place(request, future)):
            self._link.tell(request)

    @property
    def _blind(self) -> bool:
        """There is no router, or one that does not know of any engine yet."""
        return not (self._link.connected and self._listed)

    def _from_router(self, message: object) -> None:
        match message:
            case Fleet():
                self._update(message)
            case LeaseGrant():
                pending = self._pending.get(message.request_id)
                if pending is not None and not pending[1].done():
                    pending[1].set_result(message.engine_id)
            case LeaseRefusal():
                pending = self._pending.get(message.request_id)
                if pending is not None and not pending[1].done():
                    retry = message.retry_after_s if message.status != 400 else None
                    error = ApiError(message.status, message.message, retry_after_s=retry)
                    pending[1].set_exception(error)

    def _router_found(self) -> None:
        """A router starts with no leases: it is told of those that there are, and asked again
        for those that its predecessor did not grant."""
        for held in self._held.values():
            if held is not None:
                self._link.tell(held)
        for request, future in list(self._pending.values()):
            if not future.done():
                self._ask(request, future)

    def _router_lost(self) -> None:
        self._listed = 0
        self._place_pending()

    def _place_pending(self) -> None:
        """Whoever waits for the word of a router that cannot give it is placed by own choice."""
        if self._pending and self._blind:
            for request, future in list(self._pending.values()):
                if not future.done():
                    self._place(request, future)

    def _place(self, request: LeaseRequest, future: "asyncio.Future[str]") -> bool:
        """Chooses the engine with the fewest requests of ours; False if there is none."""
        streams = self._candidates()
        others = [s for s in streams if s.engine.engine_id != request.avoid]
        best = min(others or streams, key=lambda stream: len(stream.requests), default=None)
        if best is None:
            return False
        best.requests.add(request.request_id)
        future.set_result(best.engine.engine_id)
        self._link.tell(LeaseHeld(request, best.engine.engine_id))
        return True

    def _candidates(self) -> list[EngineStream]:
        """As the router chooses: who serves; who drains only if nobody could serve soon."""
        serving = [stream for stream in self._streams.values() if self._serves(stream)]
        open_now = [s for s in self._streams.values() if s.connected and not self._silent(s)]
        if serving or any(s.condition is Condition.REPAIRING for s in open_now):
            return serving
        return [stream for stream in open_now if stream.condition is Condition.DRAINING]

    def _update(self, fleet: Fleet) -> None:
        self.metrics_addresses = fleet.metrics_addresses
        self._listed = len(fleet.engines)
        known = {engine.engine_id: engine for engine in fleet.engines}
        for stream in list(self._streams.values()):
            stream.listed = stream.engine.engine_id in known
            if not (stream.listed or stream.connected):
                self._forget(stream)
        for engine_id, engine in known.items():
            if engine_id not in self._streams:
                self._streams[engine_id] = EngineStream(
                    engine,
                    self.ingress_id,
                    self._secret,
                    self._deliver,
                    self._place_pending,
                    self._stream_lost,
                    self._forget,
                )
        if self._streams:
            self._longest = max(s.engine.max_request_tokens for s in self._streams.values())
            self._known.set()

    def _forget(self, stream: EngineStream) -> None:
        if self._streams.get(stream.engine.engine_id) is stream:
            del self._streams[stream.engine.engine_id]
        stream.stop()

    def _stream_lost(self, request_ids: set[str]) -> None:
        self._inboxes.lose(request_ids, "lost")

    def _deliver(self, frame: TokenFrame) -> None:
        for request_id in self._inboxes.deliver(frame):
            self._release(request_id)

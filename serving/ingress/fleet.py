"""The ingress's side of the fleet: leases from the router, token streams from the engines.

One TCP connection to every engine carries the tokens of all this ingress's requests there. The
ingress remembers the fleet that the router last told it of, so that it can choose an engine by
itself while the router is away.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.api.errors import ApiError
from serving.engine.request import Finish, PromptScores, TokenOutput
from serving.fleet import (
    STREAM_CODEC,
    Cancel,
    EngineHello,
    Fleet,
    IngressHello,
    LeaseGrant,
    LeaseRefusal,
    LeaseRelease,
    LeaseRequest,
    StreamHello,
    TokenFrame,
)
from serving.router.link import RouterLink
from serving.telemetry.logs import get_logger
from serving.wire import Channel, WireError, connect

log = get_logger("fleet")
_RECONNECT_S = 0.2


@dataclass(slots=True)
class Inbox:
    """What has arrived for one request and not been read yet."""

    tokens: list[TokenOutput] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    ended: Finish | None = None
    failure: ApiError | None = None
    _reader: "asyncio.Future[None] | None" = None  # what the one reader waits for

    def push(self, token: TokenOutput) -> None:
        self.tokens.append(token)
        self._wake()

    def push_scores(self, scores: PromptScores) -> None:
        self.scores.append(scores)
        self._wake()

    def end(self, finish: Finish) -> None:
        self.ended = finish
        self._wake()

    def fail(self, failure: ApiError) -> None:
        """The request cannot go on; tokens that came before are still delivered."""
        self.failure = self.failure or failure
        self._wake()

    async def read_scores(self, count: int) -> list[PromptScores]:
        """The prompt's scores, once all `count` tokens of it have one.

        Raises:
            ApiError: the request failed first.
        """
        while sum(len(scores.logprobs) for scores in self.scores) < count:
            if self.failure is not None:
                raise self.failure
            if self.ended is not None:
                raise ApiError(500, self.ended.message or "The generation ended early.")
            await self._wait()
        return self.scores

    async def read(self) -> list[TokenOutput]:
        """Every new token; empty when the request has ended without another one.

        Raises:
            ApiError: the request failed.
        """
        while not self.tokens:
            if self.failure is not None:
                raise self.failure
            if self.ended is not None:
                return []
            await self._wait()
        tokens, self.tokens = self.tokens, []
        return tokens

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait(self) -> None:
        """Until something comes. A bare future: an event costs three times as much a token."""
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader


class EngineStream:
    """The connection to one engine, kept up for as long as the engine is in the fleet.

    A connection outlives the engine's place in the fleet: a router that has just started knows
    no engine yet, and an engine that is leaving finishes what it has.

    Args:
        deliver: called with what the engine sends.
        lost: called with the requests that a lost connection carried.
        ended: called when neither a connection nor a place in the fleet is left.
    """

    def __init__(
        self,
        engine: EngineHello,
        ingress_id: str,
        secret: bytes,
        deliver: Callable[[TokenFrame], None],
        lost: Callable[[set[str]], None],
        ended: Callable[["EngineStream"], None],
    ) -> None:
        self.engine = engine
        self.listed = True  # has a place in the fleet
        self.requests: set[str] = set()  # this ingress's own, running there now
        self._ingress_id = ingress_id
        self._secret = secret
        self._deliver = deliver
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
            self._settled.set()
            while True:
                self._deliver(await channel.receive())
        except WireError:
            log.event("INFO", "stream.lost", engine=self.engine.engine_id)
        finally:
            self._settled.clear()
            self._channel = None
            channel.abort()
            self._lost(self.requests)  # the engine ends them too: it has nobody to tell


class FleetClient:
    """Everything an ingress knows of router and engines."""

    def __init__(self, router: Any, secret: bytes, ingress_id: str, metrics_address: str) -> None:
        self.ingress_id = ingress_id
        self.metrics_addresses: list[str] = []
        self._secret = secret
        self._streams: dict[str, EngineStream] = {}
        self._inboxes: dict[str, Inbox] = {}
        self._pending: dict[str, tuple[LeaseRequest, asyncio.Future[str]]] = {}
        self._held: set[str] = set()  # requests with a lease, or a place in the router's queue
        hello = IngressHello(ingress_id, metrics_address)
        self._link = RouterLink(router, secret, lambda: hello, self._from_router, self._router_lost)

    @property
    def ready(self) -> bool:
        """Whether a request would find an engine now."""
        return any(stream.connected for stream in self._streams.values())

    @property
    def max_request_tokens(self) -> int | None:
        """Longest prompt + output that some engine can hold; None while there is none."""
        limits = [s.engine.max_request_tokens for s in self._streams.values()]
        return max(limits, default=None)

    def open(self, request_id: str) -> Inbox:
        """An inbox must be open before the request is sent to an engine."""
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    async def acquire(self, request: LeaseRequest) -> str:
        """The engine that may run the request; waits in the router's queue.

        Raises:
            ApiError: 400 too long for any engine, 429 queue full, 503 no engine in time.
        """
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = (request, future)
        self._held.add(request.request_id)
        try:
            try:
                self._link.send(request)
            except WireError:
                self._grant_locally(request, future)
            engine_id = await future
            stream = await self._opened(engine_id, request.deadline_s)
            stream.requests.add(request.request_id)
            return engine_id
        finally:
            self._pending.pop(request.request_id, None)

    def close_request(self, request_id: str, engine_id: str | None, finished: bool) -> None:
        """Ends all that was held for a request; cancels it unless it has finished."""
        self._inboxes.pop(request_id, None)
        for stream in self._streams.values():
            stream.requests.discard(request_id)
        if not finished and engine_id in self._streams:
            self._streams[engine_id].cancel(request_id)
        self._release(request_id)

    async def close(self) -> None:
        await self._link.close()
        for stream in list(self._streams.values()):
            await stream.close()

    def _release(self, request_id: str) -> None:
        if request_id not in self._held:
            return
        self._held.discard(request_id)
        try:
            self._link.send(LeaseRelease(request_id))
        except WireError:
            return  # a new router starts with no leases

    async def _opened(self, engine_id: str, timeout_s: float) -> EngineStream:
        stream = self._streams.get(engine_id)
        try:
            async with asyncio.timeout(timeout_s):
                if stream is not None and await stream.opened():
                    return stream
        except TimeoutError:
            log.event("WARNING", "stream.unreachable", engine=engine_id)
        raise ApiError(503, "The engine became unreachable.", retry_after_s=1)

    def _from_router(self, message: object) -> None:
        match message:
            case Fleet():
                self._update(message)
            case LeaseGrant():
                self._resolve(message.request_id, message.engine_id)
            case LeaseRefusal():
                pending = self._pending.get(message.request_id)
                if pending is not None and not pending[1].done():
                    retry = message.retry_after_s if message.status != 400 else None
                    error = ApiError(message.status, message.message, retry_after_s=retry)
                    pending[1].set_exception(error)

    def _resolve(self, request_id: str, engine_id: str) -> None:
        pending = self._pending.get(request_id)
        if pending is not None and not pending[1].done():
            pending[1].set_result(engine_id)

    def _router_lost(self) -> None:
        """Whoever waited for the router's word is placed by local choice."""
        for request, future in list(self._pending.values()):
            if not future.done():
                self._grant_locally(request, future)

    def _grant_locally(self, request: LeaseRequest, future: "asyncio.Future[str]") -> None:
        open_streams = [stream for stream in self._streams.values() if stream.connected]
        if not open_streams:
            future.set_exception(
                ApiError(503, "No engine is ready to serve the model yet.", retry_after_s=2)
            )
            return
        best = min(open_streams, key=lambda stream: len(stream.requests))
        best.requests.add(request.request_id)
        future.set_result(best.engine.engine_id)

    def _update(self, fleet: Fleet) -> None:
        self.metrics_addresses = fleet.metrics_addresses
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
                    self._stream_lost,
                    self._forget,
                )

    def _forget(self, stream: EngineStream) -> None:
        if self._streams.get(stream.engine.engine_id) is stream:
            del self._streams[stream.engine.engine_id]
        stream.stop()

    def _stream_lost(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            inbox = self._inboxes.get(request_id)
            if inbox is not None and inbox.ended is None:
                inbox.fail(ApiError(500, "The engine was lost while it served this request."))

    def _deliver(self, frame: TokenFrame) -> None:
        for scores in frame.scores:
            inbox = self._inboxes.get(scores.request_id)
            if inbox is not None:
                inbox.push_scores(scores)
        for token in frame.tokens:
            inbox = self._inboxes.get(token.request_id)
            if inbox is not None:
                inbox.push(token)
            if token.finish is not None:
                self._release(token.request_id)
        for finish in frame.ended:
            self._release(finish.request_id)
            inbox = self._inboxes.get(finish.request_id)
            if inbox is not None:
                inbox.end(finish)

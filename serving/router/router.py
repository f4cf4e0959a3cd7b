"""The router: the one place with a view of the whole fleet.

It holds connections, the lease book and the queue, and nothing that could not be rebuilt: when
it dies, engines and ingresses connect to its successor and tell it what they are.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

from serving.config import Settings
from serving.fleet import (
    BEAT_S,
    ROUTER_CODEC,
    EngineHello,
    EngineLoading,
    EngineReport,
    Fleet,
    IngressHello,
    LeaseGrant,
    LeaseHeld,
    LeaseRefusal,
    LeaseRelease,
    LeaseRequest,
    RouterBeat,
)
from serving.node import node_address
from serving.router.fair_queue import FairQueue, Waiting
from serving.router.leases import EngineView, LeaseBook, NeverFits
from serving.router.prefix_index import PrefixIndex
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import get_logger, setup_logging
from serving.telemetry.metrics import RouterMetrics, count_tasks, new_registry
from serving.wire import Channel, ChannelServer, WireError

log = get_logger("router")
_RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Ingress:
    hello: IngressHello
    channel: Channel


class Router:
    """Serve deployment with one replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, secret: bytes
    ) -> None:
        setup_logging(settings.telemetry.log_level)
        self._settings = settings.router
        self._host = node_address(settings)
        registry = new_registry()
        count_tasks(registry, asyncio.get_running_loop())
        self._metrics = RouterMetrics(registry)
        self._exporter = MetricsExporter(
            registry, self._host, settings.telemetry.targets_directory, {"process": "router"}
        )
        self._book = LeaseBook(
            PrefixIndex(self._settings.prefix_entries), self._settings.expected_output_tokens
        )
        self._queue = FairQueue(self._settings.queue_limit)
        self._channels: set[Channel] = set()  # of all engines and ingresses
        self._ingresses: dict[str, _Ingress] = {}
        self._loading: dict[str, EngineLoading] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._server = ChannelServer(secret, ROUTER_CODEC, self._serve)
        self._port = await self._server.start(self._host)
        self._beating = asyncio.create_task(self._beat(), name="router-beat")

    def address(self) -> tuple[str, int]:
        """Where engines and ingresses connect."""
        return self._host, self._port

    def status(self) -> dict[str, Any]:
        """For people and for `expertline up`: who is here, and how far loading has come."""
        return {
            "engines": [view.hello.engine_id for view in self._book.engines.values()],
            "cache_tokens": sum(v.hello.total_tokens for v in self._book.engines.values()),
            "ingresses": len(self._ingresses),
            "leases": len(self._book.leases),
            "queued": len(self._queue),
            "loading": {key: [x.bytes_done, x.bytes_total] for key, x in self._loading.items()},
        }

    def check_health(self) -> None:
        """Alive if it answers."""

    async def __del__(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        await self._server.close()
        self._exporter.close()

    async def _serve(self, channel: Channel) -> None:
        self._channels.add(channel)
        try:
            match await channel.receive():
                case EngineHello() as hello:
                    await self._serve_engine(hello, channel)
                case EngineLoading() as loading:
                    await self._serve_loading(loading, channel)
                case IngressHello() as hello:
                    await self._serve_ingress(hello, channel)
        finally:
            self._channels.discard(channel)

    async def _beat(self) -> None:
        """Says that the router is there, and looks who else is: in beats and not by the clock,
        for what came while this process was held up has not been read yet."""
        frame = ROUTER_CODEC.frame(RouterBeat())
        while True:
            await asyncio.sleep(BEAT_S)
            for channel in self._channels:
                with contextlib.suppress(WireError):  # its reader sees the end as well
                    channel.send_frame(frame)
            for view in self._book.engines.values():
                view.missed += 1
                if not view.silent and view.missed > self._settings.silence_s / BEAT_S:
                    view.silent = True
                    log.event("WARNING", "engine.silent", engine=view.hello.engine_id)

    async def _serve_loading(self, loading: EngineLoading, channel: Channel) -> None:
        """An engine reads its weights; on the same connection it says hello when it is done."""
        engine_id, message = loading.engine_id, loading
        try:
            while isinstance(message, EngineLoading):
                self._loading[engine_id] = message
                self._publish()
                message = await channel.receive()
        finally:
            self._loading.pop(engine_id, None)
            self._publish()
        if isinstance(message, EngineHello):
            await self._serve_engine(message, channel)

    async def _serve_engine(self, hello: EngineHello, channel: Channel) -> None:
        view = self._book.join(hello)
        self._fleet_changed()
        log.event("INFO", "engine.joined", engine=hello.engine_id, tokens=hello.total_tokens)
        try:
            while True:
                report = await channel.receive()
                if isinstance(report, EngineReport):
                    self._take_report(view, report)
                elif isinstance(report, EngineHello):  # it has other ranks than before
                    view.hello = report
                    self._fleet_changed()
        finally:
            self._book.leave(view)
            self._fleet_changed()
            log.event("INFO", "engine.left", engine=hello.engine_id)

    def _take_report(self, view: EngineView, report: EngineReport) -> None:
        before = view.condition, view.silent
        view.stats, view.condition = report.stats, report.condition
        view.missed, view.silent = 0, False
        if (view.condition, view.silent) != before:
            log.event(
                "INFO",
                "engine.condition",
                engine=view.hello.engine_id,
                condition=str(view.condition),
            )
            self._grant()

    async def _serve_ingress(self, hello: IngressHello, channel: Channel) -> None:
        entry = self._ingresses[hello.ingress_id] = _Ingress(hello, channel)
        self._fleet_changed()
        try:
            while True:
                match await channel.receive():
                    case LeaseRequest() as request:
                        self._enqueue(request, hello.ingress_id)
                    case LeaseHeld() as held:
                        self._queue.drop(held.request.request_id)
                        self._book.hold(held.request, hello.ingress_id, held.engine_id)
                    case LeaseRelease() as release:
                        self._queue.drop(release.request_id)
                        self._book.release(release.request_id)
                        self._grant()
        finally:
            if self._ingresses.get(hello.ingress_id) is entry:  # it has not connected anew
                del self._ingresses[hello.ingress_id]
                for request_id in self._queue.of_ingress(hello.ingress_id):
                    self._queue.drop(request_id)
                self._book.release_ingress(hello.ingress_id)
                self._fleet_changed()

    def _enqueue(self, request: LeaseRequest, ingress_id: str) -> None:
        now = time.monotonic()
        wait = min(max(request.deadline_s, 0.0), self._settings.queue_timeout_s)
        waiting = Waiting(request, ingress_id, now, now + wait)
        self._queue.push(waiting)
        self._grant()
        if self._queue.overfull and not request.continued:
            self._queue.drop(request.request_id)
            self._refuse(waiting, 429, "the server's queue is full; try again later", "full")

    def _grant(self) -> None:
        """Gives leases in the queue's order for as long as there is room."""
        now = time.monotonic()
        while (head := self._queue.head()) is not None:
            try:
                lease = self._book.grant(head.request, head.ingress_id)
            except NeverFits as error:
                self._queue.take(head)
                self._refuse(head, 400, str(error), "too_long")
                continue
            if lease is None:
                break
            self._queue.take(head)
            self._metrics.granted(now - head.since)
            grant = LeaseGrant(head.request.request_id, lease.engine_id, lease.tokens)
            self._tell(head.ingress_id, grant)
        self._watch_deadlines()
        self._publish()

    def _watch_deadlines(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        deadline = self._queue.next_deadline()
        if deadline is not None:
            delay = max(0.0, deadline - time.monotonic())
            self._expiry = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        for waiting in self._queue.expired(time.monotonic()):
            self._refuse(waiting, 503, "no engine became free in time", "deadline")
        self._grant()

    def _refuse(self, waiting: Waiting, status: int, message: str, outcome: str) -> None:
        self._metrics.refused(outcome)
        refusal = LeaseRefusal(waiting.request.request_id, status, message, _RETRY_AFTER_S)
        self._tell(waiting.ingress_id, refusal)

    def _tell(self, ingress_id: str, message: object) -> None:
        try:
            self._ingresses[ingress_id].channel.send(message)
        except WireError:
            return  # its reader has seen the end as well and frees what it held

    def _fleet_changed(self) -> None:
        engines = [view.hello for view in self._book.engines.values()]
        addresses = [self._exporter.address]
        addresses += [ingress.hello.metrics_address for ingress in self._ingresses.values()]
        for engine in engines:
            addresses += engine.metrics_addresses
        frame = ROUTER_CODEC.frame(Fleet(engines, addresses))
        for ingress in self._ingresses.values():
            try:
                ingress.channel.send_frame(frame)
            except WireError:
                continue
        self._grant()

    def _publish(self) -> None:
        reserved = sum(view.reserved_tokens for view in self._book.engines.values())
        self._metrics.state(
            queued=len(self._queue),
            reserved_tokens=reserved,
            ready=sum(view.serving for view in self._book.engines.values()),
            loading=len(self._loading),
        )

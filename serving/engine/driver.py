"""The engine replica: a Serve deployment that owns a gang and runs the step loop over it.

Control only: no weights, no GPU. Requests come in as unary Serve calls that stay open until
their last token; tokens go out over one TCP stream per ingress, a frame per step.
"""

import asyncio
import gc
import math
import os
import secrets
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import placement_group_table

from serving.config import Settings
from serving.departure import Departure, Facts
from serving.engine.loop import EngineLoop, GangFailure
from serving.engine.request import RequestError
from serving.engine.scheduler import Scheduler
from serving.fleet import BEAT_S, Condition, EngineHello, EngineLoading, EngineReport, GenerateCall
from serving.gang.gang import Gang
from serving.gang.placement import RayLauncher
from serving.node import GangNodes, node_address, stopping
from serving.router.link import RouterLink
from serving.specs import engine_limits, gang_bounds, rank_specs
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import get_logger, setup_logging
from serving.telemetry.metrics import EngineMetrics, count_tasks, new_registry
from serving.telemetry.observer import StepObserver
from serving.token_streams import TokenStreams

log = get_logger("engine")
_REPORT_S = 0.1
_DEPARTURE_S = 0.1
_NODES_S = 1.0  # between two looks at the cluster's nodes


class Engine:
    """One replica of the model."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, secret: bytes, router: Any, gpus: bool
    ) -> None:
        setup_logging(settings.telemetry.log_level)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._settings = settings
        self._host = node_address(settings)
        registry = new_registry()
        count_tasks(registry, asyncio.get_running_loop())
        self._exporter = MetricsExporter(
            registry,
            self._host,
            settings.telemetry.targets_directory,
            {"process": "engine", "replica": self._id},
        )
        self._streams = TokenStreams(secret, lambda request_id: self._loop.cancel(request_id))
        self._departure = Departure(self._streams, settings.engine.drain_timeout_s, time.monotonic)
        self._hello: EngineHello | EngineLoading = EngineLoading(self._id, 0, 0)
        self._link = RouterLink(
            router, secret, lambda: self._hello, silence_s=settings.router.silence_s
        )
        self._gang = await self._start_gang(gpus)
        self._scheduler = Scheduler(engine_limits(settings, self._gang.pages))
        observer = StepObserver(EngineMetrics(registry), self._scheduler)
        self._loop = EngineLoop(
            self._scheduler,
            self._gang,
            self._streams.emit,
            time.monotonic,
            observer,
            self._repairing,
        )
        self._running = asyncio.create_task(self._run(), name="engine-loop")
        await self._join_fleet(await self._streams.start(self._host))
        self._reporting = asyncio.create_task(self._report(), name="engine-report")
        self._departing = asyncio.create_task(self._watch_departure(), name="engine-departure")
        gc.collect()
        gc.freeze()  # what a start leaves behind would only make every later pause longer

    async def generate(self, call: GenerateCall) -> str | None:
        """Runs a request to its end; its tokens go to the ingress's stream.

        Returns:
            None when it has ended, or why this engine can never serve it.
        """
        request = call.request()
        end = self._streams.open(request.id, call.ingress_id)
        try:
            self._loop.submit(request)
            await end
        except RequestError as error:
            return str(error)
        finally:
            if not end.done() or end.cancelled():  # the Serve call was cancelled
                self._loop.cancel(request.id)
            self._streams.forget(request.id)
        return None

    def drain(self, engine_id: str) -> bool:
        """Makes this engine leave if it is the one that is meant; says whether it is."""
        if engine_id == self._id:
            self._departure.ask()
        return engine_id == self._id

    def location(self) -> tuple[str, list[str]]:
        """This engine's id, and the ids of the nodes that its gang is on."""
        group = ray.util.get_current_placement_group()
        return self._id, sorted(set(placement_group_table(group)["bundles_to_node_id"].values()))

    def check_health(self) -> None:
        """Fails once nothing can be generated here any more.

        That is judged by the steps and not by whether anybody answers: the loop has ended, or
        nothing has come of what there is to do for longer than a step and a repair may take.
        """
        if self._running.done():
            raise RuntimeError("the step loop has ended")
        stalled_s, gang = self._loop.stalled_s, self._settings.gang
        if stalled_s > gang.step_timeout_s + gang.repair_timeout_s:
            raise RuntimeError(f"no step has finished for {stalled_s:.0f} s")

    async def __del__(self) -> None:
        tasks = (self._departing, self._reporting, self._running)
        await self._link.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._gang.stop()
        await self._streams.close()
        self._exporter.close()

    async def _start_gang(self, gpus: bool) -> Gang:
        settings = self._settings.gang
        group = ray.util.get_current_placement_group()
        assert group is not None, "the deployment has placement group bundles"
        launcher = RayLauncher(group, self._settings, gpus)
        secret = secrets.token_bytes(32)
        bounds = gang_bounds(self._settings)
        gang = Gang(launcher, secret, settings.stages, settings.expert_parallel, bounds)
        port = await gang.listen(self._host)
        specs = rank_specs(self._settings, self._host, port, "cuda" if gpus else "cpu")
        started = time.monotonic()
        await gang.start(specs, settings.start_timeout_s, self._loading)
        log.event("INFO", "gang.ready", ranks=len(specs), seconds=time.monotonic() - started)
        return gang

    def _loading(self, done: int, total: int) -> None:
        self._hello = EngineLoading(self._id, done, total)
        self._link.tell(self._hello)

    def _repairing(self, begins: bool) -> None:
        """A repair begins or has ended. A drain that began before or meanwhile goes on."""
        if begins and self._streams.condition is Condition.SERVING:
            self._streams.condition = Condition.REPAIRING
        elif not begins and self._streams.condition is Condition.REPAIRING:
            self._streams.condition = Condition.SERVING
        if not begins and isinstance(self._hello, EngineHello):
            self._hello.metrics_addresses = self._metrics_addresses()
            self._link.tell(self._hello)

    def _metrics_addresses(self) -> list[str]:
        return [self._exporter.address, *self._gang.metrics_addresses]

    async def _join_fleet(self, port: int) -> None:
        limits = self._scheduler.limits
        self._hello = EngineHello(
            engine_id=self._id,
            host=self._host,
            port=port,
            model=self._settings.model.served_name,
            total_tokens=limits.cache_tokens,
            max_request_tokens=limits.max_request_tokens,
            metrics_addresses=self._metrics_addresses(),
        )
        self._link.tell(self._hello)

    async def _run(self) -> None:
        """The step loop; losing the gang ends this process, and Serve starts another."""
        try:
            await self._loop.run()
        except GangFailure as error:
            log.event("ERROR", "gang.lost", reason=str(error))
            await self._streams.cut()
            os._exit(1)

    async def _report(self) -> None:
        """Keeps the router informed: news at once, and none for no longer than a beat."""
        last, told_at = None, 0.0
        while True:
            report = EngineReport(self._scheduler.stats(), self._streams.condition)
            due = report != last or time.monotonic() - told_at > BEAT_S
            if due and isinstance(self._hello, EngineHello):
                self._link.tell(report)
                last, told_at = report, time.monotonic()
            await asyncio.sleep(_REPORT_S)

    async def _watch_departure(self) -> None:
        """Leaves when it is time to; an engine that ends itself is replaced by Serve."""
        group = ray.util.get_current_placement_group()
        assert group is not None, "the deployment has placement group bundles"
        nodes, facts, asked_at = GangNodes(group), Facts(), -math.inf
        while not self._departure.advance(facts):
            await asyncio.sleep(_DEPARTURE_S)
            if time.monotonic() - asked_at >= _NODES_S:
                news = await asyncio.to_thread(nodes.draining, _NODES_S)
                asked_at = time.monotonic()
                if news is not None:
                    facts = Facts(own_node=nodes.own, gang_nodes=news[0], draining=news[1])
            facts = replace(facts, stopping=stopping())
        log.event("INFO", "engine.leaves", reason=self._departure.reason)
        await self._streams.cut()
        await self._gang.stop()
        os._exit(0)

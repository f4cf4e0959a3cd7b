"""The life of a rank: report to the engine, form the fabrics, load, then run steps for ever.

The same function serves a Ray actor and a plain process; it returns when the engine closes the
connection. Losing the engine is the end of the process: a rank without it has no use, and
whatever it is stuck in (a collective, a kernel) must not outlive it.

Losing a peer is not: the rank waits for the engine's word to gather, keeps its weights, and
forms its groups anew with whoever comes in the peer's place.
"""

import os
import time
from pathlib import Path

import torch

from model.config import CheckpointError
from serving.engine.plan import RankPlan
from serving.gang.building import build_worker
from serving.gang.fabric import FabricError
from serving.gang.inbox import Inbox
from serving.gang.messages import (
    GANG_CODEC,
    CacheSize,
    FormGang,
    Gather,
    GroupBroken,
    LoadProgress,
    RankFailed,
    RankHello,
    RankMeasured,
    RankOffer,
    RankReady,
    RankSpec,
)
from serving.gang.rendezvous import Rendezvous
from serving.gang.worker import Worker
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import new_registry
from serving.telemetry.rank_metrics import RankMetrics
from serving.wire import BlockingChannel, WireError

log = get_logger("rank")


def run_rank(spec: RankSpec, secret: bytes) -> None:
    """Runs one rank until its engine lets go of it.

    Raises:
        WireError: the engine cannot be reached at all.
    """
    torch.set_num_threads(spec.threads)
    registry = new_registry()
    exporter = MetricsExporter(
        registry, spec.host, Path(spec.targets_directory), {"process": "rank", "cell": spec.cell}
    )
    channel = BlockingChannel.connect(spec.engine_host, spec.engine_port, secret, GANG_CODEC)
    try:
        channel.send(RankHello(spec.stage, spec.rank, os.getpid(), exporter.address))
        _Resident(spec, channel, RankMetrics(registry, spec.stage, spec.rank)).live()
    except (CheckpointError, RuntimeError, OSError) as error:
        log.event("ERROR", "rank.failed", cell=spec.cell, error=type(error).__name__)
        text = str(error) or type(error).__name__
        user_error = isinstance(error, CheckpointError)
        channel.send(RankFailed(text.splitlines()[0][:500], user_error))
    except WireError:
        log.event("INFO", "rank.released", cell=spec.cell)
    finally:
        exporter.close()
        channel.close()


class _Resident:
    """Does what the engine says, one thing after another."""

    def __init__(self, spec: RankSpec, channel: BlockingChannel, metrics: RankMetrics) -> None:
        self._spec = spec
        self._channel = channel
        self._metrics = metrics
        self._inbox = Inbox(channel)
        self._generation = -1
        self._rendezvous = Rendezvous(spec)
        self._worker: Worker | None = None
        self._formed = False  # the groups are there and whole, as far as this rank knows

    def live(self) -> None:
        while True:
            message = self._inbox.get()
            try:
                if isinstance(message, RankPlan):
                    self._step(message)
                elif isinstance(message, Gather):
                    self._gather(message.generation)
                elif isinstance(message, FormGang):
                    self._form(message.offers)
            except FabricError as error:
                self._formed = False
                log.event("WARNING", "rank.group_broken", cell=self._spec.cell, reason=str(error))
                self._channel.send(GroupBroken(self._generation, str(error)[:500]))

    def _step(self, plan: RankPlan) -> None:
        if self._worker is None or not self._formed:
            return  # the engine has been told
        result = self._worker.step(plan)
        self._metrics.step(result)
        self._channel.send(result)

    def _gather(self, generation: int) -> None:
        self._formed = False
        self._generation = generation
        self._rendezvous.close()
        self._rendezvous = Rendezvous(self._spec)
        self._channel.send(RankOffer(generation, self._rendezvous.offers()))

    def _form(self, offers: dict[str, bytes]) -> None:
        self._inbox.abort_with(self._generation, self._rendezvous)
        fabrics = self._rendezvous.form(offers)
        self._inbox.abort_with(self._generation, fabrics)
        started = time.monotonic()
        if self._worker is None:
            self._worker, cache_bytes = build_worker(
                self._spec, fabrics.column, fabrics.peers, self._tell, self._agreed
            )
            self._metrics.loaded(time.monotonic() - started, cache_bytes)
        else:
            self._worker.join(fabrics.column, fabrics.peers)
        self._formed = True
        self._channel.send(RankReady(self._generation))

    def _tell(self, done: int, total: int) -> None:
        self._channel.send(LoadProgress(done, total))

    def _agreed(self, pages: int) -> int:
        """Tells the engine what this rank has room for; waits for what all have room for."""
        self._channel.send(RankMeasured(pages))
        order = self._inbox.get()
        if not isinstance(order, CacheSize):
            raise RuntimeError("the engine went on before all ranks had measured")
        return order.pages

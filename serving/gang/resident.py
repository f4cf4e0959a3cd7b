"""The life of a rank: report to the engine, form the fabrics, load, then run steps for ever.

The same function serves a Ray actor and a plain process; it returns when the engine closes the
connection. Losing the engine is the end of the process: a rank without it has no use, and
whatever it is stuck in (a collective, a kernel) must not outlive it.
"""

import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.cache import LatentCache
from model.checkpoint import read_cell
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.stage import Stage
from model.tokenizer import Tokenizer
from serving.engine.plan import RankPlan
from serving.gang.exchange import EXCHANGES, StageExchange
from serving.gang.fabric import Fabric, FabricError, GlooFabric, host_store, join_store
from serving.gang.grammars import Grammars
from serving.gang.messages import (
    GANG_CODEC,
    FormGang,
    LoadProgress,
    RankFailed,
    RankHello,
    RankReady,
    RankSpec,
)
from serving.gang.worker import Worker
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import RankMetrics, new_registry
from serving.wire import BlockingChannel, WireError

log = get_logger("rank")
_PROGRESS_S = 0.25
_STORE = "store"


@dataclass(slots=True)
class Fabrics:
    """The groups that a rank belongs to; None where it would be alone."""

    column: Fabric | None
    peers: Fabric | None


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
        _live(spec, channel, RankMetrics(registry, spec.stage, spec.rank), exporter.address)
    except (CheckpointError, FabricError, RuntimeError, OSError) as error:
        log.event("ERROR", "rank.failed", cell=spec.cell, error=type(error).__name__)
        text = str(error) or type(error).__name__
        user_error = isinstance(error, CheckpointError)
        channel.send(RankFailed(spec.stage, spec.rank, text.splitlines()[0][:500], user_error))
    except WireError:
        log.event("INFO", "rank.released", cell=spec.cell)
    finally:
        exporter.close()
        channel.close()


def _live(
    spec: RankSpec, channel: BlockingChannel, metrics: RankMetrics, metrics_address: str
) -> None:
    rendezvous = _Rendezvous(spec)
    hello = RankHello(spec.stage, spec.rank, os.getpid(), metrics_address, rendezvous.offers())
    channel.send(hello)
    form = channel.receive()
    if not isinstance(form, FormGang):
        raise RuntimeError("the engine sent a plan before the gang had formed")
    fabrics = rendezvous.form(form.offers)
    started = time.monotonic()
    worker, cache_bytes = _build_worker(spec, fabrics, channel)
    load_s = time.monotonic() - started
    metrics.loaded(load_s, cache_bytes)
    channel.send(RankReady(spec.stage, spec.rank, load_s, cache_bytes))
    plans: queue.SimpleQueue[RankPlan] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, plans), name="plans", daemon=True).start()
    while True:
        result = worker.step(plans.get())
        metrics.step(result)
        channel.send(result)


def _listen(channel: BlockingChannel, plans: "queue.SimpleQueue[RankPlan]") -> None:
    """Feeds the step loop; ends the process with the connection."""
    try:
        while True:
            plans.put(channel.receive())
    except WireError:
        os._exit(0)


class _Rendezvous:
    """What the ranks must tell each other so that their groups can form."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._alone = spec.stages * spec.ranks == 1
        self._leads_column = spec.stages > 1 and spec.stage == 0
        self._leads_stage = spec.ranks > 1 and spec.rank == 0
        self._store: object | None = None

    def offers(self) -> dict[str, bytes]:
        """This rank's contributions: a store's address, or NCCL ids of groups that it leads."""
        if self._spec.device == "cuda":
            from serving.gang.nccl import new_unique_id

            names = [f"column{self._spec.rank}"] * self._leads_column
            names += [f"stage{self._spec.stage}"] * self._leads_stage
            return {name: new_unique_id() for name in names}
        if self._spec.stage == 0 and self._spec.rank == 0 and not self._alone:
            self._store, port = host_store(self._spec.host, self._spec.start_timeout_s)
            return {_STORE: f"{self._spec.host} {port}".encode()}
        return {}

    def form(self, offers: dict[str, bytes]) -> Fabrics:
        spec = self._spec
        column = peers = None
        if spec.stages > 1:
            column = self._group(f"column{spec.rank}", spec.stage, spec.stages, offers)
        if spec.ranks > 1:
            peers = self._group(f"stage{spec.stage}", spec.rank, spec.ranks, offers)
        return Fabrics(column, peers)

    def _group(self, name: str, rank: int, size: int, offers: dict[str, bytes]) -> Fabric:
        if self._spec.device == "cuda":
            from serving.gang.nccl import NcclFabric

            return NcclFabric(offers[name], rank, size)
        host, port = offers[_STORE].decode().split()
        store = join_store(host, int(port), self._spec.start_timeout_s)
        return GlooFabric(store, name, rank, size, self._spec.host, self._spec.step_timeout_s)


def _build_worker(spec: RankSpec, fabrics: Fabrics, channel: BlockingChannel) -> tuple[Worker, int]:
    """Loads the cell's weights and allocates its cache; returns the cache's bytes too."""
    directory = Path(spec.model_directory)
    config = ModelConfig.from_directory(directory)
    layout, cell = Layout(config, spec.stages, spec.ranks), Cell(spec.stage, spec.rank)
    dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
    exchange: StageExchange | None = None
    if fabrics.peers is not None:
        exchange = EXCHANGES[spec.exchange](fabrics.peers, config.n_routed_experts)
    stage = Stage(config, layout, cell, dtype, device, exchange or LocalExchange())
    last_report = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last_report
        if done == total or time.monotonic() - last_report > _PROGRESS_S:
            last_report = time.monotonic()
            channel.send(LoadProgress(spec.stage, spec.rank, done, total))

    for name, tensor in read_cell(directory, config, layout, cell, dtype, report):
        stage.load_tensor(name, tensor)
    stage.finalize()
    cache = LatentCache(config, len(layout.layers(cell.stage)), spec.pages, dtype, device)
    grammars = None
    if layout.has_head(cell.stage):
        grammars = Grammars(lambda: Tokenizer.from_directory(directory, config))
    worker = Worker(cell, stage, cache, fabrics.column, exchange, config.hidden_size, grammars)
    return worker, cache.rows.nbytes

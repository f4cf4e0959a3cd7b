"""The life of a rank: report to the engine, form the fabrics, load, then run steps for ever.

The same function serves a Ray actor and a plain process; it returns when the engine closes the
connection. Losing the engine is the end of the process: a rank without it has no use, and
whatever it is stuck in (a collective, a kernel) must not outlive it.
"""

import contextlib
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.cache import LatentCache
from model.config import CheckpointError, ModelConfig
from model.layout import Cell
from model.moe import LocalExchange
from model.quantize import FP8
from model.tokenizer import Tokenizer
from serving.engine.plan import RankPlan
from serving.gang.exchange import EXCHANGES, StageExchange
from serving.gang.fabric import Fabric, FabricError, GlooFabric, host_store, join_store
from serving.gang.grammars import Grammars
from serving.gang.loading import load_stage
from serving.gang.meeting import MOST_RANKS, Meeting, host_identity, join
from serving.gang.messages import (
    GANG_CODEC,
    FormGang,
    LoadProgress,
    RankFailed,
    RankHello,
    RankReady,
    RankSpec,
)
from serving.gang.trace import StepTrace
from serving.gang.worker import Worker
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import RankMetrics, new_registry
from serving.wire import BlockingChannel, WireError

log = get_logger("rank")
_STORE = "store"
_HOST = "host"  # followed by the cell


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
        self._leads: dict[str, int] = {}  # groups, and how many ranks they have
        if spec.stages > 1 and spec.stage == 0:
            self._leads[f"column{spec.rank}"] = spec.stages
        if spec.ranks > 1 and spec.rank == 0:
            self._leads[f"stage{spec.stage}"] = spec.ranks
        self._store: object | None = None
        self._meetings: dict[str, Meeting] = {}

    def offers(self) -> dict[str, bytes]:
        """This rank's contributions.

        On GPUs the NCCL ids of groups that it leads. On CPUs a store's address for gloo; and,
        for shared memory, the rank's host and where the groups that it leads meet.
        """
        if self._spec.device == "cuda":
            from serving.gang.nccl import new_unique_id

            return {name: new_unique_id() for name in self._leads}
        offers = {} if self._alone else self._memory_offers()
        if self._spec.stage == 0 and self._spec.rank == 0 and not self._alone:
            self._store, port = host_store(self._spec.host, self._spec.start_timeout_s)
            offers[_STORE] = f"{self._spec.host} {port}".encode()
        return offers

    def _memory_offers(self) -> dict[str, bytes]:
        identity = host_identity(self._spec.host) if self._spec.fabric != "gloo" else None
        if identity is None:
            return {}
        for name, size in self._leads.items():
            if size <= MOST_RANKS:
                with contextlib.suppress(OSError):  # not on this system: then all use gloo
                    self._meetings[name] = Meeting(size)
        meetings = {name: meeting.address for name, meeting in self._meetings.items()}
        return {_HOST + self._spec.cell: identity} | meetings

    def form(self, offers: dict[str, bytes]) -> Fabrics:
        spec = self._spec
        column = peers = None
        if spec.stages > 1:
            cells = [f"{stage}.{spec.rank}" for stage in range(spec.stages)]
            column = self._group(f"column{spec.rank}", spec.stage, cells, offers)
        if spec.ranks > 1:
            cells = [f"{spec.stage}.{rank}" for rank in range(spec.ranks)]
            peers = self._group(f"stage{spec.stage}", spec.rank, cells, offers)
        for meeting in self._meetings.values():
            meeting.close()  # of a group that is spread over hosts
        return Fabrics(column, peers)

    def _group(self, name: str, rank: int, cells: list[str], offers: dict[str, bytes]) -> Fabric:
        """Joins a group; all its members see the same offers, and so choose the same fabric."""
        spec, size = self._spec, len(cells)
        if spec.device == "cuda":
            from serving.gang.nccl import NcclFabric

            return NcclFabric(offers[name], rank, size)
        hosts = {offers.get(_HOST + cell) for cell in cells}
        if name in offers and len(hosts) == 1 and None not in hosts:
            if name in self._meetings:
                return self._meetings.pop(name).lead(spec.step_timeout_s)
            return join(offers[name], rank, size, spec.step_timeout_s)
        if spec.fabric == "shared_memory":
            raise FabricError(f"the ranks of {name} cannot share memory: gang.fabric must be gloo")
        host, port = offers[_STORE].decode().split()
        store = join_store(host, int(port), spec.start_timeout_s)
        return GlooFabric(store, name, rank, size, spec.host, spec.step_timeout_s)


def _build_worker(spec: RankSpec, fabrics: Fabrics, channel: BlockingChannel) -> tuple[Worker, int]:
    """Loads the cell's weights and allocates its cache; returns the cache's bytes too."""
    directory = Path(spec.model_directory)
    config = ModelConfig.from_directory(directory)
    exchange: StageExchange | None = None
    if fabrics.peers is not None:
        exchange = EXCHANGES[spec.exchange](fabrics.peers, config.n_routed_experts)

    def tell(done: int, total: int) -> None:
        channel.send(LoadProgress(spec.stage, spec.rank, done, total))

    stage = load_stage(spec, config, exchange or LocalExchange(), tell)
    cache_dtype = FP8 if spec.cache_dtype == "fp8" else stage.dtype
    cache = LatentCache(config, len(stage.layers), spec.pages, cache_dtype, spec.device)
    grammars = None
    if stage.head is not None:
        grammars = Grammars(lambda: Tokenizer.from_directory(directory, config))
    trace = StepTrace(stage) if spec.trace else None
    cell = Cell(spec.stage, spec.rank)
    worker = Worker(
        cell, stage, cache, fabrics.column, exchange, config.hidden_size, grammars, trace
    )
    return worker, cache.rows.nbytes

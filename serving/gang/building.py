"""What makes a worker of a rank's spec: weights, cache, graphs."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from model import ops
from model.cache import PAGE_TOKENS, LatentCache
from model.checkpoint import read_cell
from model.config import CheckpointError, ModelConfig
from model.graphs import Capture, bucket_sizes
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.quantize import FP8
from model.stage import Stage
from model.tokenizer import Tokenizer
from serving.gang.decode import decode_graphs
from serving.gang.exchange import EXCHANGES, StageExchange
from serving.gang.fabric import Fabric
from serving.gang.grammars import Grammars
from serving.gang.memory import (
    CudaMemory,
    DeviceMemory,
    measure_steps,
    pages_that_fit,
)
from serving.gang.messages import LoadProgress, RankSpec
from serving.gang.trace import StepTrace
from serving.gang.worker import Worker
from serving.telemetry.logs import get_logger

log = get_logger("rank")
_PROGRESS_S = 0.25


def build_worker(
    spec: RankSpec,
    column: Fabric | None,
    peers: Fabric | None,
    tell: Callable[[LoadProgress], None],
    agree: Callable[[int], int],
    memory: DeviceMemory | None = None,
    capture: Capture | None = None,
) -> tuple[Worker, int]:
    """Loads a cell's weights and allocates its cache; returns the cache's bytes too.

    Args:
        tell: is told how far the weights are read.
        agree: is told how many pages this rank has room for, if the spec asks for that; returns
            how many all ranks of the gang have.
        memory: the device's; by default the current CUDA device's.
        capture: how decode steps are recorded; by default as CUDA graphs.

    Raises:
        CheckpointError: the checkpoint or the settings are wrong.
        FabricError: a peer is gone.
    """
    config = ModelConfig.from_directory(Path(spec.model_directory))
    exchange: StageExchange | None = None
    if peers is not None:
        exchange = EXCHANGES[spec.exchange](peers, config.n_routed_experts)
    stage = _loaded(spec, config, exchange, tell)
    layers, dtype = len(stage.layers), getattr(torch, spec.dtype)
    cache_dtype = FP8 if spec.cache_dtype == "fp8" else dtype
    pages, reserve = spec.pages, None
    if spec.device != "cpu" or spec.measure:
        memory = memory or CudaMemory()
        steps = measure_steps(config, stage, exchange, memory, spec.step_tokens, spec.sequences)
        reserve = partial(steps.reserve, memory=memory, device=torch.device(spec.device))
        if spec.measure:
            room = pages_that_fit(config, layers, cache_dtype, memory, spec.memory_fraction, steps)
            log.event("INFO", "rank.measured", cell=spec.cell, pages=room, step_bytes=steps.most)
            pages = agree(min(room, pages or room))
    cache = LatentCache(config, layers, pages, cache_dtype, torch.device(spec.device))
    graphs = None
    if spec.graphs and not spec.trace:
        longest, buckets = (
            min(spec.longest, (pages - 1) * PAGE_TOKENS),
            bucket_sizes(spec.sequences),
        )
        graphs = decode_graphs(config, stage, cache, exchange, buckets, longest, capture)
        if graphs is None:
            log.event("INFO", "rank.no_graphs", cell=spec.cell, exchange=spec.exchange)
        elif spec.measure:  # all ranks are here; later, each bucket when it is first needed
            graphs.record()
    worker = Worker(
        Cell(spec.stage, spec.rank), stage, cache, column, exchange, config.hidden_size,
        _grammars(spec, config, stage), StepTrace(stage) if spec.trace else None, graphs,
        reserve,
    )  # fmt: skip
    return worker, cache.rows.nbytes


def _loaded(
    spec: RankSpec,
    config: ModelConfig,
    exchange: StageExchange | None,
    tell: Callable[[LoadProgress], None],
) -> Stage:
    if spec.quantize is not None and spec.device != "cpu":
        raise CheckpointError(f"model.quantize {spec.quantize} is for CPUs: leave it out on GPUs")
    ops.choose(spec.device, spec.kernels)
    layout, cell = Layout(config, spec.stages, spec.ranks), Cell(spec.stage, spec.rank)
    dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
    exchanged = exchange or LocalExchange()
    stage = Stage(config, layout, cell, dtype, device, exchanged, spec.quantize)
    last_report = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last_report
        if done == total or time.monotonic() - last_report > _PROGRESS_S:
            last_report = time.monotonic()
            tell(LoadProgress(done, total))

    directory = Path(spec.model_directory)
    for name, tensor in read_cell(directory, config, layout, cell, dtype, report):
        stage.load_tensor(name, tensor)
    stage.finalize()
    return stage


def _grammars(spec: RankSpec, config: ModelConfig, stage: Stage) -> Grammars | None:
    if stage.head is None:
        return None
    return Grammars(lambda: Tokenizer.from_directory(Path(spec.model_directory), config))

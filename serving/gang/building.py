"""What makes a worker of a rank's spec: weights, cache, graphs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from model.cache import PAGE_TOKENS, LatentCache
from model.config import ModelConfig
from model.graphs import Capture, DecodeGraphs, bucket_sizes
from model.layout import Cell
from model.moe import LocalExchange
from model.quantize import FP8
from model.shards import Progress
from model.stage import Stage
from model.tokenizer import Tokenizer
from serving.gang.decode import decode_graphs
from serving.gang.exchange import EXCHANGES, StageExchange
from serving.gang.fabric import Fabric
from serving.gang.grammars import Grammars
from serving.gang.kernels import compile_stage, fastest_kernels, force_kernels
from serving.gang.loading import load_stage
from serving.gang.memory import (
    CudaMemory,
    DeviceMemory,
    measure_steps,
    pages_that_fit,
)
from serving.gang.messages import RankSpec
from serving.gang.trace import StepTrace
from serving.gang.worker import Worker
from serving.telemetry.logs import get_logger

log = get_logger("rank")


def build_worker(
    spec: RankSpec,
    column: Fabric | None,
    peers: Fabric | None,
    tell: Progress,
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
    force_kernels(spec)
    stage = load_stage(spec, config, exchange or LocalExchange(), tell)
    if spec.device != "cpu":
        fastest_kernels(spec, config, stage)
    compile_stage(spec, stage)
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
    graphs = _graphs(spec, config, stage, cache, exchange, capture)
    worker = Worker(
        Cell(spec.stage, spec.rank), stage, cache, column, exchange, config.hidden_size,
        _grammars(spec, config, stage), StepTrace(stage) if spec.trace else None, graphs,
        reserve,
    )  # fmt: skip
    return worker, cache.rows.nbytes


def _graphs(
    spec: RankSpec,
    config: ModelConfig,
    stage: Stage,
    cache: LatentCache,
    exchange: StageExchange | None,
    capture: Capture | None,
) -> DecodeGraphs | None:
    """Graphs of decode steps, if there are to be any and the exchange can be recorded."""
    if not spec.graphs or spec.trace:
        return None
    longest = min(spec.longest, (cache.rows.shape[1] - 1) * PAGE_TOKENS)
    buckets = bucket_sizes(spec.sequences)
    graphs = decode_graphs(config, stage, cache, exchange, buckets, longest, capture)
    if graphs is None:
        log.event("INFO", "rank.no_graphs", cell=spec.cell, exchange=spec.exchange)
    elif spec.measure:  # all ranks are here; later, each bucket when it is first needed
        graphs.record()
    return graphs


def _grammars(spec: RankSpec, config: ModelConfig, stage: Stage) -> Grammars | None:
    if stage.head is None:
        return None
    return Grammars(lambda: Tokenizer.from_directory(Path(spec.model_directory), config))

"""How a rank comes to the weights of its cell."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from model.checkpoint import read_cell
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.moe import ExpertExchange
from model.random_checkpoint import random_cell
from model.shards import Progress
from model.stage import Stage
from model.weights import Value
from serving.gang.messages import RankSpec
from serving.telemetry.logs import get_logger

log = get_logger("rank")
_TELL_S = 0.25
_LOG_S = 10.0


def load_stage(
    spec: RankSpec, config: ModelConfig, exchange: ExpertExchange, tell: Progress
) -> Stage:
    """The network of the rank's cell with its weights, on its device.

    Args:
        tell: is told how many of how many bytes are read, at the begin, at the end and a few
            times a second.

    Raises:
        CheckpointError: the checkpoint or the settings are wrong.
    """
    if spec.quantize == "int8" and spec.device != "cpu":
        raise CheckpointError("model.quantize int8 is for CPUs: choose fp8, or leave it out")
    layout, cell = Layout(config, spec.stages, spec.ranks), Cell(spec.stage, spec.rank)
    dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
    stage = Stage(config, layout, cell, dtype, device, exchange, spec.quantize)
    reporter = _Reporter(spec.cell, tell)
    weights: Iterator[tuple[str, Value]]
    if config.random_seed is not None:
        weights = random_cell(config, layout, cell, dtype, device, config.random_seed)
    else:
        directory = Path(spec.model_directory)
        weights = read_cell(directory, config, layout, cell, dtype, reporter, device)
    for name, tensor in weights:
        stage.load_tensor(name, tensor)
    reporter.read()
    stage.finalize()
    return stage


class _Reporter:
    """Passes the progress on at a bearable rate, and logs it by stage and rank."""

    def __init__(self, cell: str, tell: Progress) -> None:
        self._cell, self._tell = cell, tell
        self._started = self._logged = time.monotonic()
        self._told, self._bytes = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        now, self._bytes = time.monotonic(), done
        if done in (0, total) or now - self._told > _TELL_S:
            self._told = now
            self._tell(done, total)
        if now - self._logged > _LOG_S:
            self._logged = now
            log.event("INFO", "rank.loading", cell=self._cell, bytes=done, of=total)

    def read(self) -> None:
        """All is there."""
        seconds = time.monotonic() - self._started
        rate = round(self._bytes / seconds / 1e9, 2)
        log.event(
            "INFO", "rank.loaded", cell=self._cell, bytes=self._bytes, seconds=round(seconds, 2),
            gigabytes_per_second=rate,
        )  # fmt: skip

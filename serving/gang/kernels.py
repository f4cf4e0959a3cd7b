"""What computes on a rank: as the settings say, else what is the fastest there."""

import torch

from model import ops
from model.compiling import NotCompiled, compile_dense
from model.config import CheckpointError, ModelConfig
from model.graphs import Capture, CudaCapture
from model.ops.contest import Seconds, hold
from model.stage import Stage
from serving.gang.contests import contests, not_recorded
from serving.gang.messages import RankSpec
from serving.telemetry.logs import get_logger

log = get_logger("rank")


def force_kernels(spec: RankSpec) -> None:
    """Before anything is loaded: the kind of kernels that the settings name.

    Raises:
        CheckpointError: it cannot run here.
    """
    try:
        ops.choose(spec.device, spec.kernels)
    except (ValueError, ModuleNotFoundError) as error:
        raise CheckpointError(f"gang.kernels {spec.kernels}: {error}") from error


@torch.inference_mode()
def fastest_kernels(
    spec: RankSpec,
    config: ModelConfig,
    stage: Stage,
    capture: Capture | None = None,
    seconds: Seconds | None = None,
) -> None:
    """Where nothing was forced, lets libraries compete with our own kernels; on GPUs, in bf16.

    Decode is measured as it will run: from a graph, if it will.

    Args:
        capture: how decode is recorded; by default as the rank's steps are.
        seconds: how long a call takes; by default as measured.
    """
    if spec.kernels != "auto" or stage.dtype != torch.bfloat16 or not len(stage.layers):
        return
    if capture is None:
        capture = CudaCapture() if spec.graphs else not_recorded
    device = next(stage.parameters()).device
    plain = spec.cache_dtype == "auto"
    for contest in contests(config, stage, spec.step_tokens, spec.sequences, plain, capture):
        hold(contest, device, seconds)


def compile_stage(spec: RankSpec, stage: Stage) -> None:
    """Compiles what is dense in a loaded stage, if the settings say so; or logs why not."""
    if not spec.compile:
        return
    try:
        parts = compile_dense(stage)
    except NotCompiled as error:
        log.event("WARNING", "rank.not_compiled", cell=spec.cell, reason=str(error))
    else:
        log.event("INFO", "rank.compiled", cell=spec.cell, parts=parts)

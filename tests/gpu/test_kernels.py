"""What a rank settles when it starts: which kernels are the fastest here, and what is compiled."""

from collections.abc import Iterator

import pytest
import torch

from model import ops
from model.cache import LatentCache
from model.compiling import compile_dense
from model.context import Span, StepContext
from model.graphs import CudaCapture
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.ops.contest import hold
from model.stage import Stage
from serving.gang.contests import contests
from tests.model.harness import load
from tests.model.oracle import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    ops.choose("cuda", "auto")


def loaded() -> tuple[Stage, LatentCache]:
    model = oracle("nano")
    layout = Layout(model.config, 1, 1)
    stage = Stage(model.config, layout, Cell(0, 0), torch.bfloat16, CUDA, LocalExchange())
    load(stage, model.tensors)
    return stage, LatentCache(model.config, len(stage.layers), 4, torch.bfloat16, CUDA)


@torch.inference_mode()
def logits(stage: Stage, cache: LatentCache) -> torch.Tensor:
    context = StepContext.build([Span(0, 70, [1, 2], 1), Span(0, 1, [3], 1)], CUDA)
    ids = torch.arange(100, 171, device=CUDA)
    return stage.forward(ids, context, cache)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 3e-2 * expected.abs().max())


def test_libraries_compete_and_whoever_wins_computes_the_same() -> None:
    stage, cache = loaded()
    before = logits(stage, cache)
    with torch.inference_mode():
        for contest in contests(oracle("nano").config, stage, 512, 8, True, CudaCapture()):
            hold(contest, CUDA)
    assert near(logits(stage, cache), before)


def test_what_is_dense_can_be_compiled() -> None:
    stage, cache = loaded()
    before = logits(stage, cache)
    assert compile_dense(stage) == 10
    assert near(logits(stage, cache), before)

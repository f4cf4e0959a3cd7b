"""Weights on their way to a GPU: through pinned buffers, in 8-bit floats, or made there."""

from pathlib import Path

import pytest
import torch

from model import reading
from model.checkpoint import read_cell
from model.config import ModelConfig
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.quantize import Fp8Weight
from model.quantized_checkpoint import write_quantized
from model.random_checkpoint import NANO, random_cell
from model.stage import Stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CELL = Cell(0, 0)


def assert_same_bytes(here: torch.Tensor, there: torch.Tensor) -> None:
    assert there.is_cuda
    assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))


@pytest.mark.parametrize("staging_bytes", [2**12, 2**24])
def test_a_gpu_gets_the_bytes_that_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging_bytes: int
) -> None:
    monkeypatch.setattr(reading, "_STAGING_BYTES", staging_bytes)
    write_quantized(NANO, tmp_path / "q", "fp8-block")
    config = ModelConfig.from_directory(tmp_path / "q")
    layout = Layout(config, 1, 1)
    read = [
        dict(read_cell(tmp_path / "q", config, layout, CELL, torch.bfloat16, device=device))
        for device in ("cpu", "cuda")
    ]
    for name, here in read[0].items():
        there = read[1][name]
        if isinstance(here, Fp8Weight):
            assert isinstance(there, Fp8Weight)
            assert_same_bytes(here.data, there.data)
            assert_same_bytes(here.scale[None], there.scale[None])
        else:
            assert_same_bytes(here, there)


def test_a_stage_in_eight_bits_takes_half_the_memory() -> None:
    config = ModelConfig.from_directory(NANO)
    layout, taken = Layout(config, 1, 1), []
    for quantize in (None, "fp8"):
        before = torch.cuda.memory_allocated()
        stage = Stage(config, layout, CELL, torch.bfloat16, "cuda", LocalExchange(), quantize)
        for name, tensor in random_cell(config, layout, CELL, torch.bfloat16, "cuda"):
            stage.load_tensor(name, tensor)
        stage.finalize()
        taken.append(torch.cuda.memory_allocated() - before)
        del stage
    assert taken[1] < 0.75 * taken[0]

"""Weights in 8-bit floats: the numbers, and matrices that are put together of parts."""

import pytest
import torch

from model import ops
from model.config import CheckpointError
from model.moe import LocalExperts
from model.quantize import (
    FP8,
    FP8_MAX,
    Fp8Weight,
    by_block,
    fp8_per_block,
    fp8_per_tensor,
    from_fp8,
)
from model.weights import Matrix, WeightFormat
from tests.model.harness import Gang, relative_error
from tests.model.oracle import oracle
from tests.model.test_parity import random_tokens

KEPT = WeightFormat(torch.float32, keep_fp8=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(576, 300), (128, 128), (3, 200, 130), (1408, 1)])
@pytest.mark.parametrize("quantize", [fp8_per_block, fp8_per_tensor])
def test_an_element_is_off_by_a_sixteenth_of_itself_at_most(
    shape: tuple[int, ...], quantize: type
) -> None:
    weight = normal(*shape) * torch.logspace(-2, 2, shape[-1])
    quantized = quantize(weight)
    assert quantized.data.dtype == FP8
    assert quantized.data.is_contiguous()
    back = from_fp8(quantized, torch.float32)
    largest = weight.abs().amax((-2, -1), keepdim=True)
    assert ((back - weight).abs() <= weight.abs() / 16 + largest / FP8_MAX * 2**-10).all()


def test_every_block_has_a_scale_and_ragged_ones_their_own() -> None:
    weight = torch.ones(576, 10944 // 16)  # 4.5 × 5.34 blocks
    weight[512:, 640:] = 7.0
    weight[100, 5] = -900.0
    quantized = fp8_per_block(weight)
    assert quantized.scale.shape == (5, 6)
    assert quantized.scale[4, 5] * FP8_MAX == pytest.approx(7)
    assert quantized.scale[0, 0] * FP8_MAX == pytest.approx(900)
    assert torch.equal(from_fp8(quantized, torch.float32)[512:, 640:], weight[512:, 640:])


def test_zeros_have_a_scale_that_divides() -> None:
    for quantize in (fp8_per_block, fp8_per_tensor):
        quantized = quantize(torch.zeros(130, 5))
        assert (quantized.scale == 1).all()
        assert not from_fp8(quantized, torch.bfloat16).any()


def test_one_scale_can_be_said_block_by_block() -> None:
    whole = fp8_per_tensor(normal(2, 200, 300))
    blocks = by_block(whole)
    assert blocks.scale.shape == (2, 2, 3)
    assert torch.equal(from_fp8(blocks, torch.float32), from_fp8(whole, torch.float32))
    assert by_block(blocks) is blocks


@pytest.mark.parametrize("quantize", [fp8_per_block, fp8_per_tensor])
def test_parts_of_whole_blocks_are_fused_without_a_change(quantize: type) -> None:
    gate, up = quantize(normal(256, 160)), quantize(normal(256, 160, seed=1) * 9)
    matrix = Matrix(512, 160, KEPT, parts=2)
    matrix.place(1).put(up)
    matrix.place(0).put(gate)
    fused = matrix.take()
    assert isinstance(fused, Fp8Weight)
    expected = torch.cat([from_fp8(part, torch.float32) for part in (gate, up)])
    assert torch.equal(from_fp8(fused, torch.float32), expected)
    x = normal(3, 160)
    assert torch.allclose(ops.linear(x, ops.pack(fused)), x @ expected.T, atol=1e-4)


def test_parts_that_end_within_a_block_are_widened() -> None:
    gate, up = fp8_per_block(normal(160, 64)), fp8_per_block(normal(160, 64, seed=1))
    matrix = Matrix(320, 64, KEPT, parts=2)
    matrix.place(0).put(gate)
    matrix.place(1).put(up)
    expected = torch.cat([from_fp8(part, torch.float32) for part in (gate, up)])
    assert torch.equal(matrix.take(), expected)
    lone = Matrix(160, 64, KEPT)
    lone.place().put(gate)
    assert lone.take() is not None


def test_what_is_quantized_at_load_is_quantized_part_by_part() -> None:
    weight = normal(256, 64)
    kept = Matrix(256, 64, WeightFormat(torch.float32, "fp8", keep_fp8=True), parts=2)
    widened = Matrix(256, 64, WeightFormat(torch.float32, "fp8"), parts=2)
    for matrix in (kept, widened):
        for part, rows in enumerate(weight.split(128)):
            matrix.place(part).put(rows)
    held = kept.take()
    assert isinstance(held, Fp8Weight)
    assert torch.equal(held.data.float(), fp8_per_block(weight).data.float())
    assert torch.equal(from_fp8(held, torch.float32), widened.take())


def test_of_a_layers_experts_all_or_none_are_in_eight_bits() -> None:
    matrix = Matrix(128, 64, KEPT, count=2)
    matrix.place(index=0).put(fp8_per_tensor(normal(128, 64)))
    with pytest.raises(CheckpointError, match="some are in 8-bit floats, some not"):
        matrix.place(index=1).put(normal(128, 64))


@pytest.mark.parametrize("quantize", ["fp8", "fp8_tensor"])
def test_experts_in_eight_bits_say_what_the_widened_ones_say(quantize: str) -> None:
    config = oracle("nano").config
    hidden, ids = normal(9, config.hidden_size), torch.randint(0, 16, (9, 4))
    weights = torch.rand(9, 4)
    said = []
    for keep in (True, False):
        form = WeightFormat(torch.float32, quantize, keep_fp8=keep)
        experts = LocalExperts(config, range(4, 12), form)
        for number, (_, place) in enumerate(experts.slots("experts")):
            place.put(normal(*place.shape, seed=number) * 0.1)
        experts.pack()
        said.append(experts(hidden, ids, weights))
    assert relative_error(*said) < 1e-5


@pytest.mark.parametrize("quantize", ["fp8", "fp8_tensor"])
def test_a_stage_that_keeps_eight_bits_computes_what_the_widened_one_computes(
    quantize: str,
) -> None:
    model = oracle("nano")
    tokens = random_tokens(model, 40)
    logits = []
    for keep in (True, False):
        gang = Gang(
            model.config, model.tensors, stages=2, ranks=2, quantize=quantize, keep_fp8=keep
        )
        live = gang.open(tokens)
        gang.advance({live: 39})
        logits.append(gang.advance({live: 1})[live])
    assert relative_error(*logits) < 1e-4
    assert 1e-3 < relative_error(logits[0], model.logits(tokens)[-1]) < 0.2

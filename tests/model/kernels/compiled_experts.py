"""The kernels at the sizes of the real models, compiled for a Hopper GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.ops import (
    triton_experts,
    triton_gate,
    triton_linear,
    triton_rows,
    triton_sampling,
)
from model.quantize import BLOCK, FP8, Fp8Weight

BF16 = torch.bfloat16
WARP_GROUP_PRODUCT, WARP_PRODUCT = "wgmma.mma_async", "mma.sync"
HIDDEN, INNER, HELD = 2048, 1408, 4


def plain(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=BF16)


def by_block(*shape: int) -> Fp8Weight:
    *stack, outputs, inputs = shape
    scale = torch.empty(*stack, -(-outputs // BLOCK), -(-inputs // BLOCK))
    return Fp8Weight(torch.empty(*shape, dtype=FP8), scale)


@pytest.mark.parametrize(
    ("rows", "make", "product"),
    [(2, plain, WARP_PRODUCT), (2048, plain, WARP_GROUP_PRODUCT), (2, by_block, WARP_PRODUCT)],
)
def test_experts(rows: int, make: Any, product: str, compiled: list[Any]) -> None:
    packed = triton_experts.Experts(make(HELD, 2 * INNER, HIDDEN), make(HELD, HIDDEN, INNER))
    ids, weights = torch.zeros(rows, 6, dtype=torch.int64), torch.zeros(rows, 6)
    triton_experts.weighted_experts(plain(rows, HIDDEN), ids, weights, packed, 0)
    gated, down = (kernel for kernel in compiled if kernel.name.endswith("_product"))
    for kernel in (gated, down):
        assert product in kernel.asm["ptx"]
        assert "cp.async" in kernel.asm["ptx"]


@pytest.mark.parametrize("rows", [1, 100])
def test_products_with_weights_of_8_bit_floats(rows: int, compiled: list[Any]) -> None:
    triton_linear.linear(plain(rows, HIDDEN), by_block(576, HIDDEN))
    (kernel,) = compiled
    assert "cp.async" in kernel.asm["ptx"]


def test_what_is_done_to_each_row(compiled: list[Any]) -> None:
    x, weight = plain(4, HIDDEN), plain(HIDDEN)
    triton_rows.rms_norm(x, weight, 1e-6)
    triton_rows.add_rms_norm(x, x, weight, 1e-6)
    triton_rows.silu_mul(x)
    triton_rows.rotate_(plain(4, 16, 192)[..., 128:], torch.empty(4, 32), torch.empty(4, 32))
    triton_gate.route(torch.empty(4, 160), 6, 8, 3, 16.0)
    triton_linear.widened(by_block(576, HIDDEN), BF16)
    keys, limits = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.float64)
    triton_sampling.draw(torch.empty(4, 102_400), keys, limits)
    assert len(compiled) == 7

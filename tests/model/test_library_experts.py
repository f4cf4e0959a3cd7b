"""Torch's grouped products: what they are given, and what is left to our own kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from model.ops import library, reference, triton_experts
from model.ops.triton_linear import Weight
from model.quantize import FP8, Fp8Weight, fp8_per_block, fp8_per_tensor

EXPERTS, HIDDEN, INNER, ROWS, TOP_K, FIRST = 4, 64, 32, 9, 3, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and ids of which some are elsewhere."""
    hidden = torch.randn(ROWS, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS + 4)[:TOP_K] for _ in range(ROWS)])
    return hidden, ids, torch.rand(ROWS, TOP_K)


def weights() -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5
    return gate_up.bfloat16(), (torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5).bfloat16()


def scaled_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_recipe_a: Any, scale_b: Tensor,
    scale_recipe_b: Any, *, offs: Tensor, output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Torch's signature and demands; CPUs have none of it."""
    assert mat_a.dtype == mat_b.dtype == FP8
    assert mat_a.is_contiguous()
    assert mat_b.transpose(-2, -1).is_contiguous()
    assert scale_recipe_a == scale_recipe_b == ScalingType.RowWise
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.shape == mat_a.shape[:1]
    assert scale_b.shape == (mat_b.shape[0], mat_b.shape[2])
    assert scale_b.is_contiguous()
    assert offs.dtype == torch.int32
    assert output_dtype == torch.bfloat16
    left, right = mat_a.float() * scale_a[:, None], mat_b.float() * scale_b[:, None]
    out = torch.full((len(mat_a), mat_b.shape[2]), torch.nan)
    for group, (start, end) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
        out[start:end] = left[start:end] @ right[group]
    return out.to(output_dtype)


def both_of(pair: tuple[Weight, Weight]) -> tuple[Tensor, Tensor]:
    """What the library and the reference find."""
    given = rows()
    found = library.weighted_experts(*given, triton_experts.pack_experts(*pair), FIRST)
    return found, reference.weighted_experts(*given, reference.pack_experts(*pair), FIRST)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def test_weights_in_16_bits_go_through_the_grouped_product() -> None:
    assert error(*both_of(weights())) <= 2e-2


def test_weights_with_one_scale_meet_rows_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.F, "scaled_grouped_mm", scaled_grouped_mm)
    gate_up, down = weights()
    assert error(*both_of((fp8_per_tensor(gate_up), fp8_per_tensor(down)))) <= 6e-2


def test_weights_with_blocks_are_left_to_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        library.triton_experts, "weighted_experts", lambda *given: asked.append(given)
    )
    blocks: list[Fp8Weight] = [fp8_per_block(each) for each in weights()]
    library.weighted_experts(*rows(), triton_experts.pack_experts(*blocks), FIRST)
    assert len(asked) == 1

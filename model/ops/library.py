"""The routed experts as torch's own grouped products for GPUs do them, nothing read back.

An alternative to the kernels of `triton_experts`. Entries are laid out by expert first, those of
experts that are elsewhere last.

Weights of 8-bit floats with one scale each meet inputs that are rounded to 8 bits as well, row by
row. Those with a scale for each block, which torch multiplies by no group, are left to our own
kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from model.ops import triton_experts
from model.ops.reference import multiply_by_group, silu_mul
from model.ops.triton_linear import Weight
from model.quantize import Fp8Weight, fp8_by_row


def weighted_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: triton_experts.Experts, first: int
) -> Tensor:
    (rows, top_k), held = ids.shape, experts.held
    if not (_taken(experts.gate_up, hidden) and _taken(experts.down, hidden)):
        return triton_experts.weighted_experts(hidden, ids, weights, experts, first)
    if rows == 0:
        return torch.zeros_like(hidden)
    local = (ids - first).flatten()
    local = torch.where((local >= 0) & (local < held), local, held)
    local, order = local.sort(stable=True)  # [M] each
    ends = torch.searchsorted(local, torch.arange(1, held + 1, device=ids.device), out_int32=True)
    share = weights.flatten()[order][:, None]  # [M, 1]
    gate_up = _product(hidden[order // top_k], experts.gate_up, ends)
    gated = (silu_mul(gate_up).float() * share).to(hidden.dtype)  # [M, inter]
    said = _product(gated, experts.down, ends)  # [M, H]
    said.masked_fill_((local == held)[:, None], 0.0)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(places.view(rows, top_k), said, mode="sum")  # adds up in fp32


def _taken(weights: Weight, hidden: Tensor) -> bool:
    if not isinstance(weights, Fp8Weight):
        return True
    return not weights.by_block and hidden.dtype == torch.bfloat16


def _product(x: Tensor, weights: Weight, ends: Tensor) -> Tensor:
    """As `multiply_by_group`; with weights of 8-bit floats in 8 bits."""
    if not isinstance(weights, Fp8Weight):
        return multiply_by_group(x, weights, ends)
    data, scale = weights
    rounded, row_scale = fp8_by_row(x)
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        rounded,
        data.transpose(1, 2),
        row_scale,
        ScalingType.RowWise,
        scale[:, None].expand(data.shape[:2]).contiguous(),
        ScalingType.RowWise,
        offs=ends,
        output_dtype=x.dtype,
    )

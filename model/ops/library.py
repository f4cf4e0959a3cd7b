"""The routed experts as torch's own grouped product for GPUs does them, nothing read back.

An alternative to the kernels of `triton_experts`, to be forced where it is faster. Entries are
laid out by expert first, those of experts that are elsewhere last.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.reference import Weights, multiply_by_group, silu_mul


class Experts(Protocol):
    """As any kind packs them that leaves weights as they are."""

    @property
    def gate_up(self) -> Weights: ...

    @property
    def down(self) -> Weights: ...

    @property
    def held(self) -> int: ...


def weighted_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: Experts, first: int
) -> Tensor:
    (rows, top_k), held = ids.shape, experts.held
    if rows == 0:
        return torch.zeros_like(hidden)
    local = (ids - first).flatten()
    local = torch.where((local >= 0) & (local < held), local, held)
    local, order = local.sort(stable=True)  # [M] each
    ends = torch.searchsorted(local, torch.arange(1, held + 1, device=ids.device), out_int32=True)
    share = weights.flatten()[order][:, None]  # [M, 1]
    gate_up = multiply_by_group(hidden[order // top_k], experts.gate_up, ends)
    gated = (silu_mul(gate_up).float() * share).to(hidden.dtype)  # [M, inter]
    said = multiply_by_group(gated, experts.down, ends)  # [M, H]
    said.masked_fill_((local == held)[:, None], 0.0)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(places.view(rows, top_k), said, mode="sum")  # adds up in fp32

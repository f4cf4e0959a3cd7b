"""Attention and experts in fp64: what kernels and the reference approximate.

Attention is one sequence after the other; every expert says something to every row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import reference
from model.quantize import Fp8Weight, from_fp8


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest magnitude."""
    assert found.shape == expected.shape
    off = (found.cpu().double() - expected.cpu()).abs().max()
    return float(off / expected.abs().max())


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """As `ops.attend`; outputs and log-sum-exps in fp64."""
    query, key, shared_key, value = (each.double() for each in (query, key, shared_key, value))
    keys = torch.cat((key, shared_key[:, None].expand(-1, key.shape[1], -1)), dim=-1)
    scores = torch.einsum("nhd,mhd->nhm", query, keys) * scale
    if causal:
        unseen = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(unseen[:, None], float("-inf"))
    return torch.einsum("nhm,mhv->nhv", scores.softmax(-1), value), scores.logsumexp(-1)


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ops.attend_latents`; outputs and log-sum-exps in fp64."""
    query, latents = query.double(), latents.double()
    scores = torch.einsum("nhd,md->nhm", query, latents) * scale
    out = torch.einsum("nhm,mv->nhv", scores.softmax(-1), latents[:, :value_dim])
    return out, scores.logsumexp(-1)


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ops.attend_pages`; outputs and log-sum-exps in fp64."""
    found = []
    for asked, table, length in zip(query.double(), pages, lengths.tolist(), strict=True):
        place = torch.arange(length, device=pages.device)
        slots = table[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
        rows = reference.read_rows(cache, slots, asked)
        found.append(attend_latents(asked[None], rows, value_dim, scale))
    out, lse = zip(*found, strict=True)
    return torch.cat(out), torch.cat(lse)


def values(weight: Tensor | Fp8Weight) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else from_fp8(weight, torch.float64)


def weighted_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
    first: int,
) -> Tensor:
    """As `ops.weighted_experts`, in fp64; of what the experts say, most counts for nothing."""
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for expert, (inner, outer) in enumerate(
        zip(values(gate_up), values(down), strict=True), start=first
    ):
        gate, up = (hidden.double() @ inner.T).chunk(2, -1)
        share = (weights.double() * (ids == expert)).sum(1, keepdim=True)
        total += share * ((F.silu(gate) * up) @ outer.T)
    return total

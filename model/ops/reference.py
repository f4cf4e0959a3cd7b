"""The operations in plain torch, for any device: the truth that kernels are tested against.

Signatures and meaning are those of `model.ops`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.race import draw as draw
from model.quantize import Fp8Weight, fp8_rows, from_fp8, from_fp8_rows, from_int8, int8

# Weights [out, in] of several experts: [experts, out, in] as floats of 8 bits or more, or apart.
Weights = Tensor | Fp8Weight | Sequence[Tensor]


class Experts(NamedTuple):
    """Routed experts of one rank as torch computes with them."""

    gate_up: Weights
    down: Weights

    @property
    def held(self) -> int:
        """How many there are."""
        return len(self.down.data if isinstance(self.down, Fp8Weight) else self.down)


def pack(weight: Tensor | Fp8Weight) -> Tensor | Fp8Weight:
    return weight


def pack_heads(weight: Tensor) -> Tensor:
    return weight


def pack_experts(
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
    quantize: str | None = None,
    share: float = 1.0,
) -> Experts:
    return Experts(as_quantized(gate_up, quantize), as_quantized(down, quantize))


def as_quantized(weights: Tensor | Fp8Weight, quantize: str | None) -> Tensor | Fp8Weight:
    """Weights with the error of the quantization, in their own dtype."""
    if quantize is None or isinstance(weights, Fp8Weight):
        return weights
    return from_int8(*int8(weights), weights.dtype)


def linear(x: Tensor, weight: Tensor | Fp8Weight) -> Tensor:
    return F.linear(x, weight if isinstance(weight, Tensor) else from_fp8(weight, x.dtype))


def linear_heads(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    pairs = x.float().unflatten(-1, (-1, 2))  # [T, heads, D / 2, 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    x.copy_(turned.flatten(-2))


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    eight_bits = cache.dtype == torch.uint8
    stored = fp8_rows(rows, cache.shape[-1]) if eight_bits else rows.to(cache.dtype)
    cache.flatten(0, 1)[slots] = stored


def read_rows(cache: Tensor, slots: Tensor, like: Tensor) -> Tensor:
    return _values(cache.flatten(0, 1).index_select(0, slots), like.shape[-1], like.dtype)


def _values(stored: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Cache rows [..., width] of what is stored."""
    eight_bits = stored.dtype == torch.uint8
    return from_fp8_rows(stored, width, dtype) if eight_bits else stored.to(dtype)


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    nope = key.shape[-1]
    scores = torch.einsum("nhd,mhd->hnm", query[..., :nope].float(), key.float())
    scores += torch.einsum("nhd,md->hnm", query[..., nope:].float(), shared_key.float())
    scores *= scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("hnm,mhv->nhv", scores.softmax(-1), value.float())
    return out.to(query.dtype), scores.logsumexp(-1).t()


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    keys = latents.float()
    scores = torch.einsum("nhd,md->nhm", query.float(), keys) * scale
    out = torch.einsum("nhm,mv->nhv", scores.softmax(-1), keys[:, :value_dim])
    return out.to(query.dtype), scores.logsumexp(-1)


def plan_pages(pages: Tensor, lengths: Tensor, kept: bool = False) -> None:
    """There is nothing to plan."""


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    stored = cache[pages].flatten(1, 2)
    keys = _values(stored, query.shape[-1], torch.float32)  # [B, P * 64, latent]
    unseen = torch.arange(keys.shape[1], device=query.device) >= lengths[:, None]
    keys = keys.masked_fill(unseen[..., None], 0.0)  # whatever a page held before, NaN included
    scores = torch.einsum("bhd,bmd->bhm", query.float(), keys) * scale
    scores = scores.masked_fill(unseen[:, None], float("-inf"))
    out = torch.einsum("bhm,bmv->bhv", scores.softmax(-1), keys[..., :value_dim])
    return out.to(query.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, other_lse)  # [n, heads]
    share, other_share = (lse - total).exp(), (other_lse - total).exp()
    merged = out.float() * share[..., None] + other.float() * other_share[..., None]
    return merged.to(out.dtype), total


def route(
    logits: Tensor, top_k: int, groups: int, groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1)  # [T, experts]
    if groups > 1:
        grouped = scores.unflatten(-1, (groups, -1))  # [T, groups, experts / groups]
        kept = _likeliest(grouped.amax(-1), groups_kept)[1]  # [T, groups_kept]
        barred = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device)
        barred.scatter_(1, kept, False)
        scores = grouped.masked_fill(barred[..., None], float("-inf")).flatten(1)
    weights, ids = _likeliest(scores, top_k)
    return ids, weights * scale


def _likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the last dimension and where they are; of equals, the first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


def multiply_by_group(x: Tensor, weights: Weights, ends: Tensor) -> Tensor:
    """Rows of x up to ends[0] times weights[0], up to ends[1] times weights[1], …

    Rows past the last end come out as anything.
    """
    assert isinstance(weights, Tensor | Fp8Weight)
    weights = weights if isinstance(weights, Tensor) else from_fp8(weights, x.dtype)
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def weighted_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    first: int,
    grouped_linear: Callable[[Tensor, Weights, Tensor], Tensor] = multiply_by_group,
) -> Tensor:
    (gate_up, down), (rows, top_k), held = experts, ids.shape, experts.held
    if rows == 0:
        return torch.zeros_like(hidden)
    local = (ids - first).flatten()
    local = torch.where((local >= 0) & (local < held), local, held)  # last: not here
    ends = torch.bincount(local, minlength=held + 1)[:held].cumsum(0).int()  # [E]
    order = local.argsort(stable=True)[: int(ends[-1])]  # [M] entries that are here, by expert
    # One row more than there are entries: what an expert that is not here contributes.
    entries = hidden.index_select(0, F.pad(order // top_k, (0, 1)))  # [M + 1, H]
    share = F.pad(weights.flatten()[order], (0, 1))[:, None]  # [M + 1, 1]
    gated = silu_mul(grouped_linear(entries, gate_up, ends))  # [M + 1, inter]
    said = grouped_linear(gated.float().mul_(share).to(hidden.dtype), down, ends)  # [M + 1, H]
    said[-1] = 0.0
    places = torch.full_like(local, len(order))
    places[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(places.view(rows, top_k), said, mode="sum")  # adds up in fp32

"""What torch's CPU kernels do faster than the plain formula.

Attention goes through the flash kernel, which never holds all scores at once. It wants keys and
values of one width, so values are read together with their neighbours in memory and the surplus
columns of the result are dropped.

A bf16 weight in oneDNN's own order halves the time of a product with few rows, since oneDNN
would else reorder the weight for every product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import reference

# Latents gathered at a time in decode: 19 MB in bf16, whatever the batch and its lengths.
_GATHERED_TOKENS = 16384

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    if not _PACKS or weight.dtype != torch.bfloat16:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def pack_experts(weights: Tensor) -> reference.Experts:
    if not _PACKS or weights.dtype != torch.bfloat16:
        return weights
    return [pack(weight) for weight in weights]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    if not weight.is_mkldnn:
        return F.linear(x, weight)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def weighted_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: reference.Experts,
    down: reference.Experts,
    first: int,
) -> Tensor:
    return reference.weighted_experts(
        hidden, ids, weights, gate_up, down, first, grouped_linear=_expert_by_expert
    )


def _expert_by_expert(x: Tensor, weights: reference.Experts, ends: Tensor) -> Tensor:
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            parts.append(linear(x[start:end], weights[expert]))
        start = end
    parts.append(x.new_empty(len(x) - start, weights[0].shape[0]))
    return torch.cat(parts)


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    (_, heads, width), nope, v = query.shape, key.shape[-1], value.shape[-1]
    both = query.new_empty(len(key), heads, width + v)  # [m, heads, nope | rope | v]
    both[..., :nope] = key
    both[..., nope:width] = shared_key[:, None]
    both[..., width:] = value
    out, lse = _flash(
        _heads_first(query),
        _heads_first(both[..., :width]),
        _heads_first(both[..., v:]),
        is_causal=causal,
        scale=scale,
    )
    return out[0].transpose(0, 1)[..., width - v :], lse[0].t()


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, D] as [1, heads, tokens, D]."""
    return x.transpose(0, 1)[None]


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    queries = query.flatten(0, 1)[None, None]  # [1, 1, n * heads, latent]
    out, lse = _flash(queries, latents[None, None], latents[None, None], scale=scale)
    return out.view(query.shape)[..., :value_dim], lse.view(query.shape[:2])


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    """A block of positions of all sequences at a time; those that have ended drop out."""
    longest, page = int(lengths[0]), cache.shape[1]
    block = max(_GATHERED_TOKENS // len(query), page)
    out, lse = None, None
    for start in range(0, longest, block):
        positions = torch.arange(start, min(start + block, longest))
        alive = int((lengths > start).sum())
        seen = positions < lengths[:alive, None]  # [alive, block]
        slots = pages[:alive, positions // page] * page + positions % page
        slots = slots.where(seen, 0)  # a row that is not seen could hold NaN
        keys = reference.read_rows(cache, slots.flatten(), query)
        keys = keys.view(alive, 1, len(positions), -1)  # [alive, 1, block, latent]
        mask = query.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None, None]
        part, part_lse = _flash(query[:alive, None], keys, keys, attn_mask=mask, scale=scale)
        part, part_lse = part[:, 0, :, :value_dim], part_lse[:, 0]
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            out[:alive], lse[:alive] = reference.merge(out[:alive], lse[:alive], part, part_lse)
    assert out is not None
    return out

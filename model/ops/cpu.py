"""What CPUs do faster than the plain formula: our own kernels, else torch's.

Our own (`model.ops.native`) are for bf16 on CPUs with AVX-512 BF16 or AVX2. Everything else:

Attention goes through the flash kernel, which never holds all scores at once, and wants keys and
values of one width.

A bf16 weight in oneDNN's own order halves the time of a product with few rows, since oneDNN
would else reorder the weight for every product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import native, reference
from model.ops.one_width import heads_first, one_width
from model.quantize import Fp8Weight

# Latents gathered at a time in decode: 19 MB in bf16, whatever the batch and its lengths.
_GATHERED_TOKENS = 16384

_PANELS = 4  # dimensions of a weight as panels

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor | Fp8Weight) -> Tensor | Fp8Weight:
    return weight if isinstance(weight, Fp8Weight) else _packed(weight)


def _packed(weight: Tensor) -> Tensor:
    if native.available(weight) and (panels := native.panels(weight)) is not None:
        return panels
    if not _PACKS or weight.dtype != torch.bfloat16:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def pack_heads(weight: Tensor) -> Tensor:
    panels = native.panels(weight) if native.available(weight) else None
    return weight if panels is None else panels


def pack_experts(
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
    quantize: str | None = None,
    share: float = 1.0,
) -> reference.Experts | native.PanelExperts:
    if isinstance(gate_up, Fp8Weight) or isinstance(down, Fp8Weight):
        return reference.pack_experts(gate_up, down, quantize)
    if native.available(gate_up):
        packed = native.pack_experts(gate_up, down, quantize)
        if packed is not None:
            return packed
    plain = reference.pack_experts(gate_up, down, quantize)
    if not _PACKS or gate_up.dtype != torch.bfloat16:
        return plain
    return reference.Experts(*([_packed(weight) for weight in weights] for weights in plain))


def linear(x: Tensor, weight: Tensor | Fp8Weight) -> Tensor:
    if isinstance(weight, Fp8Weight):
        return reference.linear(x, weight)
    if weight.dim() == _PANELS:
        return native.linear(x, weight)
    if not weight.is_mkldnn:
        return F.linear(x, weight)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def linear_heads(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 1 + _PANELS:
        return native.linear_heads(x, weight)
    return reference.linear_heads(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = native.rms_norm(x, weight, eps) if native.available(x) else None
    return reference.rms_norm(x, weight, eps) if out is None else out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    out = native.silu_mul(gate_up) if native.available(gate_up) else None
    return reference.silu_mul(gate_up) if out is None else out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not (native.available(x) and native.rotate_(x, cos, sin)):
        reference.rotate_(x, cos, sin)


def route(
    logits: Tensor, top_k: int, groups: int, groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    kind = native if native.LOADED else reference
    return kind.route(logits, top_k, groups, groups_kept, scale)


def weighted_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: reference.Experts | native.PanelExperts,
    first: int,
) -> Tensor:
    if isinstance(experts, native.PanelExperts):
        return native.weighted_experts(hidden, ids, weights, experts, first)
    if isinstance(experts.gate_up, Fp8Weight) or isinstance(experts.down, Fp8Weight):
        return reference.weighted_experts(hidden, ids, weights, experts, first)
    return reference.weighted_experts(
        hidden, ids, weights, experts, first, grouped_linear=_expert_by_expert
    )


def _expert_by_expert(x: Tensor, weights: reference.Weights, ends: Tensor) -> Tensor:
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
    if native.available(query):
        found = native.attend(query, key, shared_key, value, scale, causal)
        if found is not None:
            return found
    keys, values = one_width(key, shared_key, value)
    inputs = (heads_first(each) for each in (query, keys, values))
    out, lse = _flash(*inputs, is_causal=causal, scale=scale)
    return out[0].transpose(0, 1)[..., -value.shape[-1] :], lse[0].t()


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    queries = query.flatten(0, 1)[None, None]  # [1, 1, n * heads, latent]
    out, lse = _flash(queries, latents[None, None], latents[None, None], scale=scale)
    return out.view(query.shape)[..., :value_dim], lse.view(query.shape[:2])


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    """Where pages must be gathered: a block of positions of all sequences at a time.

    Sequences that have ended drop out.
    """
    if native.available(query):
        found = native.attend_pages(query, cache, pages, lengths, value_dim, scale)
        if found is not None:
            return found
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

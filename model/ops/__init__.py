"""Every hot operation of the network under one signature, whatever the device.

`reference` is plain torch, runs everywhere and is the truth. Which implementation runs is
decided once for each device (`model.ops.choice`), and the device is that of the first tensor.
"""

from typing import Any

import torch
from torch import Tensor

from model.ops import reference
from model.ops.choice import choose as choose
from model.ops.choice import implementations
from model.quantize import Fp8Weight

# Routed experts in the form that a device computes with, which is its own affair.
Experts = Any


def _run(name: str, first: Tensor | Fp8Weight, *rest: Any) -> Any:
    if torch.compiler.is_compiling():  # plain torch is what a compiler can fuse
        return getattr(reference, name)(first, *rest)
    return implementations(first.device.type)[name](first, *rest)


def pack(weight: Tensor | Fp8Weight) -> Tensor | Fp8Weight:
    """A weight [out, in] as `linear` reads it fastest, perhaps opaque; perhaps the same one."""
    return _run("pack", weight)


def pack_heads(weight: Tensor) -> Tensor:
    """Weights [heads, out, in] as `linear_heads` reads them fastest; may be a view."""
    return _run("pack_heads", weight)


def pack_experts(
    gate_up: Tensor | Fp8Weight,
    down: Tensor | Fp8Weight,
    quantize: str | None = None,
    share: float = 1.0,
) -> Experts:
    """Weights [E, 2 inter, H] and [E, H, inter] as `weighted_experts` reads them fastest.

    Args:
        quantize: "int8": whole numbers with a scale for each row of a weight that is not in 8
            bits already. Kernels for them quantize their inputs too, row by row; the reference
            does not.
        share: of all experts of the layer, how many are here: about so many of the ids that are
            asked about, which kernels choose their tiles by.
    """
    return _run("pack_experts", gate_up, down, quantize, share)


def linear(x: Tensor, weight: Tensor | Fp8Weight) -> Tensor:
    """x [T, in] times the transpose of a weight [out, in], packed or not: [T, out]."""
    return _run("linear", x, weight)


def linear_heads(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, heads, in] times the transposes of each head's weight, packed: [T, heads, out]."""
    return _run("linear_heads", x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D].

    Computed in fp32 and cast to x's dtype before the weight is applied.
    """
    return _run("rms_norm", x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta [..., D], rounded to x's dtype, and `rms_norm` of that."""
    return _run("add_rms_norm", x, delta, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension times the second: [..., 2 D] to [..., D]."""
    return _run("silu_mul", gate_up)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates x [T, heads, D] in place, dimensions 2 i and 2 i + 1 as a pair.

    x may be a view into wider rows; cos and sin are [T, D / 2] fp32.
    """
    _run("rotate_", x, cos, sin)


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Puts rows [T, latent] at slots [T] of one layer's cache.

    The cache is [pages, 64, latent] floats, or [pages, 64, bytes of a row] uint8: rows in 8-bit
    floats, see `model.quantize`. So it is for all that reads it.
    """
    _run("write_rows", cache, slots, rows)


def read_rows(cache: Tensor, slots: Tensor, like: Tensor) -> Tensor:
    """The rows at slots [N] of one layer's cache, [N, latent] in the dtype of `like`."""
    return _run("read_rows", cache, slots, like)


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence's queries over expanded keys and values.

    Args:
        query: [n, heads, nope + rope].
        key: [m, heads, nope], each head's own part of the keys.
        shared_key: [m, rope], the rotated part that all heads share.
        value: [m, heads, v], with v no wider than a query.
        scale: what scores are multiplied by.
        causal: query i sees keys 0 to i only (n = m); else all.

    Returns:
        Outputs [n, heads, v] in query's dtype, and log-sum-exp of the scores [n, heads] fp32.
    """
    return _run("attend", query, key, shared_key, value, scale, causal)


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries over the latents of one sequence, all of which they see.

    Args:
        query: [n, heads, latent].
        latents: [m, latent], keys of all heads; their first `value_dim` elements are the values.
        value_dim: width of a value.
        scale: what scores are multiplied by.

    Returns:
        Outputs [n, heads, value_dim] in query's dtype, and log-sum-exp [n, heads] fp32.
    """
    return _run("attend_latents", query, latents, value_dim, scale)


def plan_pages(pages: Tensor, lengths: Tensor, kept: bool = False) -> None:
    """Tells who plans its work that these tables, as `attend_pages` takes them, are new.

    To be called before the first `attend_pages` with them, which may count on it.

    Args:
        kept: the tensors stay where they are, a graph's: they will come again with other numbers.
    """
    _run("plan_pages", pages, lengths, kept)


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    """The same for one absorbed query each of many sequences, over their pages of the cache.

    Args:
        query: [B, heads, latent].
        cache: [all pages, 64, latent], one layer's, or as bytes.
        pages: [B, P] int64 page tables.
        lengths: [B] int64, keys that each sees, at least 1; in descending order.
        value_dim: width of a value.
        scale: what scores are multiplied by.

    Returns:
        [B, heads, value_dim] in query's dtype.
    """
    return _run("attend_pages", query, cache, pages, lengths, value_dim, scale)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    Outputs are [n, heads, v], log-sum-exps [n, heads] fp32; so is what comes back.
    """
    return _run("merge", out, lse, other, other_lse)


def route(
    logits: Tensor, top_k: int, groups: int, groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Which experts each row goes to, likeliest first.

    The softmax over all experts; then, if there are several groups of consecutive experts, only
    the `groups_kept` whose best expert is best stay eligible; then the `top_k` of those.

    Args:
        logits: [T, experts] fp32.

    Returns:
        Expert ids [T, top_k] int64 and weights, times `scale`, [T, top_k] fp32.
    """
    return _run("route", logits, top_k, groups, groups_kept, scale)


def weighted_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: Experts, first: int
) -> Tensor:
    """The weighted sum over those of each row's experts that are here.

    Args:
        hidden: [N, H]; N may be 0.
        ids: [N, k] int64; experts that are not here, and -1, contribute nothing.
        weights: [N, k] fp32.
        experts: first to first + E - 1, as `pack_experts` made them.
        first: id of the first expert here.

    Returns:
        [N, H] in hidden's dtype, summed in fp32.
    """
    return _run("weighted_experts", hidden, ids, weights, experts, first)


def draw(logits: Tensor, keys: Tensor, limits: Tensor) -> Tensor:
    """One token for each row, of those that its limits keep, as often as the softmax says.

    Top-k comes first; top-p keeps the fewest of the likeliest that hold its share of what top-k
    left; min-p keeps what is at least so likely relative to the likeliest. One is always kept.

    Args:
        logits: [R, V] fp32, not changed; -inf where a token is forbidden. A row with NaN, +inf
            or nothing but -inf gets any token.
        keys: [R] int64, from `draw_key`: of a row with the same key the draw is the same.
        limits: [R, 4] fp64: temperature (0: the likeliest token, no draw), top-k (0: all),
            top-p (1: all) and min-p (0: all).

    Returns:
        Token ids [R] int64.
    """
    return _run("draw", logits, keys, limits)

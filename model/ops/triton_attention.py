"""Expanded attention in Triton: a chunk's queries over keys and values of their own.

A program holds a block of one head's queries and goes over the keys once, with the running
maximum and sum of an online softmax. Of causal attention, only the last blocks need a mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops import reference
from model.ops.tiling import MATRIX_SIDE, powers_of_two

_LN_2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Queries and keys of one tile of scores; warps and pipeline stages of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(queries: int, itemsize: int) -> Tiles:
    """Tiles for so many queries of so many bytes an element; keys divide queries."""
    if itemsize == 4:
        return Tiles(queries=32, keys=32, warps=4, stages=1)
    if queries <= 64:
        return Tiles(queries=64, keys=64, warps=4, stages=2)
    return Tiles(queries=128, keys=64, warps=8, stages=3)


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    (queries, heads, width), (keys, _, own) = query.shape, key.shape
    values, shared = value.shape[-1], width - own
    if not powers_of_two(own, shared, values, least=MATRIX_SIDE):
        return reference.attend(query, key, shared_key, value, scale, causal)
    query, key, value = (_elements_adjacent(each) for each in (query, key, value))
    shared_key = _elements_adjacent(shared_key)
    tile = tiles(queries, query.element_size())
    out = query.new_empty(queries, heads, values)
    lse = query.new_empty(queries, heads, dtype=torch.float32)
    _attend_block[triton.cdiv(queries, tile.queries), heads](
        query, key, shared_key, value, out, lse, scale, queries, keys, heads,
        *query.stride()[:2], *key.stride()[:2], shared_key.stride(0), *value.stride()[:2],
        OWN=own, SHARED=shared, VALUES=values, CAUSAL=causal, QUERIES=tile.queries,
        KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def _elements_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    queries, heads, values = out.shape
    out, other = _elements_adjacent(out), _elements_adjacent(other)
    merged, total = out.new_empty(out.shape), lse.new_empty(lse.shape)
    _merge[queries, heads](
        out, lse, other, other_lse, merged, total, heads, values, *out.stride()[:2],
        *lse.stride(), *other.stride()[:2], *other_lse.stride(),
        VALUES=triton.next_power_of_2(values), num_warps=1,
    )  # fmt: skip
    return merged, total


@triton.jit
def _over_keys(
    asked, asked_shared, key, shared_key, value, start, end, keys, row,
    highest, total, mixed, scale, key_stride, shared_stride, value_stride,
    OWN: tl.constexpr, SHARED: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The online softmax continued over keys `start` to `end`, some of them unseen if MASKED."""
    offsets = tl.arange(0, KEYS)
    own, shared, values = tl.arange(0, OWN), tl.arange(0, SHARED), tl.arange(0, VALUES)
    for position in range(start, end, KEYS):
        column = position + offsets
        at = column.to(tl.int64)[:, None]
        real = column[:, None] < keys if MASKED else None
        other = 0.0 if MASKED else None
        k = tl.load(key + at * key_stride + own[None, :], mask=real, other=other)
        k_shared = tl.load(shared_key + at * shared_stride + shared[None, :], real, other)
        scores = tl.dot(asked, tl.trans(k), input_precision="tf32x3")
        scores = tl.dot(asked_shared, tl.trans(k_shared), scores, input_precision="tf32x3")
        scores *= scale
        if MASKED:
            seen = column[None, :] < keys
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp2(highest - higher)
        shares = tl.exp2(scores - higher[:, None])
        total = total * kept + tl.sum(shares, 1)
        mixed = mixed * kept[:, None]
        v = tl.load(value + at * value_stride + values[None, :], mask=real, other=other)
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision="tf32x3")
        highest = higher
    return highest, total, mixed


@triton.jit
def _attend_block(
    query, key, shared_key, value, out, lse, scale, queries, keys, heads,
    query_stride, query_head, key_stride, key_head, shared_stride, value_stride, value_head,
    OWN: tl.constexpr, SHARED: tl.constexpr, VALUES: tl.constexpr, CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One head's outputs and log-sum-exps for QUERIES queries."""
    # Late queries see most keys: their blocks begin first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    real, at = row[:, None] < queries, row.to(tl.int64)[:, None]
    own, shared, values = tl.arange(0, OWN), tl.arange(0, SHARED), tl.arange(0, VALUES)
    source = query + at * query_stride + head * query_head
    asked = tl.load(source + own[None, :], mask=real, other=0.0)  # [QUERIES, OWN]
    asked_shared = tl.load(source + OWN + shared[None, :], mask=real, other=0.0)
    key += head * key_head
    value += head * value_head
    scale *= 1.0 / _LN_2  # powers of two are what the hardware has

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, VALUES], tl.float32)
    # Up to `full`, every query of the block sees every key of a tile.
    end = tl.minimum((block + 1) * QUERIES, keys) if CAUSAL else keys
    full = tl.minimum(block * QUERIES, keys) // KEYS * KEYS if CAUSAL else keys // KEYS * KEYS
    highest, total, mixed = _over_keys(
        asked, asked_shared, key, shared_key, value, 0, full, keys, row,
        highest, total, mixed, scale, key_stride, shared_stride, value_stride,
        OWN, SHARED, VALUES, KEYS, False, CAUSAL,
    )  # fmt: skip
    highest, total, mixed = _over_keys(
        asked, asked_shared, key, shared_key, value, full, end, keys, row,
        highest, total, mixed, scale, key_stride, shared_stride, value_stride,
        OWN, SHARED, VALUES, KEYS, True, CAUSAL,
    )  # fmt: skip
    place = at * heads + head
    mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place * VALUES + values[None, :], mixed, mask=real)
    place = row.to(tl.int64) * heads + head
    tl.store(lse + place, (highest + tl.log2(total)) * _LN_2, mask=row < queries)


@triton.jit
def _merge(
    out, lse, other, other_lse, merged, merged_lse, heads, values,
    out_stride, out_head, lse_stride, lse_head, other_stride, other_head,
    other_lse_stride, other_lse_head, VALUES: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine = tl.load(lse + query * lse_stride + head * lse_head)
    others = tl.load(other_lse + query * other_lse_stride + head * other_lse_head)
    highest = tl.maximum(mine, others, tl.PropagateNan.ALL)
    total = highest + tl.log(tl.exp(mine - highest) + tl.exp(others - highest))
    columns = tl.arange(0, VALUES)
    real = columns < values
    at = out + query * out_stride + head * out_head + columns
    mixed = tl.load(at, mask=real, other=0.0).to(tl.float32) * tl.exp(mine - total)
    at = other + query * other_stride + head * other_head + columns
    mixed += tl.load(at, mask=real, other=0.0).to(tl.float32) * tl.exp(others - total)
    place = query * heads + head
    tl.store(merged + place * values + columns, mixed.to(merged.dtype.element_ty), mask=real)
    tl.store(merged_lse + place, total)

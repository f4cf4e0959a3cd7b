"""Absorbed attention in Triton: queries over latents, in pages of the cache or in one piece.

The keys of a sequence are cut into splits that programs attend to side by side, each for a block
of heads; a second kernel merges what the splits found. How many splits there are follows from
shapes alone, and how much of a sequence each one takes from its length on the device: so the
launch can be captured once for all lengths. A tile of latents is loaded once and serves as keys
and, without its rotated part, as values.
"""

from functools import cache as remembered
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import reference
from model.ops.tiling import MATRIX_SIDE, powers_of_two
from model.ops.triton_cache import Parts, parts_of
from model.quantize import BLOCK

_LN_2 = tl.constexpr(0.6931471805599453)
_MOST_SPLITS = 64
_MERGED_COLUMNS = 128
_SPLIT_COST = 2  # what another split costs, in tiles of tokens: its start, its part of the merge


class Tiles(NamedTuple):
    """How much one program holds, and with what.

    Attributes:
        heads, tokens: of a tile of scores; tokens divide a page.
        warps, stages: of a program; tiles of latents in flight are one fewer than stages.
        resident: programs that one multiprocessor runs at a time.
    """

    heads: int
    tokens: int
    warps: int
    stages: int
    resident: int


def tiles(heads: int, itemsize: int, quantized: bool = False) -> Tiles:
    """Tiles for so many heads (or queries times heads) of so many bytes an element.

    64 rows fill a warp group's matrix instruction, and a tile of 64 tokens then leaves room for
    two; with fewer heads bandwidth is the limit, and small tiles leave room for more programs.
    """
    if itemsize == 4:
        return Tiles(heads=16, tokens=16, warps=4, stages=2, resident=1)
    if heads < 64 and quantized:
        return Tiles(heads=16, tokens=32, warps=8, stages=3, resident=1)
    if heads < 64:
        return Tiles(heads=16, tokens=32, warps=4, stages=3, resident=2)
    return Tiles(heads=64, tokens=64, warps=8, stages=2, resident=1)


def splits_for(programs: int, tokens: int, tile: int, slots: int) -> int:
    """The number of splits with which `programs` blocks of at most `tokens` keys end first.

    Args:
        slots: programs that the device runs at a time.
    """
    blocks = max(triton.cdiv(tokens, tile), 1)
    counts = range(1, min(blocks, _MOST_SPLITS) + 1)

    def duration(splits: int) -> int:
        cost = 0 if splits == 1 else _SPLIT_COST
        return triton.cdiv(programs * splits, slots) * (triton.cdiv(blocks, splits) + cost)

    return min(counts, key=duration)


@remembered
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    if not _fits(query, value_dim):
        return reference.attend_pages(query, cache, pages, lengths, value_dim, scale)
    parts = parts_of(cache, value_dim)
    return attend_parts(query, parts, value_dim, scale, pages.contiguous(), lengths)[0]


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    if not _fits(query, value_dim):
        return reference.attend_latents(query, latents, value_dim, scale)
    parts = parts_of(latents[None], value_dim)
    out, lse = attend_parts(query.flatten(0, 1)[None], parts, value_dim, scale)
    return out.view(*query.shape[:2], value_dim), lse.view(query.shape[:2])


def _fits(query: Tensor, value_dim: int) -> bool:
    return powers_of_two(value_dim, query.shape[-1] - value_dim, least=MATRIX_SIDE)


def attend_parts(
    query: Tensor,
    parts: Parts,
    value_dim: int,
    scale: float,
    pages: Tensor | None = None,
    lengths: Tensor | None = None,
    splits: int | None = None,
    tile: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, heads, value_dim] and log-sum-exps [B, heads] of queries [B, heads, latent].

    Without pages, B is 1 and the latents are one sequence's, all of which is seen. How many
    splits and which tile is decided here unless somebody measures others.
    """
    batch, heads, latent = query.shape
    tile = tile or tiles(heads, query.element_size(), parts.scales is not None)
    paged, page_count = pages is not None, 0 if pages is None else pages.shape[1]
    longest = parts.latents.shape[1] if pages is None else page_count * PAGE_TOKENS
    blocks = triton.cdiv(heads, tile.heads)
    if splits is None:
        slots = _multiprocessors(query.device) * tile.resident
        splits = splits_for(batch * blocks, longest, tile.tokens, slots)
    out = query.new_empty(batch, heads, value_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    whole = splits == 1
    found = out if whole else out.new_empty(batch, splits, heads, value_dim, dtype=torch.float32)
    found_lse = lse if whole else lse.new_empty(batch, splits, heads)
    _attend_split[blocks, splits, batch](
        query.contiguous(), *parts, pages, lengths, found, found_lse,
        scale, heads, longest, page_count, *parts.strides,
        SPLITS=splits, HEADS=tile.heads, TOKENS=tile.tokens, PAGE=PAGE_TOKENS, PAGED=paged,
        VALUE=value_dim, ROPE=latent - value_dim, QUANTIZED=parts.scales is not None,
        SCALED=BLOCK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not whole:
        columns = min(value_dim, _MERGED_COLUMNS)
        _merge_splits[heads, batch, value_dim // columns](
            found, found_lse, lengths, out, lse, heads, longest,
            SPLITS=splits, MOST=triton.next_power_of_2(splits), TOKENS=tile.tokens, PAGED=paged,
            VALUE=value_dim, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit
def _share(length, SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """How many keys of a sequence each split takes: whole tiles, the same for all but the last."""
    return tl.cdiv(tl.cdiv(length, TOKENS), SPLITS) * TOKENS


@triton.jit
def _tile(
    latents, scales, ropes, first, seen, offsets, values, turned,
    latents_stride, scales_stride, ropes_stride,
    QUANTIZED: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Rows `first` + `offsets` of the cache: latents [N, VALUE] and rotated keys [N, ROPE]."""
    at = latents + first * latents_stride + offsets[:, None] * latents_stride + values[None, :]
    latent = tl.load(at, mask=seen[:, None], other=0)
    if QUANTIZED:
        groups = tl.arange(0, values.shape[0] // SCALED)
        at = scales + first * scales_stride + offsets[:, None] * scales_stride + groups[None, :]
        scale = tl.load(at, mask=seen[:, None], other=0.0)  # [N, VALUE / SCALED]
        wide = latent.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        wide = wide.reshape(offsets.shape[0], values.shape[0] // SCALED, SCALED)
        latent = (wide * scale[:, :, None]).reshape(offsets.shape[0], values.shape[0])
    at = ropes + first * ropes_stride + offsets[:, None] * ropes_stride + turned[None, :]
    rope = tl.load(at, mask=seen[:, None], other=0.0)
    return latent.to(dtype), rope.to(dtype)


@triton.jit
def _attend_split(
    query, latents, scales, ropes, pages, lengths, out, lse,
    scale, heads, longest, page_count, latents_stride, scales_stride, ropes_stride,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, VALUE: tl.constexpr, ROPE: tl.constexpr, QUANTIZED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for a block of heads.

    Writes [HEADS, VALUE] of out [B, SPLITS, heads, VALUE], and log-sum-exps beside it. A split
    with nothing to see writes nothing, and the merge knows.
    """
    # Blocks of heads follow each other first: they share their latents through the L2 cache.
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32) if PAGED else longest
    share = _share(length, SPLITS, TOKENS)
    start = split * share
    end = tl.minimum(start + share, length)
    if start >= end:
        return
    head = block * HEADS + tl.arange(0, HEADS)
    real = head[:, None] < heads
    values, turned, offsets = tl.arange(0, VALUE), tl.arange(0, ROPE), tl.arange(0, TOKENS)
    at = query + (row * heads + head[:, None]).to(tl.int64) * (VALUE + ROPE)
    asked = tl.load(at + values[None, :], mask=real, other=0.0)  # [HEADS, VALUE]
    asked_turned = tl.load(at + VALUE + turned[None, :], mask=real, other=0.0)  # [HEADS, ROPE]
    scale *= 1.0 / _LN_2  # powers of two are what the hardware has

    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, VALUE], tl.float32)
    if PAGED:
        pages += row.to(tl.int64) * page_count
        page = tl.load(pages + start // PAGE)
    for position in range(start, end, TOKENS):
        first = tl.cast(position, tl.int64)
        if PAGED:  # a page's id is there before its turn, else copies ahead would wait for it
            first = page * PAGE + position % PAGE
            following = position + TOKENS
            page = tl.load(pages + following // PAGE, mask=following < end, other=0)
        seen = offsets < end - position
        latent, rope = _tile(
            latents, scales, ropes, first, seen, offsets, values, turned,
            latents_stride, scales_stride, ropes_stride, QUANTIZED, SCALED, asked.dtype,
        )  # fmt: skip
        scores = tl.dot(asked, tl.trans(latent), input_precision="tf32x3")
        scores = tl.dot(asked_turned, tl.trans(rope), scores, input_precision="tf32x3")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))  # [HEADS, TOKENS]
        higher = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp2(highest - higher)
        shares = tl.exp2(scores - higher[:, None])
        total = total * kept + tl.sum(shares, 1)
        mixed = mixed * kept[:, None]
        mixed = tl.dot(shares.to(latent.dtype), latent, mixed, input_precision="tf32x3")
        highest = higher

    place = (row.to(tl.int64) * SPLITS + split) * heads + head
    mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * VALUE + values[None, :], mixed, mask=real)
    tl.store(lse + place, (highest + tl.log2(total)) * _LN_2, mask=head < heads)


@triton.jit
def _merge_splits(
    found, found_lse, lengths, out, lse, heads, longest,
    SPLITS: tl.constexpr, MOST: tl.constexpr, TOKENS: tl.constexpr, PAGED: tl.constexpr,
    VALUE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one head of one sequence: what its splits found, by their share of the softmax."""
    head, row, column = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32) if PAGED else longest
    split = tl.arange(0, MOST)
    used = split < tl.cdiv(length, _share(length, SPLITS, TOKENS))
    place = (row * SPLITS + split) * heads + head
    each = tl.load(found_lse + place, mask=used, other=float("-inf"))
    highest = tl.max(each, 0)
    sum_lse = highest + tl.log(tl.sum(tl.exp(each - highest), 0))
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    at = found + place[:, None] * VALUE + columns[None, :]
    parts = tl.load(at, mask=used[:, None], other=0.0)  # [MOST, COLUMNS]
    mixed = tl.sum(tl.exp(each - sum_lse)[:, None] * parts, 0)
    place = row * heads + head
    tl.store(out + place * VALUE + columns, mixed.to(out.dtype.element_ty))
    tl.store(lse + place, sum_lse)

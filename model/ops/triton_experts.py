"""The routed experts of one rank, in Triton: sorted entries, two grouped products, one sum.

Nothing waits for the device and no shape depends on its data, so that a step can be captured in
a graph. The first product gates as it ends and reads the rows of its entries where they are; the
second one writes what each entry's expert says; the sum weighs it, in fp32.

Weights of 8-bit floats are widened as they are read: exact, and what bounds a step with few rows
is the bytes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops import reference
from model.ops.triton_linear import Tile, Weight, data_of, scale_at, scales_of
from model.ops.triton_rows import silu
from model.ops.triton_sort import Plan, by_expert
from model.quantize import BLOCK, Fp8Weight

_SUMMED_AT_ONCE = 1024  # columns of a row


class Experts(NamedTuple):
    """gate_up [E, 2 inter, H] and down [E, H, inter], and their share of the layer's experts."""

    gate_up: Weight
    down: Weight
    share: float = 1.0

    @property
    def held(self) -> int:
        """How many there are."""
        return len(data_of(self.down))


class Tiles(NamedTuple):
    """Those of the two products; of the first, each column is two: gate and up."""

    gated: Tile
    down: Tile


# By how many entries an expert has on average, up to so many. Few rows: all time goes into
# reading weights, in deep tiles. Many rows: the accumulators fill the registers.
TILES: tuple[tuple[float, Tiles], ...] = (
    (16, Tiles(Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 4))),
    (32, Tiles(Tile(32, 64, 128, 4, 3), Tile(32, 128, 128, 4, 3))),
    (64, Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))),
    (math.inf, Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))),
)


def pack_experts(
    gate_up: Weight, down: Weight, quantize: str | None = None, share: float = 1.0
) -> Experts:
    gate_up, down = (reference.as_quantized(weight, quantize) for weight in (gate_up, down))
    return Experts(_contiguous(gate_up), _contiguous(down), share)


def weighted_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: Experts, first: int
) -> Tensor:
    entries = ids.numel() * experts.share / experts.held
    return with_tiles(tiles_for(entries, hidden.dtype), hidden, ids, weights, experts, first)


def with_tiles(
    tiles: Tiles, hidden: Tensor, ids: Tensor, weights: Tensor, experts: Experts, first: int
) -> Tensor:
    """The same with given tiles, both of as many rows."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not len(hidden):
        return out
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    held, _, inner = data_of(experts.down).shape
    top_k = ids.shape[1]
    plan = by_expert(ids, first, held, tiles.gated.rows)
    gated = hidden.new_empty(ids.numel(), inner)
    said = hidden.new_empty(ids.numel(), hidden.shape[1])
    _product(_gated_product, hidden, experts.gate_up, gated, plan, top_k, tiles.gated)
    _product(_down_product, gated, experts.down, said, plan, top_k, tiles.down)
    grid = (len(hidden), triton.cdiv(hidden.shape[1], _SUMMED_AT_ONCE))
    _sum[grid](said, ids, weights, out, first, held, hidden.shape[1], top_k, _SUMMED_AT_ONCE)
    return out


def tiles_for(entries: float, dtype: torch.dtype) -> Tiles:
    """The tiles for so many entries an expert; without tensor cores, never the largest."""
    fitting = [tiles for most, tiles in TILES if entries <= most]
    return TILES[-2][1] if dtype == torch.float32 and len(fitting) == 1 else fitting[0]


def _contiguous(weight: Weight) -> Weight:
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(*(part.contiguous() for part in weight))
    return weight.contiguous()


def _product(
    kernel: triton.JITFunction,
    x: Tensor,
    weight: Weight,
    out: Tensor,
    plan: Plan,
    top_k: int,
    tile: Tile,
) -> None:
    data, (scale, scales) = data_of(weight), scales_of(weight)
    columns, depth = out.shape[1], data.shape[2]
    tile = tile.fitting(x.dtype)
    most = plan.blocks.shape[1]
    grid = (most * triton.cdiv(columns, tile.columns),)
    kernel[grid](
        x, data, scale, out, plan.order, plan.blocks, most, top_k, columns, depth,
        scales, BLOCK, tile.rows, tile.columns, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _tile(blocks, most, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's expert, rows and columns, which of these there are, and whether any row is.

    Eight blocks of rows meet a weight's columns together.
    """
    tiles = (columns + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group = program // (8 * tiles)
    members = tl.minimum(most - group * 8, 8)
    within = program % (8 * tiles)
    block = group * 8 + within % members
    begin = tl.load(blocks + most + block)
    end = tl.load(blocks + 2 * most + block)
    expert = tl.load(blocks + block).to(tl.int64)
    row = begin + tl.arange(0, ROWS)
    column = within // members * COLUMNS + tl.arange(0, COLUMNS)
    return expert, row, row < end, column, column < columns, begin < end


@triton.jit
def _gated_product(
    x, weight, scale, out, order, blocks, most, top_k, columns, depth,
    SCALES: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [M, columns] = silu(x · gate) · (x · up), in sorted order; x [N, depth] by row."""
    expert, row, here, column, some, any_row = _tile(blocks, most, columns, ROWS, COLUMNS)
    if not any_row:
        return
    source = (tl.load(order + row, mask=here, other=0) // top_k).to(tl.int64)
    k = tl.arange(0, DEPTH)
    x_at = x + source[:, None] * depth + k[None, :]
    gate_at = weight + (expert * 2 * columns + column)[None, :] * depth + k[:, None]
    up_at = gate_at + columns.to(tl.int64) * depth
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        value = tl.load(x_at + start, mask=here[:, None] & left[None, :], other=0.0)
        mask = some[None, :] & left[:, None]
        gates = tl.load(gate_at + start, mask=mask, other=0.0).to(value.dtype)
        ups = tl.load(up_at + start, mask=mask, other=0.0).to(value.dtype)
        if SCALES == 2:
            worth = scale_at(scale, expert, column, 2 * columns, start, depth, BLOCK)
            gate += tl.dot(value, gates, input_precision="ieee") * worth[None, :]
            worth = scale_at(scale, expert, column + columns, 2 * columns, start, depth, BLOCK)
            up += tl.dot(value, ups, input_precision="ieee") * worth[None, :]
        else:
            gate = tl.dot(value, gates, gate, input_precision="ieee")
            up = tl.dot(value, ups, up, input_precision="ieee")
    if SCALES == 1:
        worth = tl.load(scale + expert)
        gate *= worth
        up *= worth
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    gated = (silu(gate) * up).to(out.dtype.element_ty)
    tl.store(at, gated, mask=here[:, None] & some[None, :])


@triton.jit
def _down_product(
    x, weight, scale, out, order, blocks, most, top_k, columns, depth,
    SCALES: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [M, columns] = x · weight, by entry; x [M, depth] in sorted order."""
    expert, row, here, column, some, any_row = _tile(blocks, most, columns, ROWS, COLUMNS)
    if not any_row:
        return
    k = tl.arange(0, DEPTH)
    x_at = x + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_at = weight + (expert * columns + column)[None, :] * depth + k[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        value = tl.load(x_at + start, mask=here[:, None] & left[None, :], other=0.0)
        part = tl.load(weight_at + start, mask=some[None, :] & left[:, None], other=0.0)
        part = part.to(value.dtype)
        if SCALES == 2:
            worth = scale_at(scale, expert, column, columns, start, depth, BLOCK)
            total += tl.dot(value, part, input_precision="ieee") * worth[None, :]
        else:
            total = tl.dot(value, part, total, input_precision="ieee")
    if SCALES == 1:
        total *= tl.load(scale + expert)
    entry = tl.load(order + row, mask=here, other=0).to(tl.int64)
    at = out + entry[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & some[None, :])


@triton.jit
def _sum(said, ids, weights, out, first, held, width, top_k, BLOCK: tl.constexpr):
    """out [N, width] = what the experts that are here said to a row, weighed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(top_k):
        entry = row * top_k + k
        expert = tl.load(ids + entry) - first
        here = (expert >= 0) & (expert < held)
        words = tl.load(said + entry * width + column, mask=inside & here, other=0.0)
        weight = tl.where(here, tl.load(weights + entry), 0.0)
        total += weight * words.to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)

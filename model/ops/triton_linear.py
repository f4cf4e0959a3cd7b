"""Products with weights of 8-bit floats, in Triton; all others are the vendor library's.

Weights are widened to the type of what they are multiplied by: exact, but for the rounding of
what a many-rowed product reads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.quantize import BLOCK, Fp8Weight

Weight = Tensor | Fp8Weight

# How a weight's scales lie; the kernels' SCALES.
UNSCALED, BY_TENSOR, BY_BLOCK = 0, 1, 2

# From so many rows on, the weight is widened as a whole for the library's product, which then
# takes longer than the widening.
_MANY_ROWS = 512
_WIDENED_AT_ONCE = 1024


class Tile(NamedTuple):
    """What one program of a product computes at once: rows × columns, `depth` inputs a turn.

    `depth` divides the blocks of a weight, so that a turn has one row of scales.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def fitting(self, dtype: torch.dtype) -> "Tile":
        """The tile for inputs of this type, in as much shared memory as two bytes a number."""
        return self._replace(depth=self.depth * 2 // max(dtype.itemsize, 2))


# By rows, up to so many.
_TILES = ((16, Tile(16, 32, 128, 4, 6)), (_MANY_ROWS, Tile(64, 64, 128, 4, 3)))


def linear(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if len(x) >= _MANY_ROWS:
        return F.linear(x, widened(weight, x.dtype))
    x = x.contiguous()
    columns, depth = weight.data.shape
    out = x.new_empty(len(x), columns)
    if not len(x):
        return out
    tile = next(tile for most, tile in _TILES if len(x) <= most).fitting(x.dtype)
    grid = (triton.cdiv(len(x), tile.rows), triton.cdiv(columns, tile.columns))
    scale, scales = scales_of(weight)
    _linear[grid](
        x, weight.data, scale, out, len(x), columns, depth, scales, BLOCK,
        tile.rows, tile.columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def widened(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] in a wider type."""
    columns, depth = weight.data.shape
    out = torch.empty(columns, depth, dtype=dtype, device=weight.device)
    scale, scales = scales_of(weight)
    grid = (columns, triton.cdiv(depth, _WIDENED_AT_ONCE))
    _widen[grid](weight.data, scale, out, columns, depth, scales, BLOCK, _WIDENED_AT_ONCE)
    return out


def data_of(weight: Weight) -> Tensor:
    return weight.data if isinstance(weight, Fp8Weight) else weight


def scales_of(weight: Weight) -> tuple[Tensor, int]:
    """A weight's scales, if it has any, and how they lie."""
    if not isinstance(weight, Fp8Weight):
        return weight, UNSCALED
    return weight.scale, BY_BLOCK if weight.by_block else BY_TENSOR


@triton.jit
def scale_at(scale, which, column, columns, k, depth, BLOCK: tl.constexpr):
    """What products of some columns with inputs from k on are worth: fp32, of column's shape.

    The scales are those of weight `which` of several [columns, depth].
    """
    down, across = (columns + BLOCK - 1) // BLOCK, (depth + BLOCK - 1) // BLOCK
    at = (which * down + column // BLOCK) * across + k // BLOCK
    return tl.load(scale + at, mask=(column < columns) & (k < depth), other=0.0)


@triton.jit
def _linear(
    x, weight, scale, out, rows, columns, depth,
    SCALES: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = x [rows, depth] times the transpose of weight [columns, depth]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, some = row < rows, column < columns
    k = tl.arange(0, DEPTH)
    x_at = x + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * depth + k[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        value = tl.load(x_at + start, mask=here[:, None] & left[None, :], other=0.0)
        part = tl.load(weight_at + start, mask=some[None, :] & left[:, None], other=0.0)
        product = tl.dot(value, part.to(value.dtype), input_precision="ieee")
        if SCALES == 2:
            product *= scale_at(scale, 0, column, columns, start, depth, BLOCK)[None, :]
        total += product
    if SCALES == 1:
        total *= tl.load(scale)
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & some[None, :])


@triton.jit
def _widen(
    weight, scale, out, columns, depth,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Part of one row of a weight a program."""
    column = tl.program_id(0)
    k = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    at = column.to(tl.int64) * depth + k
    value = tl.load(weight + at, mask=k < depth, other=0.0).to(tl.float32)
    if SCALES == 2:
        value *= scale_at(scale, 0, column, columns, k, depth, BLOCK)
    else:
        value *= tl.load(scale)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=k < depth)

"""Rows of the latent cache in Triton: written to their slots and read back.

A *quantized* cache holds rows as bytes, laid out as `model.quantize` says.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops import reference
from model.ops.tiling import powers_of_two
from model.quantize import BLOCK, FP8_MAX, fp8_latent

_LARGEST = tl.constexpr(FP8_MAX)


class Parts(NamedTuple):
    """One layer's cache as kernels see it: views [pages, 64, …] with strides of their own.

    Attributes:
        latents: in the cache's dtype, or bytes that are e4m3.
        scales: fp32; None where the cache is plain.
        ropes: rotated keys, in the cache's dtype or bf16.
    """

    latents: Tensor
    scales: Tensor | None
    ropes: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """From one row to the next, in elements of each part."""
        scales = 0 if self.scales is None else self.scales.stride(1)
        return self.latents.stride(1), scales, self.ropes.stride(1)


def parts_of(cache: Tensor, value_dim: int) -> Parts:
    """The parts of a cache whose rows have so many latents."""
    if cache.dtype != torch.uint8:
        return Parts(cache, None, cache[..., value_dim:])
    scales = cache.view(torch.float32)[..., value_dim // 4 :]
    ropes = cache.view(torch.bfloat16)[..., (value_dim + 4 * (value_dim // BLOCK)) // 2 :]
    return Parts(cache, scales, ropes)


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    count, width = rows.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if cache.dtype != torch.uint8:
        tile = triton.next_power_of_2(width)
        _write[(count,)](rows, slots, cache, rows.stride(0), cache.stride(1), width, TILE=tile)
        return
    value_dim = fp8_latent(width, cache.shape[-1])
    if not powers_of_two(value_dim, width - value_dim):
        reference.write_rows(cache, slots, rows)
        return
    parts = parts_of(cache, value_dim)
    _quantize[(count,)](
        rows, slots, *parts, rows.stride(0), *parts.strides,
        GROUPS=value_dim // BLOCK, SCALED=BLOCK, ROPE=width - value_dim, num_warps=4,
    )  # fmt: skip


def read_rows(cache: Tensor, slots: Tensor, like: Tensor) -> Tensor:
    out = like.new_empty(len(slots), width := like.shape[-1])
    if cache.dtype != torch.uint8:
        tile = triton.next_power_of_2(width)
        _read[(len(slots),)](cache, slots, out, cache.stride(1), width, TILE=tile)
        return out
    value_dim = fp8_latent(width, cache.shape[-1])
    if not powers_of_two(value_dim, width - value_dim):
        return reference.read_rows(cache, slots, like)
    parts = parts_of(cache, value_dim)
    _dequantize[(len(slots),)](
        *parts, slots, out, *parts.strides,
        GROUPS=value_dim // BLOCK, SCALED=BLOCK, ROPE=width - value_dim, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _write(rows, slots, cache, rows_stride, stride, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot, columns = tl.load(slots + row), tl.arange(0, TILE)
    real = columns < width
    values = tl.load(rows + row * rows_stride + columns, mask=real)
    tl.store(cache + slot * stride + columns, values.to(cache.dtype.element_ty), mask=real)


@triton.jit
def _read(cache, slots, out, stride, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot, columns = tl.load(slots + row), tl.arange(0, TILE)
    real = columns < width
    values = tl.load(cache + slot * stride + columns, mask=real)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=real)


@triton.jit
def _quantize(
    rows, slots, latents, scales, ropes, rows_stride, latents_stride, scales_stride, ropes_stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, source = tl.load(slots + row), rows + row * rows_stride
    groups, turned = tl.arange(0, GROUPS), tl.arange(0, ROPE)
    columns = groups[:, None] * SCALED + tl.arange(0, SCALED)[None, :]
    values = tl.load(source + columns).to(tl.float32)  # [GROUPS, SCALED]
    largest = tl.max(tl.abs(values), 1)
    scale = tl.where(largest > 0.0, largest / _LARGEST, 1.0)
    values = tl.clamp(values / scale[:, None], -_LARGEST, _LARGEST, tl.PropagateNan.ALL)
    numbers = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(latents + slot * latents_stride + columns, numbers)
    tl.store(scales + slot * scales_stride + groups, scale)
    rope = tl.load(source + GROUPS * SCALED + turned)
    tl.store(ropes + slot * ropes_stride + turned, rope.to(tl.bfloat16))


@triton.jit
def _dequantize(
    latents, scales, ropes, slots, out, latents_stride, scales_stride, ropes_stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, target = tl.load(slots + row), out + row * (GROUPS * SCALED + ROPE)
    groups, turned = tl.arange(0, GROUPS), tl.arange(0, ROPE)
    columns = groups[:, None] * SCALED + tl.arange(0, SCALED)[None, :]
    numbers = tl.load(latents + slot * latents_stride + columns)  # [GROUPS, SCALED]
    scale = tl.load(scales + slot * scales_stride + groups)
    values = numbers.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(target + columns, values.to(out.dtype.element_ty))
    rope = tl.load(ropes + slot * ropes_stride + turned).to(tl.float32)
    tl.store(target + GROUPS * SCALED + turned, rope.to(out.dtype.element_ty))

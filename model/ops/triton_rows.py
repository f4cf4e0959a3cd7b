"""Operations on each row by itself, in Triton: norms, gating, rotation.

All compute in fp32 and round where the reference does.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATED_AT_ONCE = 1024  # elements of a program that has no row to keep together


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = _as_rows(x)
    _norm_rows(rows, rows, rows, out, weight, eps, adds=False)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _norm_rows(_as_rows(x), _as_rows(delta), total, out, weight, eps, adds=True)
    return total, out


def silu_mul(gate_up: Tensor) -> Tensor:
    *before, width = gate_up.shape
    out = gate_up.new_empty(*before, width // 2)
    rows = _as_rows(gate_up)
    grid = (len(rows), triton.cdiv(width // 2, _GATED_AT_ONCE))
    if out.numel():
        _silu_mul[grid](rows, rows.stride(0), out, width // 2, _GATED_AT_ONCE)
    return out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    rows, heads, width = x.shape
    if not x.numel():
        return
    heads_at_once, pairs = triton.next_power_of_2(min(heads, 16)), width // 2
    _rotate[(rows, triton.cdiv(heads, heads_at_once))](
        x, *x.stride(), cos.contiguous(), sin.contiguous(), heads, pairs,
        heads_at_once, triton.next_power_of_2(pairs), num_warps=2,
    )  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] with neighbours in a row side by side; a view where that can be."""
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _norm_rows(
    x: Tensor, delta: Tensor, total: Tensor, out: Tensor, weight: Tensor, eps: float, adds: bool
) -> None:
    rows, width = x.shape
    if not x.numel():
        return
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)
    _rms_norm[(rows,)](
        x, x.stride(0), delta, delta.stride(0), total, out, weight, eps, width, adds, block,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def _rms_norm(
    x, x_stride, delta, delta_stride, total, out, weight, eps, width,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; `total` and `out` have no gaps between rows."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if ADDS:
        change = tl.load(delta + row * delta_stride + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + change.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + at, value, mask=inside)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (scale * normed).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_mul(gate_up, stride, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    gated = silu(gate).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (gated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, row_stride, head_stride, stride, cos, sin, heads, pairs,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Some heads of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < pairs)
    even_at = x + row * row_stride + head * head_stride + 2 * pair * stride
    odd_at = even_at + stride
    even = tl.load(even_at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(odd_at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * pairs + pair, mask=pair < pairs, other=0.0)
    s = tl.load(sin + row * pairs + pair, mask=pair < pairs, other=0.0)
    tl.store(even_at, (even * c - odd * s).to(x.dtype.element_ty), mask=inside)
    tl.store(odd_at, (even * s + odd * c).to(x.dtype.element_ty), mask=inside)

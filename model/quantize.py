"""Weights and cached rows in fewer bits.

8-bit floats are e4m3 (four bits of exponent, three of mantissa, no infinities; largest 448). A
weight has an fp32 scale as a whole or for every block of 128 × 128 of it. Blocks at the right and
lower edge may be smaller: 576 and 10944 are no multiples of 128.

A cached row in 8-bit floats is bytes: the latent's elements in e4m3, an fp32 scale for every 128 of
them, then the rotated key in bf16, which 8 bits would hurt most. 512 + 4 · 4 + 2 · 64 = 656 bytes
with a latent of 512 and a key of 64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Weight(NamedTuple):
    """Weights in 8-bit floats: what an element stands for is `data` times its scale.

    Attributes:
        data: [..., outputs, inputs] float8_e4m3fn.
        scale: fp32; [...], one for each weight, or [..., ⌈outputs / 128⌉, ⌈inputs / 128⌉], one
            for each block.
    """

    data: Tensor
    scale: Tensor

    @property
    def by_block(self) -> bool:
        return self.scale.dim() == self.data.dim()

    @property
    def device(self) -> torch.device:
        return self.data.device


def block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of weights [..., outputs, inputs] that have one for each block."""
    *stack, outputs, inputs = shape
    return (*stack, -(-outputs // BLOCK), -(-inputs // BLOCK))


def fp8_per_block(weight: Tensor) -> Fp8Weight:
    """Weights [..., outputs, inputs] in 8-bit floats, a block's largest magnitude being 448."""
    *stack, outputs, inputs = weight.shape
    *_, rows, columns = block_shape(weight.shape)
    padded = F.pad(weight, (0, columns * BLOCK - inputs, 0, rows * BLOCK - outputs))
    blocks = padded.view(*stack, rows, BLOCK, columns, BLOCK)
    scale = _scale(blocks.abs().amax((-3, -1)))  # [..., rows, columns]
    data = _rounded(blocks, scale[..., :, None, :, None]).view(padded.shape)
    return Fp8Weight(data[..., :outputs, :inputs].contiguous(), scale)


def fp8_per_tensor(weight: Tensor) -> Fp8Weight:
    """Weights [..., outputs, inputs] in 8-bit floats, a weight's largest magnitude being 448."""
    scale = _scale(weight.abs().amax((-2, -1)))  # [...]
    return Fp8Weight(_rounded(weight, scale[..., None, None]), scale)


def fp8_by_row(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, D] in 8-bit floats, a row's largest magnitude being 448, and their scales [T]."""
    scale = _scale(rows.abs().amax(-1))
    return _rounded(rows, scale[:, None]), scale


def by_block(weight: Fp8Weight) -> Fp8Weight:
    """The same weights with a scale for each block, if they have but one."""
    if weight.by_block:
        return weight
    blocks = weight.scale[..., None, None].expand(block_shape(weight.data.shape))
    return Fp8Weight(weight.data, blocks.contiguous())


def from_fp8(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """The weights [..., outputs, inputs] that they stand for."""
    data, scale = weight
    if not weight.by_block:
        return (data.float() * scale[..., None, None]).to(dtype)
    outputs, inputs = data.shape[-2:]
    each = scale.repeat_interleave(BLOCK, -1)[..., :inputs]  # [..., rows, inputs]
    whole = torch.empty(data.shape, dtype=dtype, device=data.device)
    for row in range(scale.shape[-2]):
        at = slice(row * BLOCK, min(row * BLOCK + BLOCK, outputs))
        whole[..., at, :] = (data[..., at, :].float() * each[..., row, None, :]).to(dtype)
    return whole


def fp8_row_bytes(latent: int, rope: int) -> int:
    """Bytes of one cached row in 8-bit floats; `latent` is a multiple of 128."""
    return latent + 4 * (latent // BLOCK) + 2 * rope


def fp8_rows(rows: Tensor, row_bytes: int) -> Tensor:
    """Cache rows [..., latent + rope] as bytes [..., row_bytes] uint8."""
    latent = fp8_latent(rows.shape[-1], row_bytes)
    groups = rows[..., :latent].unflatten(-1, (-1, BLOCK)).float()
    scale = _scale(groups.abs().amax(-1))  # [..., latent / 128]
    parts = (
        _rounded(groups, scale[..., None]).flatten(-2),
        scale,
        rows[..., latent:].to(torch.bfloat16).contiguous(),
    )
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def from_fp8_rows(stored: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows [..., width] that bytes [..., row_bytes] stand for."""
    latent = fp8_latent(width, stored.shape[-1])
    sizes = (latent, 4 * (latent // BLOCK), 2 * (width - latent))
    data, scale, rope = (part.contiguous() for part in stored.split(sizes, dim=-1))
    groups = data.view(FP8).float().unflatten(-1, (-1, BLOCK))
    values = groups * scale.view(torch.float32)[..., None]
    return torch.cat((values.flatten(-2).to(dtype), rope.view(torch.bfloat16).to(dtype)), dim=-1)


def fp8_latent(width: int, row_bytes: int) -> int:
    """How many of a row's `width` elements are the latent, from how many bytes it takes.

    Solves latent + rope = width and latent + 4 latent / 128 + 2 rope = row_bytes.
    """
    return (2 * width - row_bytes) * 32 // 31


def _scale(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest.float() / FP8_MAX, 1.0)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and what they are worth, one scale a row, its largest magnitude being 127.

    Args:
        weight: [..., outputs, inputs].

    Returns:
        Numbers [..., outputs, inputs] int8, and scales [..., outputs] fp32.
    """
    scales = weight.abs().amax(-1).float() / 127  # [..., outputs]
    divisors = torch.where(scales > 0, scales, 1.0)[..., None]
    return (weight.float() / divisors).round_().to(torch.int8), scales


def from_int8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that they stand for."""
    return (numbers.float() * scales[..., None]).to(dtype)

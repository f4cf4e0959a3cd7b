"""Weights in fewer bits."""

import torch
from torch import Tensor


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

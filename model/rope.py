"""Rotary position embedding, with YaRN for contexts past the trained length."""

import math

import torch
from torch import Tensor

from model.config import RopeConfig


class Rope:
    """Angles of the rotary embedding; the rotation itself is `ops.rotate_`.

    Attributes:
        frequencies: [dim / 2] fp32, radians a position, of each pair of dimensions.
    """

    def __init__(self, config: RopeConfig, dim: int, device: torch.device | str) -> None:
        self._multiplier = config.cos_sin_multiplier
        self.frequencies = rope_frequencies(config, dim).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [T, dim / 2] fp32 each, of positions [T]."""
        angles = positions[:, None].float() * self.frequencies  # [T, dim / 2]
        return angles.cos() * self._multiplier, angles.sin() * self._multiplier


def rope_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """Radians a position for each of dim / 2 pairs, fp32.

    YaRN leaves pairs alone that turn more than `beta_fast` times over the trained length, slows
    pairs by `factor` that turn less than `beta_slow` times, and blends those between.
    """
    period = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.factor <= 1.0:
        return 1.0 / period
    low = max(math.floor(_pair_with_turns(config, dim, config.beta_fast)), 0)
    high = min(math.ceil(_pair_with_turns(config, dim, config.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    kept = 1.0 - ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return 1.0 / period * kept + 1.0 / (config.factor * period) * (1.0 - kept)


def _pair_with_turns(config: RopeConfig, dim: int, turns: float) -> float:
    """Which pair, as a real number, turns so many times over the trained length."""
    length = config.original_max_position_embeddings
    return dim * math.log(length / (turns * 2.0 * math.pi)) / (2.0 * math.log(config.theta))

"""The paged latent cache of one rank: what attention must remember of past tokens.

A row is one token in one layer: the normed latent, then the rotated key that all heads share.
A page is 64 consecutive tokens of one sequence, under the same id in every layer and on every
stage of a column. Page 0 is the dummy that padding writes to; nobody owns it.
"""

import torch
from torch import Tensor

from model.config import ModelConfig

PAGE_TOKENS = 64
DUMMY_PAGE = 0


class LatentCache:
    """`pages` pages, the dummy included, of `layers` layers in one tensor.

    Begins as zeros: rows that nobody wrote may be read under a mask, and must be finite.

    Attributes:
        rows: [layers, pages, 64, latent_dim] in `dtype`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.rows = torch.zeros(
            layers, pages, PAGE_TOKENS, config.latent_dim, dtype=dtype, device=device
        )

    def layer(self, index: int) -> Tensor:
        """The pages of one layer, counted from the stage's first: [pages, 64, latent_dim]."""
        return self.rows[index]


def bytes_per_page(config: ModelConfig, layers: int, dtype: torch.dtype) -> int:
    """What one page costs on a stage with so many layers."""
    return layers * PAGE_TOKENS * config.latent_dim * dtype.itemsize

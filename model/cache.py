"""The paged latent cache of one rank: what attention must remember of past tokens.

A row is one token in one layer: the normed latent, then the rotated key that all heads share.
A page is 64 consecutive tokens of one sequence, under the same id in every layer and on every
stage of a column. Page 0 is the dummy that padding writes to; nobody owns it.

In 8-bit floats a row is bytes, laid out as `model.quantize` says; only what writes and reads rows
knows of that.
"""

import torch
from torch import Tensor

from model.config import CheckpointError, ModelConfig
from model.quantize import BLOCK, FP8, fp8_row_bytes

PAGE_TOKENS = 64
DUMMY_PAGE = 0


class LatentCache:
    """`pages` pages, the dummy included, of `layers` layers in one tensor.

    Begins as zeros: rows that nobody wrote may be read under a mask, and must be finite.

    Attributes:
        rows: [layers, pages, 64, latent_dim] in `dtype`; for float8_e4m3fn [layers, pages, 64,
            bytes of a row] uint8.

    Raises:
        CheckpointError: 8-bit floats, and a latent that is no multiple of 128.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        elements, stored = _row(config, dtype)
        self.rows = torch.zeros(layers, pages, PAGE_TOKENS, elements, dtype=stored, device=device)

    def layer(self, index: int) -> Tensor:
        """The pages of one layer, counted from the stage's first: [pages, 64, row]."""
        return self.rows[index]


def bytes_per_page(config: ModelConfig, layers: int, dtype: torch.dtype) -> int:
    """What one page costs on a stage with so many layers.

    Raises:
        CheckpointError: as for `LatentCache`.
    """
    elements, stored = _row(config, dtype)
    return layers * PAGE_TOKENS * elements * stored.itemsize


def _row(config: ModelConfig, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """How many elements of which type a row is."""
    if dtype != FP8:
        return config.latent_dim, dtype
    if config.kv_lora_rank % BLOCK:
        raise CheckpointError(
            f"a cache in 8-bit floats scales {BLOCK} elements at a time, and a latent has "
            f"{config.kv_lora_rank}: set gang.cache_dtype to auto"
        )
    return fp8_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim), torch.uint8

"""Attention over pages by FlashMLA, where that is installed.

It is for bf16 on Hopper GPUs, with latents of 512 and rotated keys of 64. What it does not take is
left to our own kernels.
"""

import importlib
import importlib.util
from functools import cache as remembered
from types import ModuleType

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import triton_latents

_WIDTHS = (576, 512)


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    taken = (query.shape[-1], value_dim) == _WIDTHS and query.dtype == cache.dtype == torch.bfloat16
    library = _flash_mla() if taken and cache.shape[1] == PAGE_TOKENS else None
    if library is None:
        return triton_latents.attend_pages(query, cache, pages, lengths, value_dim, scale)
    keys = lengths.to(torch.int32)
    # Older versions plan with these arguments; newer ones ignore them and plan when called.
    plan, splits = library.get_mla_metadata(keys, query.shape[1], 1)
    out, _ = library.flash_mla_with_kvcache(
        query[:, None],
        cache[:, :, None],
        pages.to(torch.int32),
        keys,
        value_dim,
        plan,
        splits,
        softmax_scale=scale,
    )
    return out[:, 0]


@remembered
def _flash_mla() -> ModuleType | None:
    installed = importlib.util.find_spec("flash_mla") is not None
    return importlib.import_module("flash_mla") if installed else None

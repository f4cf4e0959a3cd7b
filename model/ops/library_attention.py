"""Attention by other people's kernels for GPUs, to be forced where they are faster.

A chunk goes through torch's flash attention. Pages go through FlashMLA, where that is installed:
for bf16 on Hopper GPUs, with latents of 512 and rotated keys of 64. What either does not take is
left to our own kernels.
"""

import importlib
import importlib.util
from functools import cache as remembered
from types import ModuleType

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import triton_attention, triton_latents
from model.ops.one_width import heads_first, one_width

_FLASH_MLA_WIDTHS = (576, 512)
_HALVES = (torch.bfloat16, torch.float16)
_flash = torch.ops.aten._scaled_dot_product_flash_attention


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if query.dtype not in _HALVES:
        return triton_attention.attend(query, key, shared_key, value, scale, causal)
    keys, values = one_width(key, shared_key, value)
    inputs = (heads_first(each) for each in (query, keys, values))
    out, lse, *_ = _flash(*inputs, is_causal=causal, scale=scale)
    return out[0].transpose(0, 1)[..., -value.shape[-1] :], lse[0].t()


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    widths = (query.shape[-1], value_dim)
    taken = widths == _FLASH_MLA_WIDTHS and query.dtype == cache.dtype == torch.bfloat16
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

"""A chunk's attention by torch's flash attention for GPUs.

What that does not take is left to our own kernels.
"""

import torch
from torch import Tensor

from model.ops import triton_attention
from model.ops.one_width import heads_first, one_width

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

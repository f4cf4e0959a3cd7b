"""FlashInfer's wrapper for latent attention: its documented signature and demands, in plain torch.

https://docs.flashinfer.ai/api/mla.html
"""

from typing import Any

import torch
from torch import Tensor

from model.ops import reference


class BatchMLAPagedAttentionWrapper:
    made = 0
    plans = 0

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        type(self).made += 1
        assert float_workspace_buffer.dtype in (torch.uint8, torch.int8)
        assert float_workspace_buffer.numel() >= 128 * 2**20
        self.fixed = use_cuda_graph
        given = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        assert all((each is not None) == use_cuda_graph for each in given)
        self.buffers: list[Any] = list(given)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        type(self).plans += 1
        given = [qo_indptr, kv_indptr, kv_indices, kv_len_arr]
        for each in given:
            assert each.dtype == torch.int32
            assert each.dim() == 1
            assert each.is_contiguous()
        batch = len(kv_len_arr)
        assert qo_indptr.tolist() == list(range(batch + 1))
        assert len(kv_indptr) == batch + 1
        assert kv_indptr.diff().tolist() == [-(-length // page_size) for length in kv_len_arr]
        assert len(kv_indices) == kv_indptr[-1]
        assert not causal
        assert not use_profiler
        assert q_data_type == kv_data_type == torch.bfloat16
        if self.fixed:
            assert [len(self.buffers[each]) for each in (0, 1, 3)] == [batch + 1, batch + 1, batch]
            for buffer, each in zip(self.buffers, given, strict=True):
                buffer[: len(each)].copy_(each)
        else:
            self.buffers = given
        self.widths = (num_heads, head_dim_ckv, head_dim_kpe, page_size)
        self.scale = sm_scale

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
    ) -> Tensor:
        heads, latent, rope, page = self.widths
        _, starts, indices, lengths = self.buffers
        batch = len(lengths)
        assert q_nope.shape == (batch, heads, latent)
        assert q_pe.shape == (batch, heads, rope)
        assert ckv_cache.shape[1:] == (page, latent)
        assert kpe_cache.shape[1:] == (page, rope)
        assert out is lse is kv_len is page_table is None
        assert not return_lse
        query, cache = torch.cat((q_nope, q_pe), -1), torch.cat((ckv_cache, kpe_cache), -1)
        found = []
        for row, (length, start) in enumerate(zip(lengths, starts, strict=False)):
            keys = cache[indices[start : start + -(-int(length) // page)].long()].flatten(0, 1)
            asked = query[row : row + 1]
            found.append(reference.attend_latents(asked, keys[:length], latent, self.scale)[0])
        return torch.cat(found)

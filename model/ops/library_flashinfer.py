"""Attention over pages by FlashInfer's `BatchMLAPagedAttentionWrapper`.

It is for bf16, with latents of 512 and rotated keys of 64; what it does not take is left to our own
kernels. It plans on the host which multiprocessor does what, from the lengths: once for a step, all
layers of which use the plan, and before each replay of a graph, whose kernels read it where it was
when they were recorded. A plan has 8 MB of the device for itself, or twice that; all share the
memory in which parts of results meet.
"""

import importlib
from dataclasses import dataclass, field
from functools import cache as remembered
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import triton_latents

_WIDTHS = (576, 512)
_SHARED_BYTES = 128 * 2**20


class _Shape(NamedTuple):
    """What else a plan depends on; the same for all layers."""

    heads: int
    value_dim: int
    rope: int
    scale: float


@dataclass(slots=True)
class _Tables:
    """Page tables, and the plan for what they last held."""

    pages: Tensor
    lengths: Tensor
    wrapper: Any
    shape: _Shape | None = None
    fresh: bool = False

    def planned(self, shape: _Shape) -> Any:
        """The wrapper, ready to run."""
        if not self.fresh or self.shape != shape:
            if _capturing(self.pages):
                raise RuntimeError("FlashInfer cannot plan while a graph is being recorded")
            self._plan(shape)
        return self.wrapper

    def renew(self) -> None:
        """The tables hold something else."""
        self.fresh = False
        if self.shape is not None:
            self._plan(self.shape)

    def _plan(self, shape: _Shape) -> None:
        lengths = self.lengths.cpu().to(torch.int32)
        batch, width = self.pages.shape
        counts = (lengths + (PAGE_TOKENS - 1)) // PAGE_TOKENS
        starts = torch.zeros(batch + 1, dtype=torch.int32)
        starts[1:] = counts.cumsum(0)
        used = (torch.arange(width) < counts[:, None]).flatten().nonzero()[:, 0]
        self.wrapper.plan(
            qo_indptr=torch.arange(batch + 1, dtype=torch.int32),
            kv_indptr=starts,
            kv_indices=self.pages.flatten()[used.to(self.pages.device)].to(torch.int32),
            kv_len_arr=lengths,
            num_heads=shape.heads,
            head_dim_ckv=shape.value_dim,
            head_dim_kpe=shape.rope,
            page_size=PAGE_TOKENS,
            causal=False,
            sm_scale=shape.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        self.shape, self.fresh = shape, True


_Key = tuple[int, torch.Size, int]


@dataclass(slots=True)
class _Plans:
    """Of one device: those of graphs, by where their tables are, and that of the current step."""

    shared: Tensor
    kept: dict[_Key, _Tables] = field(default_factory=dict)
    current: _Tables | None = None

    def keep(self, pages: Tensor, lengths: Tensor) -> None:
        """From now on there is a plan for tables that stay where they are."""
        wrapper = _static_wrapper(pages, self.shared)
        self.kept[_key(pages, lengths)] = _Tables(pages, lengths, wrapper)

    def begin(self, pages: Tensor, lengths: Tensor) -> _Tables:
        """The tables of a new step, over the wrapper of the last one."""
        wrapper = self.current.wrapper if self.current is not None else _library()(self.shared)
        self.current = _Tables(pages, lengths, wrapper)
        return self.current

    def of(self, pages: Tensor, lengths: Tensor) -> _Tables:
        """What is known of these tables."""
        if (tables := self.kept.get(_key(pages, lengths))) is not None:
            return tables
        if self.current is not None and self.current.pages is pages:
            return self.current
        return self.begin(pages, lengths)  # nobody told


def plan_pages(pages: Tensor, lengths: Tensor, kept: bool = False) -> None:
    if _capturing(pages):
        return  # they were told of before, and are planned
    plans = _plans(pages.device)
    key = _key(pages, lengths)
    if kept and key not in plans.kept:
        plans.keep(pages, lengths)
    if key in plans.kept:
        plans.kept[key].renew()
    else:
        plans.begin(pages, lengths)


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    taken = (query.shape[-1], value_dim) == _WIDTHS and query.dtype == cache.dtype == torch.bfloat16
    if not taken or cache.shape[1] != PAGE_TOKENS:
        return triton_latents.attend_pages(query, cache, pages, lengths, value_dim, scale)
    tables = _plans(pages.device).of(pages, lengths)
    rope = query.shape[-1] - value_dim
    wrapper = tables.planned(_Shape(query.shape[1], value_dim, rope, scale))
    out: Tensor = wrapper.run(
        q_nope=query[..., :value_dim],
        q_pe=query[..., value_dim:],
        ckv_cache=cache[..., :value_dim],
        kpe_cache=cache[..., value_dim:],
    )
    return out


def _key(pages: Tensor, lengths: Tensor) -> _Key:
    return pages.data_ptr(), pages.shape, lengths.data_ptr()


def _static_wrapper(pages: Tensor, shared: Tensor) -> Any:
    """A wrapper whose kernels can be recorded: its inputs stay where they are."""
    batch, width = pages.shape

    def buffer(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=pages.device)

    return _library()(
        shared,
        use_cuda_graph=True,
        qo_indptr=buffer(batch + 1),
        kv_indptr=buffer(batch + 1),
        kv_indices=buffer(batch * width),
        kv_len_arr=buffer(batch),
    )


@remembered
def _plans(device: torch.device) -> _Plans:
    return _Plans(torch.empty(_SHARED_BYTES, dtype=torch.uint8, device=device))


@remembered
def _library() -> Any:
    return importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

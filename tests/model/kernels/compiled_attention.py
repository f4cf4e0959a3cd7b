"""The attention kernels at the sizes of the real models, compiled for a Hopper GPU."""

from typing import Any

import pytest
import torch

from model.cache import PAGE_TOKENS
from model.ops import triton_attention, triton_cache, triton_latents
from model.quantize import fp8_row_bytes

BF16 = torch.bfloat16
VALUE, ROPE = 512, 64
WARP_GROUP_PRODUCT, WARP_PRODUCT = "wgmma.mma_async", "mma.sync"


def plain_cache(pages: int) -> torch.Tensor:
    return torch.zeros(pages, PAGE_TOKENS, VALUE + ROPE, dtype=BF16)


def quantized_cache(pages: int) -> torch.Tensor:
    return torch.zeros(pages, PAGE_TOKENS, fp8_row_bytes(VALUE, ROPE), dtype=torch.uint8)


@pytest.mark.parametrize("cache", [plain_cache(9), quantized_cache(9)], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("heads", "product"), [(16, WARP_PRODUCT), (128, WARP_GROUP_PRODUCT)])
def test_attention_over_pages(
    cache: torch.Tensor, heads: int, product: str, compiled: list[Any]
) -> None:
    query = torch.zeros(2, heads, VALUE + ROPE, dtype=BF16)
    pages, lengths = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    parts = triton_cache.parts_of(cache, VALUE)
    triton_latents.attend_parts(query, parts, VALUE, 0.1, pages, lengths, splits=4)
    split, merge = compiled
    assert product in split.asm["ptx"]
    assert "cp.async" in split.asm["ptx"]
    assert merge.metadata.shared < 2**14


def test_attention_over_latents_in_one_piece(compiled: list[Any]) -> None:
    query, latents = torch.zeros(8, 16, VALUE + ROPE).to(BF16), plain_cache(2).flatten(0, 1)
    triton_latents.attend_latents(query, latents, VALUE, 0.1)
    assert WARP_GROUP_PRODUCT in compiled[0].asm["ptx"]


@pytest.mark.parametrize(("queries", "causal"), [(40, True), (200, True), (200, False)])
def test_attention_of_a_chunk(queries: int, causal: bool, compiled: list[Any]) -> None:
    query, value = (torch.zeros(queries, 2, width, dtype=BF16) for width in (192, 128))
    shared_key = torch.zeros(queries, ROPE, dtype=BF16)
    triton_attention.attend(query, value, shared_key, value, 0.1, causal)
    assert WARP_GROUP_PRODUCT in compiled[0].asm["ptx"]


def test_merges_and_rows_of_the_cache(compiled: list[Any]) -> None:
    out, lse = torch.zeros(3, 16, 128, dtype=BF16), torch.zeros(3, 16)
    triton_attention.merge(out, lse, out, lse)
    slots, rows = torch.arange(3), torch.zeros(3, VALUE + ROPE, dtype=BF16)
    for cache in (plain_cache(1), quantized_cache(1)):
        triton_cache.write_rows(cache, slots, rows)
        triton_cache.read_rows(cache, slots, rows)
    assert len(compiled) == 5

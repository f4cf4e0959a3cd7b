"""Rows written to the cache and read back."""

import pytest
import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import reference, triton_cache
from model.quantize import BLOCK, FP8, fp8_row_bytes

LATENT, ROPE = 256, 16


def exact_rows(count: int) -> Tensor:
    """Rows that 8-bit floats hold exactly: each group's largest is 448 times a power of two.

    The interpreter does not round to 8 bits as hardware does, so that is left to tests/gpu.
    """
    numbers = torch.randint(0, 256, (count, LATENT), dtype=torch.uint8)
    numbers[numbers & 0x7F == 0x7F] = 0  # NaN
    numbers[:, ::BLOCK] = 0x7E  # 448
    worth = 2.0 ** torch.randint(-3, 4, (count, LATENT // BLOCK))
    latents = numbers.view(FP8).float() * worth.repeat_interleave(BLOCK, -1)
    return torch.cat((latents, torch.randn(count, ROPE).bfloat16().float()), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_read_back_from_their_slots_and_no_other_is_touched(dtype: torch.dtype) -> None:
    cache = torch.full((3, PAGE_TOKENS, 40), 7.0, dtype=torch.float16)
    slots, rows = torch.tensor([70, 3, 191]), torch.randn(3, 60).to(dtype)[:, 20:]
    triton_cache.write_rows(cache, slots, rows)
    read = triton_cache.read_rows(cache, slots, rows)
    assert read.dtype == dtype
    assert torch.equal(read, rows.half().to(dtype))
    assert (cache.flatten(0, 1) == 7.0).all(-1).sum() == 3 * PAGE_TOKENS - 3


def test_rows_in_8_bit_floats_are_laid_out_as_the_reference_does() -> None:
    caches = [torch.zeros(2, PAGE_TOKENS, fp8_row_bytes(LATENT, ROPE), dtype=torch.uint8)
              for _ in range(2)]  # fmt: skip
    slots, rows = torch.tensor([70, 3, 127, 0]), exact_rows(4)
    rows[3, :BLOCK] = 0.0  # a group of which nothing can be said but its zeros
    for cache, kind in zip(caches, (triton_cache, reference), strict=True):
        kind.write_rows(cache, slots, rows)
    assert torch.equal(*caches)
    assert torch.equal(triton_cache.read_rows(caches[0], slots, rows), rows)


def test_groups_that_make_no_tile_are_left_to_the_reference() -> None:
    latent = 3 * BLOCK
    cache = torch.zeros(1, PAGE_TOKENS, fp8_row_bytes(latent, ROPE), dtype=torch.uint8)
    slots, rows = torch.tensor([5, 9]), torch.randn(2, latent + ROPE)
    triton_cache.write_rows(cache, slots, rows)
    read = triton_cache.read_rows(cache, slots, rows)
    assert torch.equal(read, reference.read_rows(cache, slots, rows))
    torch.testing.assert_close(read, rows, rtol=0.07, atol=1e-2)

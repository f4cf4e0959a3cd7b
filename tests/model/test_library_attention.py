"""Other people's attention kernels, called as they say they want to be called."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import library_attention, library_flash_mla, reference

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def chunk(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = torch.randn(9, 2, 192, dtype=BF16, device=device)
    key, value = (torch.randn(9, 2, 128, dtype=BF16, device=device) for _ in range(2))
    return query, key, torch.randn(9, 64, dtype=BF16, device=device), value


def test_a_chunk_has_the_form_that_torch_takes_on_gpus() -> None:
    out, lse = library_attention.attend(*chunk("meta"), 0.1, True)
    assert (out.shape, out.dtype) == ((9, 2, 128), BF16)
    assert (lse.shape, lse.dtype) == ((9, 2), torch.float32)


def test_a_chunk_is_attended_to_although_values_are_narrower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(library_attention, "_flash", flash)
    inputs = chunk("cpu")
    found = library_attention.attend(*inputs, 0.1, True)
    for each, wanted in zip(found, reference.attend(*inputs, 0.1, True), strict=True):
        torch.testing.assert_close(each, wanted, rtol=2e-2, atol=2e-2)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: object,
    num_splits: object = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's signature and demands, computed by the reference."""
    assert q.shape[1] == k_cache.shape[2] == 1
    assert k_cache.shape[1] == PAGE_TOKENS
    assert q.dtype == k_cache.dtype == BF16
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert (tile_scheduler_metadata, num_splits) == ("plan", None)
    assert softmax_scale is not None
    out = reference.attend_pages(
        q[:, 0], k_cache[:, :, 0], block_table, cache_seqlens, head_dim_v, softmax_scale
    )
    return out[:, None], torch.empty(0)


def test_pages_have_the_form_that_flash_mla_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        get_mla_metadata=lambda lengths, queries, keys: ("plan", None),
        flash_mla_with_kvcache=flash_mla_with_kvcache,
    )
    monkeypatch.setattr(library_flash_mla, "_flash_mla", lambda: library)
    cache = torch.randn(5, PAGE_TOKENS, 576, dtype=BF16)
    query, pages = torch.randn(2, 16, 576, dtype=BF16), torch.tensor([[3, 1], [2, 0]])
    inputs = (query, cache, pages, torch.tensor([100, 64]), 512, 0.05)
    assert torch.equal(library_flash_mla.attend_pages(*inputs), reference.attend_pages(*inputs))


@pytest.mark.parametrize("installed", [True, False])
def test_what_flash_mla_does_not_take_or_is_not_there_for_is_left_to_our_own(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        library_flash_mla, "_flash_mla", lambda: SimpleNamespace() if installed else None
    )
    asked = []
    monkeypatch.setattr(
        library_flash_mla.triton_latents, "attend_pages", lambda *inputs: asked.append(inputs)
    )
    width, dtype = (48, torch.float32) if installed else (576, BF16)
    cache, query = (torch.zeros(shape, dtype=dtype) for shape in ((2, 64, width), (1, 4, width)))
    library_flash_mla.attend_pages(
        query, cache, torch.ones(1, 1), torch.ones(1), width - 16 if installed else 512, 1.0
    )
    assert len(asked) == 1

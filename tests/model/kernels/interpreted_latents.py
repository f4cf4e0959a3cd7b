"""Absorbed attention over pages and over latents in one piece, against fp64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import reference, triton_latents
from model.ops.triton_cache import parts_of, write_rows
from model.quantize import fp8_row_bytes
from tests.model.kernels import exact
from tests.model.kernels.exact import error

VALUE, ROPE, SCALE = 32, 16, 0.3
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = list(TOLERANCES)
PAGES = [[3, 1, 7], [2, 5, 0], [8, 9, 0], [4, 0, 0], [6, 0, 0], [0, 0, 0]]
LENGTHS = [150, 128, 65, 64, 3, 1]  # the last is padding, on the dummy page


def poisoned(cache: Tensor, pages: Tensor, lengths: Sequence[int]) -> Tensor:
    """The cache with NaN in every row that nobody sees."""
    seen = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for table, length in zip(pages, lengths, strict=True):
        for position in range(length):
            seen[table[position // PAGE_TOKENS], position % PAGE_TOKENS] = True
    return torch.where(seen[..., None], cache, float("nan"))


def case(heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pages, lengths = torch.tensor(PAGES), torch.tensor(LENGTHS)
    cache = torch.randn(10, PAGE_TOKENS, VALUE + ROPE).to(dtype)
    query = torch.randn(len(PAGES), heads, VALUE + ROPE).to(dtype)
    return query, poisoned(cache, pages, LENGTHS), pages, lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "slots"), [(4, 1), (16, 30), (128, 3)])
def test_pages_are_attended_to_whatever_the_splits(
    heads: int, slots: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, cache, pages, lengths = case(heads, dtype)
    expected, _ = exact.attend_pages(query, cache, pages, lengths, VALUE, SCALE)
    monkeypatch.setattr(triton_latents, "_multiprocessors", lambda device: slots)
    out = triton_latents.attend_pages(query, cache, pages, lengths, VALUE, SCALE)
    assert out.dtype == dtype
    assert error(out, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("splits", [1, 2, 5, 13])
def test_more_splits_than_there_is_to_see_change_nothing(splits: int) -> None:
    query, cache, pages, lengths = case(4, torch.float32)
    parts = parts_of(cache, VALUE)
    expected = exact.attend_pages(query, cache, pages, lengths, VALUE, SCALE)
    found = triton_latents.attend_parts(query, parts, VALUE, SCALE, pages, lengths, splits)
    for each, wanted in zip(found, expected, strict=True):
        assert error(each, wanted) <= 1e-5


def test_wider_page_tables_change_nothing() -> None:
    query, cache, pages, lengths = case(4, torch.float32)
    parts, wide = parts_of(cache, VALUE), torch.nn.functional.pad(pages, (0, 60))
    found = [
        triton_latents.attend_parts(query, parts, VALUE, SCALE, table, lengths, 3)[0]
        for table in (pages, wide)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(("heads", "dtype"), [(4, torch.float32), (64, torch.float16)])
def test_pages_in_8_bit_floats_are_what_they_stand_for(heads: int, dtype: torch.dtype) -> None:
    value_dim = 256
    query, _, pages, lengths = case(heads, dtype)
    query = torch.randn(*query.shape[:2], value_dim + ROPE).to(dtype)
    row = fp8_row_bytes(value_dim, ROPE)
    cache = torch.full((10, PAGE_TOKENS, row), 0xFF, dtype=torch.uint8)  # NaN, all of it
    slots = torch.cat(
        [
            (table[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[:length]
            for table, length in zip(pages, LENGTHS, strict=True)
        ]
    )
    write_rows(cache, slots, torch.randn(len(slots), value_dim + ROPE))
    expected, _ = exact.attend_pages(query, cache, pages, lengths, value_dim, 0.1)
    out = triton_latents.attend_pages(query, cache, pages, lengths, value_dim, 0.1)
    assert error(out, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 100), (30, 64)])
def test_latents_in_one_piece(queries: int, keys: int, dtype: torch.dtype) -> None:
    query = torch.randn(queries, 3, VALUE + ROPE).to(dtype)
    latents = torch.randn(keys, VALUE + ROPE).to(dtype)
    expected = exact.attend_latents(query, latents, VALUE, SCALE)
    found = triton_latents.attend_latents(query, latents, VALUE, SCALE)
    for each, wanted in zip(found, expected, strict=True):
        assert error(each, wanted) <= TOLERANCES[dtype]


def test_a_row_without_numbers_spoils_only_its_own_sequence() -> None:
    query, cache, pages, lengths = case(4, torch.float32)
    cache[1, 5] = float("nan")  # seen by the first sequence alone
    out = triton_latents.attend_pages(query, cache, pages, lengths, VALUE, SCALE)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_widths_that_make_no_tile_are_left_to_the_reference() -> None:
    query, latents = torch.randn(2, 3, 40), torch.randn(9, 40)
    found = triton_latents.attend_latents(query, latents, 32, SCALE)
    expected = reference.attend_latents(query, latents, 32, SCALE)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("programs", "tokens", "slots", "splits"),
    [(64, 8192, 264, 4), (128, 8192, 132, 1), (1, 1024, 264, 32), (1, 64, 264, 1), (300, 64, 8, 1)],
)
def test_splits_fill_the_device(programs: int, tokens: int, slots: int, splits: int) -> None:
    assert triton_latents.splits_for(programs, tokens, 32, slots) == splits

"""Attention kernels as a GPU runs them, at the widths of the real models, against fp64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model import ops
from model.cache import PAGE_TOKENS
from model.ops import choice, reference
from model.quantize import fp8_row_bytes
from tests.model.kernels import exact
from tests.model.kernels.exact import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")
VALUE, ROPE, SCALE = 512, 64, 0.1147
LENGTHS = [3001, 1024, 640, 128, 65, 64, 63, 1]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seeded_and_undone() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    ops.choose("cuda", "auto")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors begin as NaN: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def page_tables(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Tables padded with the dummy page, over pages in disorder; and the lengths."""
    needed = [-(-length // PAGE_TOKENS) for length in lengths]
    order = (torch.randperm(sum(needed)) + 1).split(needed)
    tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    return tables.to(CUDA), torch.tensor(lengths, device=CUDA)


def rows_seen(tables: Tensor, lengths: list[int]) -> Tensor:
    """Slots of every row that somebody sees."""
    places = torch.arange(PAGE_TOKENS, device=CUDA)
    slots = (tables[..., None] * PAGE_TOKENS + places).flatten(1)
    return torch.cat([row[:length] for row, length in zip(slots, lengths, strict=True)])


def poisoned_cache(dtype: torch.dtype, tables: Tensor, lengths: list[int]) -> Tensor:
    """Random rows where somebody sees them, NaN elsewhere."""
    pages = int(tables.max()) + 1
    if dtype == torch.uint8:
        row = fp8_row_bytes(VALUE, ROPE)
        cache = torch.full((pages, PAGE_TOKENS, row), 0xFF, dtype=dtype, device=CUDA)
    else:
        shape = (pages, PAGE_TOKENS, VALUE + ROPE)
        cache = torch.full(shape, float("nan"), dtype=dtype, device=CUDA)
    slots = rows_seen(tables, lengths)
    ops.write_rows(cache, slots, torch.randn(len(slots), VALUE + ROPE, device=CUDA))
    return cache


def test_a_gpu_prefers_our_own_kernels() -> None:
    modules = {each.__module__ for each in choice.implementations("cuda").values()}
    assert {"model.ops.triton_latents", "model.ops.triton_attention"} <= modules


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.uint8])
@pytest.mark.parametrize("heads", [4, 16, 128])
def test_pages_are_attended_to(heads: int, dtype: torch.dtype) -> None:
    computed = torch.bfloat16 if dtype == torch.uint8 else dtype
    tables, lengths = page_tables(LENGTHS)
    cache = poisoned_cache(dtype, tables, LENGTHS)
    query = torch.randn(len(LENGTHS), heads, VALUE + ROPE, device=CUDA).to(computed)
    with poisoned_memory():
        out = ops.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
    assert out.dtype == computed
    expected, _ = exact.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
    assert error(out, expected) <= TOLERANCES[computed]


def test_128_ki_of_context() -> None:
    longest = [131_072, 1]
    tables, lengths = page_tables(longest)
    cache = poisoned_cache(torch.bfloat16, tables, longest)
    query = torch.randn(2, 16, VALUE + ROPE, device=CUDA).bfloat16()
    out = ops.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
    expected, _ = exact.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
    assert error(out, expected) <= 1e-2


def test_one_recorded_launch_serves_all_lengths() -> None:
    tables, lengths = page_tables([2048] * 4)
    cache = torch.randn(int(tables.max()) + 1, PAGE_TOKENS, VALUE + ROPE, device=CUDA).bfloat16()
    query = torch.randn(4, 16, VALUE + ROPE, device=CUDA).bfloat16()
    ops.attend_pages(query, cache, tables, lengths, VALUE, SCALE)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
    for now in ([2048, 1999, 64, 1], [1, 1, 1, 1], [700, 65, 64, 63]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        expected, _ = exact.attend_pages(query, cache, tables, lengths, VALUE, SCALE)
        assert error(out, expected) <= 1e-2


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 1000), (169, 333)])
def test_latents_are_attended_to(queries: int, keys: int, dtype: torch.dtype) -> None:
    query = torch.randn(queries, 16, VALUE + ROPE, device=CUDA).to(dtype)
    latents = torch.randn(keys, VALUE + ROPE, device=CUDA).to(dtype)
    with poisoned_memory():
        found = ops.attend_latents(query, latents, VALUE, SCALE)
    expected = exact.attend_latents(query, latents, VALUE, SCALE)
    for each, wanted in zip(found, expected, strict=True):
        assert error(each, wanted) <= TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("auto", torch.float32), ("auto", torch.bfloat16), ("library", torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(1, 1, True), (63, 63, True), (500, 500, True), (20, 700, False), (300, 65, False)],
)
def test_a_chunk_is_attended_to(
    queries: int, keys: int, causal: bool, kind: str, dtype: torch.dtype
) -> None:
    ops.choose("cuda", kind, ["attend"])
    query = torch.randn(queries, 4, 192, device=CUDA).to(dtype)
    both = torch.randn(keys, 4 * 256, device=CUDA).to(dtype)
    key, value = (part.unflatten(-1, (4, 128)) for part in both.chunk(2, dim=-1))
    shared_key = torch.randn(keys, VALUE + ROPE, device=CUDA).to(dtype)[:, VALUE:]
    inputs = (query, key, shared_key, value)
    with poisoned_memory():
        found = ops.attend(*inputs, SCALE, causal)
    expected = exact.attend(*inputs, SCALE, causal)
    for each, wanted in zip(found, expected, strict=True):
        assert error(each, wanted) <= TOLERANCES[dtype]
    with poisoned_memory():
        merged = ops.merge(*found, *found)
    for each, wanted in zip(merged, reference.merge(*expected, *expected), strict=True):
        assert error(each, wanted) <= TOLERANCES[dtype]


def test_rows_in_8_bit_floats_are_as_near_as_8_bits_allow() -> None:
    slots = torch.tensor([70, 3, 127], device=CUDA)
    rows = torch.randn(3, VALUE + ROPE, device=CUDA).bfloat16()
    rows[1, :128] = 0.0
    cache = torch.zeros(2, PAGE_TOKENS, fp8_row_bytes(VALUE, ROPE), dtype=torch.uint8, device=CUDA)
    ops.write_rows(cache, slots, rows)
    read = ops.read_rows(cache, slots, rows.float())
    assert torch.equal(read, reference.read_rows(cache, slots, rows.float()))
    assert torch.equal(read[:, VALUE:], rows[:, VALUE:].float())
    # Half a step of three bits of mantissa, or of the least number that a scale leaves.
    allowed = rows.float().abs() / 16 + rows.float().abs().max() / 448 * 2**-10
    assert ((read - rows.float()).abs() <= 1.001 * allowed).all()

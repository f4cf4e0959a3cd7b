"""Expanded attention over a chunk and the merge of two attentions, against fp64."""

import pytest
import torch
from torch import Tensor

from model.ops import reference, triton_attention
from tests.model.kernels import exact
from tests.model.kernels.exact import error

SCALE = 0.3
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = list(TOLERANCES)


def chunk(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, shared keys and values, each a view into something wider."""
    query = torch.randn(queries, 3, 48).to(dtype)
    expanded = torch.randn(keys, 3 * 64).to(dtype)  # keys of all heads, then values of all heads
    key, value = (part.unflatten(-1, (3, 32)) for part in expanded.chunk(2, dim=-1))
    shared_key = torch.randn(keys, 80).to(dtype)[:, 64:]
    return query, key, shared_key, value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        (1, 1, True),
        (64, 64, True),
        (70, 70, True),
        (130, 130, True),
        (5, 130, False),
        (130, 64, False),
        (33, 1, False),
    ],
)
def test_a_chunk_is_attended_to(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = chunk(queries, keys, dtype)
    expected = exact.attend(*inputs, SCALE, causal)
    out, lse = triton_attention.attend(*inputs, SCALE, causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert error(out, expected[0]) <= TOLERANCES[dtype]
    assert error(lse, expected[1]) <= TOLERANCES[dtype]


def test_a_query_without_numbers_spoils_no_other() -> None:
    query, *rest = chunk(40, 40, torch.float32)
    query[4, 1, 0] = float("nan")
    out, _ = triton_attention.attend(query, *rest, SCALE, True)
    assert out[4, 1].isnan().all()
    assert out.isnan().sum() == 32


def test_widths_that_make_no_tile_are_left_to_the_reference() -> None:
    query, key, shared_key, value = chunk(4, 4, torch.float32)
    inputs = (query[..., :40], key[..., :24], shared_key, value)
    found = triton_attention.attend(*inputs, SCALE, True)
    expected = reference.attend(*inputs, SCALE, True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_attentions_merge_into_one_whatever_their_strides(dtype: torch.dtype) -> None:
    inputs = chunk(6, 50, dtype)
    query, keys = inputs[0], inputs[1:]
    halves = [
        reference.attend(query, *(each[part] for each in keys), SCALE, False)
        for part in (slice(20), slice(20, 50))
    ]
    (out, lse), (other, other_lse) = halves
    other = other.transpose(0, 1).contiguous().transpose(0, 1)  # as products by head leave it
    merged, total = triton_attention.merge(out, lse, other, other_lse)
    expected = exact.attend(*inputs, SCALE, False)
    assert merged.dtype == dtype
    assert error(merged, expected[0]) <= TOLERANCES[dtype]
    assert error(total, expected[1]) <= TOLERANCES[dtype]


def test_an_attention_that_weighs_nothing_leaves_the_other_as_it_is() -> None:
    out, lse = torch.randn(2, 3, 20), torch.tensor([[90.0, 0.0, -90.0], [5.0, 1.0, 2.0]])
    merged, total = triton_attention.merge(out, lse, torch.randn(2, 3, 20), lse - 200)
    assert torch.equal(merged, out)
    assert torch.equal(total, lse)

"""Operations: kernels of this device against the reference, the reference against arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ops
from model.ops import library, reference

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "causal"), [(70, 70, True), (5, 130, False)])
def test_attend_equals_the_reference(
    queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    query = torch.randn(queries, 3, 48, dtype=dtype)
    key, shared = torch.randn(keys, 3, 32, dtype=dtype), torch.randn(keys, 16, dtype=dtype)
    value = torch.randn(keys, 3, 24, dtype=dtype)
    out, lse = ops.attend(query, key, shared, value, 0.1, causal)
    expected, expected_lse = reference.attend(query, key, shared, value, 0.1, causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(out, expected, dtype)
    close(lse, expected_lse, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_latents_equals_the_reference(dtype: torch.dtype) -> None:
    query, latents = torch.randn(7, 3, 40, dtype=dtype), torch.randn(100, 40, dtype=dtype)
    out, lse = ops.attend_latents(query, latents, 32, 0.1)
    expected, expected_lse = reference.attend_latents(query, latents, 32, 0.1)
    close(out, expected, dtype)
    close(lse, expected_lse, dtype)


@pytest.mark.parametrize("gathered", [1, 300, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_pages_equals_the_reference(
    dtype: torch.dtype, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.ops.cpu._GATHERED_TOKENS", gathered)
    cache = torch.randn(12, 64, 40, dtype=dtype)
    pages = torch.tensor([[3, 9, 1, 7], [2, 5, 0, 0], [8, 0, 0, 0], [4, 0, 0, 0]])
    lengths = torch.tensor([200, 128, 64, 1])
    query = torch.randn(4, 3, 40, dtype=dtype)
    expected = reference.attend_pages(query, cache, pages, lengths, 32, 0.1)
    close(ops.attend_pages(query, cache, pages, lengths, 32, 0.1), expected, dtype)


@pytest.mark.parametrize("implementation", [ops, reference])
def test_attend_pages_never_reads_what_a_page_held_before(implementation: object) -> None:
    cache = torch.randn(3, 64, 40)
    query, pages = torch.randn(2, 3, 40), torch.tensor([[1], [2]])
    lengths = torch.tensor([50, 20])
    before = implementation.attend_pages(query, cache, pages, lengths, 32, 0.1)  # type: ignore[attr-defined]
    cache[1, 50:], cache[2, 20:] = float("nan"), float("inf")
    after = implementation.attend_pages(query, cache, pages, lengths, 32, 0.1)  # type: ignore[attr-defined]
    assert torch.equal(before, after)


def test_merge_of_two_halves_is_attention_over_both() -> None:
    query, latents = torch.randn(5, 3, 40), torch.randn(90, 40)
    halves = [ops.attend_latents(query, half, 32, 1.0) for half in latents.split([20, 70])]
    out, lse = ops.merge(*halves[0], *halves[1])
    expected, expected_lse = ops.attend_latents(query, latents, 32, 1.0)
    close(out, expected, torch.float32)
    close(lse, expected_lse, torch.float32)


def test_written_rows_are_read_back_in_the_wanted_dtype() -> None:
    cache = torch.zeros(4, 64, 8, dtype=torch.bfloat16)
    slots, rows = torch.tensor([70, 3, 255]), torch.randn(3, 8)
    ops.write_rows(cache, slots, rows)
    read = ops.read_rows(cache, slots, rows)
    assert read.dtype == torch.float32
    assert torch.equal(read, rows.bfloat16().float())
    assert cache.flatten(0, 1).any(-1).sum() == 3


def test_rms_norm_casts_before_the_weight() -> None:
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32).bfloat16()
    normed = F.rms_norm(x.float(), (32,), eps=1e-6).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), weight * normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_rounded_before_it_is_normed(dtype: torch.dtype) -> None:
    x, delta, weight = (torch.randn(*shape).to(dtype) for shape in ((4, 32), (4, 32), (32,)))
    total, normed = ops.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, ops.rms_norm(x + delta, weight, 1e-6))


def test_silu_mul_gates_the_second_half() -> None:
    x = torch.randn(4, 10)
    torch.testing.assert_close(ops.silu_mul(x), F.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_in_a_view_leaves_the_rest_alone(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 12).to(dtype)
    before, angles = x.clone(), torch.randn(5, 4)
    ops.rotate_(x[..., 4:], angles.cos(), angles.sin())
    assert torch.equal(x[..., :4], before[..., :4])
    pairs = torch.view_as_complex(before[..., 4:].float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones(5, 4), angles)[:, None]
    close(x[..., 4:], torch.view_as_real(turned).flatten(-2), dtype)


def test_route_keeps_to_the_groups_with_the_best_experts() -> None:
    logits = torch.tensor([[5.0, 0.5, 0.0, 4.9, 1.0, 4.0, 4.8, 4.7]])
    ids, weights = ops.route(logits, top_k=3, groups=4, groups_kept=2, scale=2.0)
    assert ids.tolist() == [[0, 3, 1]]
    torch.testing.assert_close(weights, 2.0 * logits.softmax(-1).gather(1, ids))


@pytest.mark.parametrize("implementation", [ops, reference])
def test_of_equally_likely_experts_the_first_are_chosen(implementation: object) -> None:
    logits = torch.zeros(2, 12)
    logits[1, [2, 9]] = 1.0
    route = implementation.route  # type: ignore[attr-defined]
    assert route(logits, 3, 1, 1, 1.0)[0].tolist() == [[0, 1, 2], [2, 9, 0]]
    assert route(logits, 3, 4, 2, 1.0)[0].tolist() == [[0, 1, 2], [2, 9, 0]]


def test_route_without_groups_is_plain_top_k() -> None:
    logits = torch.randn(6, 16)
    ids, weights = ops.route(logits, top_k=4, groups=1, groups_kept=1, scale=1.0)
    assert torch.equal(ids, logits.topk(4).indices)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_a_packed_weight_computes_the_same(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 64).to(dtype), (torch.randn(96, 64) / 8).to(dtype)
    close(ops.linear(x, ops.pack(weight)), F.linear(x, weight), dtype)


def dense_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: int
) -> Tensor:
    """Every expert says something to every row; most of it counts for nothing."""
    total = torch.zeros(hidden.shape)
    for expert, (inner, outer) in enumerate(zip(gate_up, down, strict=True), start=first):
        share = (weights * (ids == expert)).sum(1, keepdim=True)
        total += share * (reference.silu_mul(hidden @ inner.T) @ outer.T).float()
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_weighted_experts_sums_what_the_local_ones_say(rows: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(4, 32, 16) / 4).to(dtype)
    down = (torch.randn(4, 16, 16) / 4).to(dtype)
    hidden, weights = torch.randn(rows, 16).to(dtype), torch.rand(rows, 3)
    ids = torch.rand(rows, 12).topk(3).indices - 1  # -1 to 10, of which 4 to 7 are here
    out = ops.weighted_experts(hidden, ids, weights, ops.pack_experts(gate_up, down), 4)
    assert out.dtype == dtype
    close(out, dense_experts(hidden, ids, weights, gate_up, down, 4), dtype)
    plain = reference.pack_experts(gate_up, down)
    for kind in (reference, library):
        close(kind.weighted_experts(hidden, ids, weights, plain, 4), out, dtype)


def test_weighted_experts_of_rows_whose_experts_are_all_elsewhere_is_zero() -> None:
    hidden, ids = torch.randn(3, 16), torch.tensor([[0, 9], [-1, -1], [8, 3]])
    experts = ops.pack_experts(torch.randn(4, 24, 16), torch.randn(4, 16, 12))
    out = ops.weighted_experts(hidden, ids, torch.ones(3, 2), experts, 4)
    assert torch.equal(out, torch.zeros(3, 16))

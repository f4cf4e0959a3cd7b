"""What is done to each row by itself, up to the token that is drawn from it."""

import pytest
import torch
from torch import Tensor

from model.ops import race, reference, triton_gate, triton_rows, triton_sampling

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = list(TOLERANCES)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * 10
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (3, 2, 40), (0, 48)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, delta = (torch.randn(*shape[:-1], 72).to(dtype)[..., : shape[-1]] for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    out = triton_rows.rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    close(out, reference.rms_norm(x.double(), weight.double(), 1e-6))
    total, normed = triton_rows.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    close(normed, reference.rms_norm(total.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 200), (2, 3, 10), (0, 8), (2, 2200)])
def test_gating(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape).to(dtype)
    close(triton_rows.silu_mul(x), reference.silu_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 20])
def test_rotation_in_a_view_leaves_the_rest_alone(heads: int, dtype: torch.dtype) -> None:
    x, angles = torch.randn(5, heads, 40).to(dtype), torch.randn(5, 6)
    expected = x.double()
    reference.rotate_(expected[..., 28:], angles.cos(), angles.sin())
    before = x.clone()
    triton_rows.rotate_(x[..., 28:], angles.cos(), angles.sin())
    assert torch.equal(x[..., :28], before[..., :28])
    close(x, expected)


@pytest.mark.parametrize(("groups", "kept"), [(8, 3), (1, 1), (5, 5)])
def test_experts_are_chosen_as_the_reference_does_ties_and_all(groups: int, kept: int) -> None:
    logits = torch.randn(8, 160).bfloat16().float()
    ids, weights = triton_gate.route(logits, 6, groups, kept, 16.0)
    expected_ids, expected = reference.route(logits, 6, groups, kept, 16.0)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_numbers_names_experts_that_there_are() -> None:
    logits = torch.randn(3, 160)
    logits[1, 7] = float("nan")
    for groups, kept in ((8, 3), (1, 1)):
        ids, weights = triton_gate.route(logits, 6, groups, kept, 1.0)
        assert ids[1].tolist() == [0, 1, 2, 3, 4, 5]
        assert weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()


# Temperature, top-k, top-p and min-p.
LIMITS = [
    (0.0, 3, 0.5, 0.1),
    (1.0, 0, 1.0, 0.0),
    (2.0, 7, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.7, 0, 0.01, 0.0),
    (5.0, 0, 1.0, 0.05),
    (1.0, 40, 0.95, 0.01),
    (1e-300, 10**6, 0.4, 1.0),
]


def test_tokens_are_drawn_as_the_reference_does() -> None:
    logits = (torch.randn(len(LIMITS), 5000) * 2).bfloat16().float()  # many ties
    logits[:, 100:140] = -float("inf")
    keys = torch.tensor([race.draw_key(seed, 40 + seed) for seed in range(len(LIMITS))])
    limits = torch.tensor(LIMITS, dtype=torch.float64)
    expected = race.draw(logits, keys, limits)
    assert torch.equal(triton_sampling.draw(logits, keys, limits), expected)


def test_filters_keep_as_many_of_the_tied_as_the_reference() -> None:
    logits = torch.tensor([0.0, -0.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]).expand(8, -1)
    keys = torch.tensor([race.draw_key(seed, 0) for seed in range(8)])
    limits = torch.tensor([(3.0, 4, 1.0, 0.0), (3.0, 0, 0.7, 0.0)], dtype=torch.float64)
    limits = limits.repeat(4, 1)
    expected = race.draw(logits, keys, limits)
    assert len(set(expected.tolist())) >= 3
    assert torch.equal(triton_sampling.draw(logits, keys, limits), expected)


def test_a_row_without_numbers_gives_a_token_of_the_vocabulary() -> None:
    logits = torch.full((2, 20), float("nan"))
    logits[1] = -float("inf")
    limits = torch.tensor([(1.0, 0, 1.0, 0.0)] * 2, dtype=torch.float64)
    tokens = triton_sampling.draw(logits, torch.zeros(2, dtype=torch.int64), limits)
    assert ((tokens >= 0) & (tokens < 20)).all()

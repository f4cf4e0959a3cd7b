"""Kernels of experts, rows and draws on a GPU, in bf16: errors, ties, graphs, no waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model.ops import (
    library,
    race,
    reference,
    triton_experts,
    triton_gate,
    triton_linear,
    triton_rows,
    triton_sampling,
)
from model.quantize import Fp8Weight, fp8_per_block, fp8_per_tensor
from model.sampling import SamplingRow, TokenCounts, choose, sample
from model.sampling_params import SamplingParams
from tests.model.kernels import exact
from tests.model.kernels.exact import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
HELD, FIRST, INNER = 8, 4, 576
TOLERANCES = {BF16: 1e-2, torch.float32: 1e-5}

Weight = Tensor | Fp8Weight
Quantizer = Callable[[Tensor], Weight] | None


@pytest.fixture(autouse=True)
def _every_element_must_be_written() -> Iterator[None]:
    """New tensors begin as NaN, or as the largest number of their dtype."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(CUDA):
        yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def case(
    rows: int, hidden: int, dtype: torch.dtype, quantize: Quantizer
) -> tuple[Tensor, Tensor, Tensor, Weight, Weight]:
    """Hidden states, ids from -1 to 14 of which 4 to 11 are here, shares, gate_up and down."""
    gate_up = torch.randn(HELD, 2 * INNER, hidden).to(dtype) / hidden**0.5
    down = torch.randn(HELD, hidden, INNER).to(dtype) / INNER**0.5
    ids = torch.rand(rows, 16).argsort(1)[:, :6] - 1
    both = (gate_up, down) if quantize is None else (quantize(gate_up), quantize(down))
    return torch.randn(rows, hidden).to(dtype), ids, torch.rand(rows, 6), *both


@pytest.mark.parametrize("quantize", [None, fp8_per_block, fp8_per_tensor])
@pytest.mark.parametrize("rows", [1, 20, 60, 150, 1000])
def test_experts_in_bf16(rows: int, quantize: Quantizer) -> None:
    hidden, ids, weights, gate_up, down = case(rows, 1408, BF16, quantize)
    packed = triton_experts.pack_experts(gate_up, down)
    out = triton_experts.weighted_experts(hidden, ids, weights, packed, FIRST)
    assert out.dtype == BF16
    expected = exact.weighted_experts(hidden, ids, weights, gate_up, down, FIRST)
    assert error(out, expected) <= TOLERANCES[BF16]
    if quantize is None:
        other = library.weighted_experts(hidden, ids, weights, packed, FIRST)
        assert error(other, expected) <= 2 * TOLERANCES[BF16]


@pytest.mark.parametrize("rows", [1, 30, 400])
def test_experts_in_fp32(rows: int) -> None:
    inputs = case(rows, 200, torch.float32, None)
    packed = triton_experts.pack_experts(*inputs[3:])
    out = triton_experts.weighted_experts(*inputs[:3], packed, FIRST)
    assert error(out, exact.weighted_experts(*inputs, FIRST)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("rows", [8, 500])
@pytest.mark.parametrize("kind", [triton_experts, library])
def test_experts_go_into_a_graph_whoever_is_asked(rows: int, kind: object) -> None:
    """Recorded with other rows' wishes than it is replayed with, without waiting for the device."""
    hidden, ids, weights, gate_up, down = case(rows, 512, BF16, None)
    packed = triton_experts.pack_experts(gate_up, down)

    def call() -> Tensor:
        return kind.weighted_experts(hidden, ids, weights, packed, FIRST)  # type: ignore[attr-defined]

    call()
    with no_waiting():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    ids.fill_(FIRST)
    ids[:, 1:] = -1
    hidden.normal_()
    graph.replay()
    expected = exact.weighted_experts(hidden, ids, weights, gate_up, down, FIRST)
    assert error(out, expected) <= 2 * TOLERANCES[BF16]


@pytest.mark.parametrize("quantize", [fp8_per_block, fp8_per_tensor])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_products_with_weights_of_8_bit_floats(rows: int, quantize: Quantizer) -> None:
    assert quantize is not None
    weight, x = quantize(torch.randn(576, 10944)), torch.randn(rows, 10944).to(BF16)
    out = triton_linear.linear(x, weight)
    assert error(out, x.double() @ exact.values(weight).T) <= TOLERANCES[BF16]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_done_to_each_row(dtype: torch.dtype) -> None:
    x, delta = (torch.randn(33, 5130).to(dtype)[:, :5120] for _ in range(2))
    weight = torch.randn(5120).to(dtype)
    total, normed = triton_rows.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-6)
    assert error(normed, expected) <= TOLERANCES[dtype]
    assert error(triton_rows.rms_norm(total, weight, 1e-6), expected) <= TOLERANCES[dtype]
    gated = triton_rows.silu_mul(x.contiguous())
    assert error(gated, reference.silu_mul(x.double())) <= TOLERANCES[dtype]
    query, angles = torch.randn(33, 16, 192).to(dtype), torch.randn(33, 32)
    turned = query.double()
    reference.rotate_(turned[..., 128:], angles.cos(), angles.sin())
    triton_rows.rotate_(query[..., 128:], angles.cos(), angles.sin())
    assert error(query, turned) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("groups", "kept", "experts"), [(8, 3, 160), (1, 1, 64)])
def test_experts_are_chosen_as_the_reference_does(groups: int, kept: int, experts: int) -> None:
    logits = torch.randn(3000, experts).to(BF16).float()  # many ties
    ids, weights = triton_gate.route(logits, 6, groups, kept, 16.0)
    expected_ids, expected = reference.route(logits, 6, groups, kept, 16.0)
    assert torch.equal(ids, expected_ids)
    assert error(weights, expected) <= TOLERANCES[torch.float32]


def test_tokens_are_drawn_as_on_the_cpu() -> None:
    """From what two devices make of the same logits; near ties are rarer than one in a hundred."""
    logits = (torch.randn(64, 102_400) * 3).to(BF16).float()
    keys = [race.draw_key(seed, 7) for seed in range(64)]
    kinds = [(0.0, 0, 1, 0), (1, 0, 1, 0), (0.7, 50, 0.95, 0), (1.5, 0, 0.9, 0), (2, 0, 1, 0.02)]
    limits = torch.tensor([kinds[i % 5] for i in range(64)], dtype=torch.float64)
    found = triton_sampling.draw(logits, torch.tensor(keys), limits)
    expected = race.draw(logits.cpu(), torch.tensor(keys, device="cpu"), limits.cpu())
    assert int((found.cpu() != expected).sum()) <= 1


def test_nothing_is_read_back_before_all_tokens_are_chosen() -> None:
    vocab = 1000
    logits = torch.randn(4, vocab, device=CUDA)
    penalized = SamplingParams(temperature=0.8, repetition_penalty=1.2, logit_bias=((3, 5.0),))
    rows = [
        SamplingRow(SamplingParams(temperature=0.0), 3),
        SamplingRow(SamplingParams(top_p=0.9, top_k=40, seed=5), 9),
        SamplingRow(penalized, 9, TokenCounts([1, 2], [3])),
        SamplingRow(SamplingParams(min_tokens=2, end_token_ids=(7,)), 2, allowed=b"\1" * vocab),
    ]
    with torch.device("cpu"):  # what torch's default is in a worker
        expected = sample(logits, rows)
        with no_waiting():
            chosen = choose(logits, rows)
    assert chosen[:, 0].tolist() == [token.token for token in expected]
    assert chosen[:, 1].tolist() == [1, 1, 1, 1]

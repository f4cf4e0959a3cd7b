"""The routed experts, and products with weights of 8-bit floats, against fp64."""

import pytest
import torch
from torch import Tensor

from model.ops import triton_experts, triton_linear
from model.ops.triton_sort import by_expert, most_blocks
from model.quantize import Fp8Weight, fp8_per_block, fp8_per_tensor
from tests.model.kernels import exact
from tests.model.kernels.exact import error

HIDDEN, INNER, HELD, FIRST = 200, 136, 5, 3  # no multiples of a tile, nor of a weight's block
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
QUANTIZERS = {"block": fp8_per_block, "tensor": fp8_per_tensor}

Weight = Tensor | Fp8Weight


def experts(quantizer: str | None, dtype: torch.dtype) -> tuple[Weight, Weight]:
    both = (
        torch.randn(HELD, 2 * INNER, HIDDEN) / HIDDEN**0.5,
        torch.randn(HELD, HIDDEN, INNER) / INNER**0.5,
    )
    if quantizer is not None:
        return tuple(QUANTIZERS[quantizer](weight) for weight in both)  # type: ignore[return-value]
    return tuple(weight.to(dtype) for weight in both)


def distinct(rows: int, top_k: int, start: int = 0) -> Tensor:
    """Ids [rows, top_k] from `start` on, those of a row distinct."""
    places = torch.rand(rows, 11, generator=torch.Generator().manual_seed(rows)).argsort(1)
    return places[:, :top_k] + start


# Ids of -1, of experts that are here (3 to 7), and of others.
WISHES = {
    "one row": torch.tensor([[4, 9, 3]]),
    "ragged": distinct(30, 3, start=-1),
    "all to one expert": torch.full((20, 1), 6),
    "some without any row": torch.tensor([[3, 7], [7, 3], [-1, 12], [0, 7]]),
    "elsewhere": torch.tensor([[-1, -1], [0, 8], [2, 160]]),
}


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("quantizer", [None, "block"])
def test_rows_hear_the_experts_that_are_here(wishes: str, quantizer: str | None) -> None:
    ids = WISHES[wishes]
    hidden, weights = torch.randn(len(ids), HIDDEN), torch.rand(ids.shape)
    gate_up, down = experts(quantizer, torch.float32)
    packed = triton_experts.pack_experts(gate_up, down)
    out = triton_experts.weighted_experts(hidden, ids, weights, packed, FIRST)
    expected = exact.weighted_experts(hidden, ids, weights, gate_up, down, FIRST)
    if wishes == "elsewhere":
        assert torch.equal(out, torch.zeros_like(hidden))
    else:
        assert error(out, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("rows", [8, 20, 40])
@pytest.mark.parametrize(("quantizer", "dtype"), [("tensor", torch.float32), (None, torch.float16)])
def test_each_form_of_weights_and_each_tile(
    rows: int, quantizer: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles are taken by the rows of an expert; here fewer rows stand for more."""
    monkeypatch.setattr(
        triton_experts,
        "TILES",
        tuple((most / 4, tiles) for most, tiles in triton_experts.TILES),
    )
    ids = distinct(rows, 3)
    hidden, weights = torch.randn(rows, HIDDEN).to(dtype), torch.rand(ids.shape)
    gate_up, down = experts(quantizer, dtype)
    packed = triton_experts.pack_experts(gate_up, down)
    out = triton_experts.weighted_experts(hidden, ids, weights, packed, FIRST)
    assert out.dtype == dtype
    expected = exact.weighted_experts(hidden, ids, weights, gate_up, down, FIRST)
    assert error(out, expected) <= TOLERANCES[dtype]


def test_no_rows_ask_nothing() -> None:
    packed = triton_experts.pack_experts(*experts(None, torch.float32))
    none, ids = torch.empty(0, HIDDEN), torch.empty(0, 3, dtype=torch.int64)
    out = triton_experts.weighted_experts(none, ids, torch.empty(0, 3), packed, 0)
    assert out.shape == (0, HIDDEN)


def test_a_row_without_numbers_spoils_no_other() -> None:
    ids = WISHES["ragged"]
    hidden, weights = torch.randn(len(ids), HIDDEN), torch.rand(ids.shape)
    packed = triton_experts.pack_experts(*experts(None, torch.float32))
    clean = triton_experts.weighted_experts(hidden, ids, weights, packed, FIRST)
    asks = ((ids >= FIRST) & (ids < FIRST + HELD)).any(1)
    spoilt = int(asks.nonzero()[0])
    hidden[spoilt, 7] = float("nan")
    out = triton_experts.weighted_experts(hidden, ids, weights, packed, FIRST)
    assert out[spoilt].isnan().all()
    others = torch.arange(len(ids)) != spoilt
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize(
    ("rows", "top_k", "block"), [(1, 1, 16), (40, 6, 16), (43, 6, 16), (300, 3, 64)]
)
def test_entries_are_sorted_stably_and_cut_into_blocks(rows: int, top_k: int, block: int) -> None:
    held, first = 20, 40
    ids = torch.randint(-1, 160, (rows, top_k)).where(torch.rand(rows, top_k) < 0.7, 41)
    plan = by_expert(ids, first, held, block)
    wanted = (ids - first).flatten()
    here = (wanted >= 0) & (wanted < held)
    order = wanted.where(here, held).argsort(stable=True)[: int(here.sum())]
    assert torch.equal(plan.order[: len(order)].long(), order)
    covered: list[int] = []
    for expert, begin, end in plan.blocks.T.tolist():
        assert end - begin <= block
        assert all(wanted[order[begin:end]] == expert)
        covered += range(begin, end)
    assert covered == list(range(len(order)))
    assert plan.blocks.shape[1] == most_blocks(rows * top_k, held, block)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("rows", [0, 1, 20, 600])
def test_products_with_weights_of_8_bit_floats(rows: int, quantizer: str) -> None:
    weight = QUANTIZERS[quantizer](torch.randn(150, HIDDEN))
    x = torch.randn(rows, 2 * HIDDEN)[:, ::2]
    out = triton_linear.linear(x, weight)
    expected = x.double() @ exact.values(weight).T
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    if rows:
        assert error(out, expected) <= TOLERANCES[torch.float32]


def test_tiles_follow_the_entries_of_an_expert() -> None:
    half = torch.float16
    rows = [triton_experts.tiles_for(entries, half).gated.rows for entries in (0.1, 16, 17, 60, 90)]
    assert rows == [16, 16, 32, 64, 128]
    assert triton_experts.tiles_for(90, torch.float32).gated.rows == 64
    for _, tiles in triton_experts.TILES:
        assert tiles.gated.rows == tiles.down.rows


def test_with_a_quarter_of_the_experts_a_quarter_of_the_entries_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    monkeypatch.setattr(
        triton_experts, "with_tiles", lambda tiles, *inputs: rows.append(tiles.gated.rows)
    )
    ids = torch.zeros(100, 2, dtype=torch.int64)  # 40 for each expert here, or 10
    for share in (1.0, 0.25):
        packed = triton_experts.pack_experts(*experts(None, torch.float32), share=share)
        triton_experts.weighted_experts(torch.empty(100, HIDDEN), ids, ids.float(), packed, 0)
    assert rows == [64, 16]

"""Decode by FlashInfer: what it is told, when it plans, and what a graph replays."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.context import Span
from model.graphs import DecodeGraphs, Rows
from model.ops import choice, library_flashinfer, reference
from tests.model.fake_flashinfer import BatchMLAPagedAttentionWrapper

BF16 = torch.bfloat16
CPU = torch.device("cpu")
SCALE = 0.1147


@pytest.fixture(autouse=True)
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BatchMLAPagedAttentionWrapper]]:
    torch.manual_seed(0)

    class Wrapper(BatchMLAPagedAttentionWrapper):
        made = plans = 0

    library_flashinfer._plans.cache_clear()
    monkeypatch.setattr(library_flashinfer, "_library", lambda: Wrapper)
    yield Wrapper
    library_flashinfer._plans.cache_clear()
    choice.choose("cpu", "auto")


def inputs(heads: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = torch.randn(3, heads, 576, dtype=BF16)
    cache = torch.randn(7, PAGE_TOKENS, 576, dtype=BF16)
    pages = torch.tensor([[3, 1, 6], [2, 5, 0], [4, 0, 0]])
    return query, cache, pages, torch.tensor([130, 128, 1])


@pytest.mark.parametrize("heads", [16, 128])
def test_pages_are_attended_to_as_the_reference_does(heads: int) -> None:
    given = inputs(heads)
    cache = given[1].clone()
    cache[0] = torch.nan  # the dummy page pads tables and is not to be looked at
    library_flashinfer.plan_pages(*given[2:])
    found = library_flashinfer.attend_pages(given[0], cache, *given[2:], 512, SCALE)
    expected = reference.attend_pages(*given, 512, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_plan_serves_all_layers_of_a_step(wrapper: type[BatchMLAPagedAttentionWrapper]) -> None:
    for _ in range(2):
        query, cache, pages, lengths = inputs()
        library_flashinfer.plan_pages(pages, lengths)
        for layer in range(4):
            other = cache + layer
            found = library_flashinfer.attend_pages(query, other, pages, lengths, 512, SCALE)
            expected = reference.attend_pages(query, other, pages, lengths, 512, SCALE)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert (wrapper.made, wrapper.plans) == (1, 2)


def test_who_was_not_told_plans_anyway(wrapper: type[BatchMLAPagedAttentionWrapper]) -> None:
    for _ in range(2):
        given = inputs()
        found = library_flashinfer.attend_pages(*given, 512, SCALE)
        expected = reference.attend_pages(*given, 512, SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert wrapper.plans == 2


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (576, torch.float32)])
def test_what_it_does_not_take_is_left_to_our_own(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        library_flashinfer.triton_latents, "attend_pages", lambda *given: asked.append(given)
    )
    cache, query = (torch.zeros(shape, dtype=dtype) for shape in ((2, 64, width), (1, 4, width)))
    library_flashinfer.attend_pages(query, cache, torch.ones(1, 1), torch.ones(1), width - 64, 1.0)
    assert len(asked) == 1


def test_what_is_recorded_is_planned_again_before_each_replay(
    wrapper: type[BatchMLAPagedAttentionWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "installed", lambda kind: True)
    choice.choose("cpu", "flashinfer", ["plan_pages", "attend_pages"])
    cache, query = torch.randn(9, PAGE_TOKENS, 576, dtype=BF16), torch.randn(4, 2, 576).to(BF16)
    capturing = []
    monkeypatch.setattr(library_flashinfer, "_capturing", lambda tensor: bool(capturing))

    def forward(ids: Tensor, context: object) -> Tensor:
        decode = context.decode  # type: ignore[attr-defined]
        library_flashinfer.plan_pages(decode.pages, decode.lengths)
        for _ in range(2):
            found = library_flashinfer.attend_pages(
                query[: len(ids)], cache, decode.pages, decode.lengths, 512, SCALE
            )
        return found.flatten(1).float()

    def capture(call: object) -> object:
        call()  # type: ignore[operator]
        capturing.append(1)
        call()  # type: ignore[operator]
        capturing.clear()

        def replay() -> None:  # nothing of Python's runs in a replay but the kernels
            capturing.append(1)
            call()  # type: ignore[operator]
            capturing.clear()

        return replay

    graphs = DecodeGraphs(
        forward, None, Rows(1024, torch.float32), False, [4], 3, CPU, capture,  # type: ignore[arg-type]
    )  # fmt: skip
    for starts in ([130, 5], [64, 100, 3], [191]):
        spans = [Span(s, 1, [1 + i, 4 + i, 8][: s // 64 + 1]) for i, s in enumerate(starts)]
        out = graphs.run(4, spans, [0] * len(spans))
        order = sorted(range(len(spans)), key=lambda place: -starts[place])
        for row, place in enumerate(order):
            pages = torch.tensor([list(spans[place].pages)])
            length = torch.tensor([starts[place] + 1])
            expected = reference.attend_pages(
                query[row : row + 1], cache, pages, length, 512, SCALE
            )
            torch.testing.assert_close(
                out[place : place + 1], expected.flatten(1).float(), rtol=1e-2, atol=1e-2
            )
    assert wrapper.made == 1  # one width is the longest one, and has one graph


def test_a_plan_that_is_missing_cannot_be_made_up_for_in_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_flashinfer, "_capturing", lambda tensor: True)
    with pytest.raises(RuntimeError, match="while a graph is being recorded"):
        library_flashinfer.attend_pages(*inputs(), 512, SCALE)

"""The step as attention sees it."""

import pytest
import torch

from model.context import EXPANDED_QUERIES, Span, StepContext

CPU = torch.device("cpu")


def test_rows_follow_the_spans() -> None:
    spans = [
        Span(start=62, count=4, pages=[5, 2], logits=1),
        Span(start=3, count=1, pages=[7]),
        Span(start=128, count=1, pages=[1, 4, 9, 8], logits=1),
    ]
    context = StepContext.build(spans, CPU)
    assert context.rows == 6
    assert context.positions.tolist() == [62, 63, 64, 65, 3, 128]
    assert context.slots.tolist() == [382, 383, 128, 129, 451, 576]
    assert context.logit_rows.tolist() == [3, 5]


def test_single_rows_decode_together_longest_first() -> None:
    spans = [Span(3, 1, [7]), Span(0, 2, [6]), Span(128, 1, [1, 4, 9, 8])]
    decode = StepContext.build(spans, CPU).decode
    assert decode is not None
    assert decode.rows.tolist() == [3, 0]
    assert decode.lengths.tolist() == [129, 4]
    assert decode.pages.tolist() == [[1, 4, 9], [7, 0, 0]]


def test_a_chunk_knows_its_past_and_the_cheaper_form() -> None:
    spans = [
        Span(start=65, count=EXPANDED_QUERIES, pages=[5, 2, 3, 1]),
        Span(start=2, count=EXPANDED_QUERIES - 1, pages=[4, 6, 7]),
        Span(start=0, count=2, pages=[8]),
    ]
    first, second, third = StepContext.build(spans, CPU).chunks
    assert first.past.tolist() == [*range(320, 384), 128]
    assert second.past.tolist() == [256, 257]
    assert third.past.tolist() == []
    assert (first.absorbed, second.absorbed) == (False, True)
    assert first.rows.stop == second.rows.start


def test_nothing_to_do_is_one_row_on_the_dummy_page() -> None:
    context = StepContext.build([], CPU)
    assert context.rows == 1
    assert context.positions.tolist() == context.slots.tolist() == [0]
    assert context.decode is not None
    assert context.decode.lengths.tolist() == [1]
    assert context.logit_rows.tolist() == []


@pytest.mark.parametrize("span", [Span(0, 0, [1]), Span(64, 1, [1])])
def test_a_span_must_have_rows_and_pages_for_them(span: Span) -> None:
    with pytest.raises(ValueError, match="pages"):
        StepContext.build([span], CPU)

"""Static decode steps: which size, which width, and what padding leaves alone."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.cache import LatentCache
from model.context import Span, StepContext
from model.graphs import DecodeGraphs, Rows, bucket_sizes
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.stage import Stage
from tests.model.harness import CPU, load
from tests.model.oracle import oracle

CONFIG = oracle("nano").config


def test_buckets_lie_close_and_end_with_the_largest_step() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    sizes = bucket_sizes(256)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 256
    assert all(low >= high / 2 for low, high in pairwise(sizes))


class Recorder:
    """Keeps the shapes of what is recorded; a replay is the call itself."""

    def __init__(self) -> None:
        self.contexts: list[tuple[int, int]] = []
        self.begun: list[int] = []

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        call()
        return call


def echo(recorder: Recorder, selects: bool = False) -> DecodeGraphs:
    """Graphs of a stage whose output is each row's position and the width of its page table."""

    def forward(inputs: Tensor, context: StepContext) -> Tensor:
        assert context.decode is not None
        recorder.contexts.append(tuple(context.decode.pages.shape))  # type: ignore[arg-type]
        width = torch.full_like(context.positions, context.decode.pages.shape[1])
        return torch.stack((inputs, context.positions, width), dim=1)

    return DecodeGraphs(
        forward, None, Rows(3, torch.int64), selects, bucket_sizes(8), 400, CPU,
        recorder.capture, recorder.begun.append,
    )  # fmt: skip


def spans(*starts: int, logits: int = 1) -> list[Span]:
    return [Span(start, 1, range(1, start // 64 + 2), logits) for start in starts]


def test_a_bucket_is_recorded_at_all_widths_when_it_is_first_run() -> None:
    recorder = Recorder()
    graphs = echo(recorder)
    graphs.run(2, spans(5, 6), [1, 2])
    assert recorder.begun == [2]
    assert recorder.contexts[:3] == [(2, 400), (2, 256), (2, 32)]
    graphs.run(2, spans(7), [1])
    assert recorder.begun == [2]
    graphs.forget()
    graphs.record()
    assert recorder.begun == [2, 8, 4, 2, 1]


def test_rows_come_back_in_the_order_of_their_spans() -> None:
    graphs = echo(Recorder())
    out = graphs.run(4, spans(70, 3000, 5), [10, 11, 12])
    assert out.tolist() == [[10, 70, 256], [11, 3000, 256], [12, 5, 256]]
    assert graphs.run(4, spans(70, 5), [10, 12])[:, 2].tolist() == [32, 32]
    assert graphs.run(1, spans(20_000), [9]).tolist() == [[9, 20_000, 400]]


def test_only_what_wants_logits_comes_back_from_a_head() -> None:
    graphs = echo(Recorder(), selects=True)
    some = [*spans(7), *spans(90, logits=0), *spans(8)]
    assert graphs.run(4, some, [1, 2, 3])[:, 0].tolist() == [1, 3]
    assert graphs.run(4, spans(90, logits=0), [2]).shape == (0, 3)
    assert graphs.run(4, [], []).shape == (0, 3)
    assert echo(Recorder()).run(4, [], []).shape == (1, 3)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, None)])
def test_the_smallest_bucket_that_holds_the_rows_is_taken(rows: int, bucket: int | None) -> None:
    assert echo(Recorder()).bucket(rows) == bucket


def test_padding_writes_to_the_dummy_page_alone() -> None:
    stage = Stage(CONFIG, Layout(CONFIG, 1, 1), Cell(0, 0), torch.float32, CPU, LocalExchange())
    load(stage, oracle("nano").tensors)
    cache = LatentCache(CONFIG, 5, 12, torch.float32, CPU)
    cache.rows.normal_()
    before = cache.rows.clone()
    graphs = DecodeGraphs(
        lambda inputs, context: stage.forward(inputs, context, cache),
        None, Rows(CONFIG.vocab_size, torch.float32), True, [8], 11, CPU, lambda call: call,
    )  # fmt: skip
    places = [Span(70, 1, [3, 5], 1), Span(10, 1, [7], 1), Span(130, 1, [2, 4, 6], 1)]
    replayed = graphs.run(8, places, [5, 6, 7])
    changed = (cache.rows != before).any(dim=(0, 3)).nonzero().tolist()
    assert [place for place in changed if place[0] != 0] == [[5, 6], [6, 2], [7, 10]]
    with torch.inference_mode():
        context = StepContext.build(places, CPU)
        eager = stage.forward(torch.tensor([5, 6, 7]), context, cache)
    torch.testing.assert_close(replayed, eager, rtol=1e-5, atol=1e-4)

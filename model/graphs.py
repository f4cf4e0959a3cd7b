"""Decode steps from graphs: recorded once for each size, then replayed with new inputs.

A decode step launches hundreds of small kernels, and launching them from Python takes longer than
running them. A graph launches all of them at once, but always with the same shapes and addresses.
So steps are padded up to one of a few sizes (*buckets*), and inputs and outputs have buffers that
stay where they are. Padding rows live on the dummy page and see one key.

Attention cuts its work by the width of the page tables, so there is a graph for each of a few
widths, too. Where the ranks of a stage exchange rows inside a graph, all must take the same
bucket; the width is each rank's own affair.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import ops
from model.cache import DUMMY_PAGE, PAGE_TOKENS
from model.context import DecodeRows, Span, StepContext

# Records what a call does, and returns what does it again.
Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]

_WIDTHS = (32, 256)  # pages: contexts up to 2 Ki and 16 Ki tokens, besides the longest
_NUMBERS = 6
_IDS, _POSITIONS, _SLOTS, _LENGTHS, _ORDER, _WANTED = range(_NUMBERS)


def bucket_sizes(most: int) -> list[int]:
    """Rows of the graphs for steps of up to `most` rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, most, 16)]
    return [size for size in sizes if size < most] + [most]


class CudaCapture:
    """Records CUDA graphs that share one memory pool; record the largest first."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, call: Replay) -> Replay:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()  # compiles kernels, opens libraries, connects ranks: none can be recorded
        current.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A fabric's watchdog asks for events meanwhile, which "global" would not allow it.
        recording: AbstractContextManager[None] = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with recording:
            call()
        replay: Replay = graph.replay
        return replay


@dataclass(frozen=True, slots=True)
class Rows:
    """What a row of a stage's inputs or outputs is."""

    width: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One bucket at one width; the tensors are views of the common buffers.

    Attributes:
        numbers: [6, bucket] int64: token ids, positions, cache slots, keys seen, which span each
            row is, and which rows are wanted back.
        pages: [bucket, width] int64 page tables.
    """

    replay: Replay
    numbers: Tensor
    pages: Tensor


class DecodeGraphs:
    """A stage's decode steps, as graphs over static buffers.

    Args:
        forward: the stage; a row of output for each row of input.
        inputs: the hidden states that the stage takes; None if it takes token ids.
        outputs: what it gives.
        selects: whether only the rows of spans that want logits are wanted back.
        buckets: rows of the graphs, in ascending order.
        longest: pages of the longest sequence.
        device: of the stage.
        capture: how a call is recorded.
        begin: is told the bucket before its graphs are recorded.

    A bucket is recorded when it is first run, at all widths, unless `record` came first.
    """

    @torch.inference_mode()
    def __init__(
        self,
        forward: Callable[[Tensor, StepContext], Tensor],
        inputs: Rows | None,
        outputs: Rows,
        selects: bool,
        buckets: Sequence[int],
        longest: int,
        device: torch.device,
        capture: Capture,
        begin: Callable[[int], None] = lambda bucket: None,
    ) -> None:
        self._forward = forward
        self._selects = selects
        self._device = device
        self._buckets = list(buckets)
        most = self._buckets[-1]
        self._widths = [width for width in _WIDTHS if width < longest] + [longest]
        self._numbers = torch.zeros(_NUMBERS * most, dtype=torch.int64, device=device)
        self._pages = torch.full((most * longest,), DUMMY_PAGE, dtype=torch.int64, device=device)
        self._rows = torch.arange(most, device=device)
        self._hidden = None if inputs is None else _buffer(most, inputs, device)
        self._out = _buffer(most, outputs, device)
        self._capture, self._begin = capture, begin
        self._graphs: dict[int, dict[int, _Recorded]] = {}  # by bucket and width

    @torch.inference_mode()
    def record(self) -> None:
        """Records all buckets, the largest first."""
        for bucket in reversed(self._buckets):
            self._of(bucket)

    def forget(self) -> None:
        """Throws the graphs away: what was recorded is not to be done any more."""
        self._graphs.clear()

    def bucket(self, rows: int) -> int | None:
        """The size of graph for a step in which no rank has more rows; None if none is."""
        return next((bucket for bucket in self._buckets if bucket >= rows), None)

    @torch.inference_mode()
    def run(self, bucket: int, spans: Sequence[Span], inputs: Sequence[int] | Tensor) -> Tensor:
        """One step whose spans are single positions.

        Args:
            bucket: at least as many as there are spans.
            spans: none for a rank that only takes part.
            inputs: token id of each span, or hidden states [spans, width], in their order.

        Returns:
            A row of output for each span, in their order, or for each that wants logits. Without
            spans, one row without meaning, or none.
        """
        count = len(spans)
        order = sorted(range(count), key=lambda place: spans[place].start, reverse=True)
        ordered = [spans[place] for place in order]
        widest = max((_pages_seen(span) for span in spans), default=1)
        recorded = self._of(bucket)[next(w for w in self._widths if w >= widest)]
        numbers = _numbers(bucket, ordered, order)
        if not isinstance(inputs, Tensor):
            numbers[_IDS, :count] = [inputs[place] for place in order]
        wanted = self._wanted(spans)
        numbers[_WANTED, : len(wanted)] = np.argsort(np.array(order, dtype=np.int64))[wanted]
        recorded.numbers.copy_(self._sent(numbers), non_blocking=True)
        tables = _tables(recorded.pages.shape, ordered)
        recorded.pages.copy_(self._sent(tables), non_blocking=True)
        if self._hidden is not None and isinstance(inputs, Tensor) and count:
            self._hidden[:count] = inputs[recorded.numbers[_ORDER, :count]]
        ops.plan_pages(recorded.pages, recorded.numbers[_LENGTHS], kept=True)
        recorded.replay()
        if not count:
            return self._out[: 0 if self._selects else 1].clone()
        return self._out[recorded.numbers[_WANTED, : len(wanted)]]

    def _wanted(self, spans: Sequence[Span]) -> list[int]:
        return [place for place, span in enumerate(spans) if span.logits or not self._selects]

    def _of(self, bucket: int) -> dict[int, _Recorded]:
        if bucket not in self._graphs:
            self._begin(bucket)
            widths = reversed(self._widths)
            self._graphs[bucket] = {width: self._record(bucket, width) for width in widths}
        return self._graphs[bucket]

    def _record(self, bucket: int, width: int) -> _Recorded:
        numbers = self._numbers[: _NUMBERS * bucket].view(_NUMBERS, bucket)
        pages = self._pages[: bucket * width].view(bucket, width)
        numbers.zero_()
        numbers[_LENGTHS] = 1
        context = StepContext(
            positions=numbers[_POSITIONS],
            slots=numbers[_SLOTS],
            decode=DecodeRows(rows=None, pages=pages, lengths=numbers[_LENGTHS]),
            chunks=(),
            logit_rows=self._rows[:bucket],
        )
        inputs = numbers[_IDS] if self._hidden is None else self._hidden[:bucket]
        out = self._out[:bucket]  # one for all graphs, so that their pool has to keep nothing

        ops.plan_pages(pages, numbers[_LENGTHS], kept=True)

        def step() -> None:
            out.copy_(self._forward(inputs, context))

        return _Recorded(self._capture(step), numbers, pages)

    def _sent(self, numbers: np.ndarray) -> Tensor:
        """In memory that a device can copy from while the host goes on."""
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _buffer(most: int, rows: Rows, device: torch.device) -> Tensor:
    return torch.zeros(most, rows.width, dtype=rows.dtype, device=device)


def _pages_seen(span: Span) -> int:
    """How many of its pages a single position sees."""
    return span.start // PAGE_TOKENS + 1


def _numbers(bucket: int, ordered: Sequence[Span], order: Sequence[int]) -> np.ndarray:
    """[6, bucket] int64 for spans in the order of the rows; ids and wanted rows are left 0."""
    count = len(ordered)
    starts = np.array([span.start for span in ordered], dtype=np.int64)
    last = np.array([span.pages[_pages_seen(span) - 1] for span in ordered], dtype=np.int64)
    numbers = np.zeros((_NUMBERS, bucket), dtype=np.int64)
    numbers[_LENGTHS] = 1
    numbers[_POSITIONS, :count] = starts
    numbers[_SLOTS, :count] = last * PAGE_TOKENS + starts % PAGE_TOKENS
    numbers[_LENGTHS, :count] = starts + 1
    numbers[_ORDER, :count] = order
    return numbers


def _tables(shape: Sequence[int], ordered: Sequence[Span]) -> np.ndarray:
    """Page tables [bucket, width] int64 for spans in the order of the rows."""
    tables = np.full(tuple(shape), DUMMY_PAGE, dtype=np.int64)
    for table, span in zip(tables, ordered, strict=False):
        seen = _pages_seen(span)
        table[:seen] = span.pages[:seen]
    return tables

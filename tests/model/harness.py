"""A whole model in one process, as stages and ranks, for tests of the network.

Sequences are spread over columns; every cell has a cache of its own and every rank of a stage
a thread. How ranks exchange experts is up to a factory, so that the same cases run with the
exchange of threads here and with real ones.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS, LatentCache
from model.config import ModelConfig
from model.context import Span, StepContext
from model.layout import Cell, Layout
from model.moe import ExpertExchange, LocalExchange, LocalExperts
from model.stage import Stage
from model.weights import Value

torch.set_num_threads(1)

CPU = torch.device("cpu")
MEETING_TIMEOUT_S = 60.0

# The exchanges of one stage's ranks. One that has a `begin(rows of every rank)` hears of each
# step before it starts.
ExchangeFactory = Callable[[Layout], Sequence[ExpertExchange]]


class Meeting:
    """Where the threads of one stage lay out what the others need."""

    def __init__(self, ranks: int) -> None:
        self._barrier = Barrier(ranks, timeout=MEETING_TIMEOUT_S)
        self._table: list[Tensor] = [torch.empty(0)] * ranks

    def share(self, rank: int, own: Tensor) -> list[Tensor]:
        """What each rank brought, once all have."""
        self._table[rank] = own
        self._barrier.wait()
        everything = list(self._table)
        self._barrier.wait()
        return everything


@dataclass
class ThreadExchange(ExpertExchange):
    """Everybody sees everybody's rows; each adds up what all ranks say to its own."""

    meeting: Meeting
    rank: int

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: LocalExperts
    ) -> Tensor:
        share = self.meeting.share
        rows = [torch.cat(share(self.rank, part)) for part in (hidden, ids, weights)]
        counts = [len(part) for part in share(self.rank, hidden)]
        said = [part.split(counts)[self.rank] for part in share(self.rank, experts(*rows))]
        return torch.stack(said).float().sum(0).to(hidden.dtype)


def thread_exchanges(layout: Layout) -> Sequence[ExpertExchange]:
    if layout.ranks == 1:
        return [LocalExchange()]
    meeting = Meeting(layout.ranks)
    return [ThreadExchange(meeting, rank) for rank in range(layout.ranks)]


@dataclass(eq=False)
class Live:
    """One sequence on one column, and how much of it is in the cache."""

    tokens: list[int]
    column: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0


class Gang:
    """All cells of a model, with the tensors of a checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Value],
        stages: int = 1,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
        pages: int = 96,
        exchanges: ExchangeFactory = thread_exchanges,
        cache_dtype: torch.dtype | None = None,
        quantize: str | None = None,
        keep_fp8: bool = False,
    ) -> None:
        self.layout = Layout(config, stages, ranks)
        self._exchanges = [exchanges(self.layout) for _ in range(stages)]
        self._cells = {
            cell: Stage(
                config,
                self.layout,
                cell,
                dtype,
                CPU,
                self._exchanges[cell.stage][cell.rank],
                quantize,
                keep_fp8,
            )
            for cell in self.layout.cells
        }
        for stage in self._cells.values():
            load(stage, tensors)
        self._caches = {
            cell: LatentCache(
                config, len(self.layout.layers(cell.stage)), pages, cache_dtype or dtype, CPU
            )
            for cell in self.layout.cells
        }
        self._free_pages = [list(range(1, pages)) for _ in range(ranks)]

    def open(self, tokens: Sequence[int], column: int = 0, pages: Sequence[int] = ()) -> Live:
        """A sequence whose first tokens are in `pages` already, all of each."""
        return Live(list(tokens), column, list(pages), computed=len(pages) * PAGE_TOKENS)

    def advance(self, counts: Mapping[Live, int]) -> dict[Live, Tensor]:
        """Computes so many tokens of each sequence in one step; each one's last logits."""
        columns = [[live for live in counts if live.column == rank] for rank in self._ranks]
        spans = [[self._span(live, counts[live]) for live in column] for column in columns]
        contexts = [StepContext.build(column, CPU) for column in spans]
        states = [
            torch.tensor(
                [t for live in column for t in live.tokens[live.computed :][: counts[live]]] or [0]
            )
            for column in columns
        ]
        for stage in range(self.layout.stages):
            states = self._run_stage(stage, states, contexts)
        for live, count in counts.items():
            live.computed += count
        return {
            live: row
            for column, logits in zip(columns, states, strict=True)
            for live, row in zip(column, logits, strict=True)
        }

    @property
    def _ranks(self) -> range:
        return range(self.layout.ranks)

    def _span(self, live: Live, count: int) -> Span:
        end = live.computed + count
        while len(live.pages) * PAGE_TOKENS < end:
            live.pages.append(self._free_pages[live.column].pop())
        return Span(live.computed, count, live.pages, logits=1)

    def _run_stage(
        self, stage: int, states: list[Tensor], contexts: list[StepContext]
    ) -> list[Tensor]:
        rows = [context.rows for context in contexts]

        def run(rank: int) -> Tensor:
            cell = Cell(stage, rank)
            begin = getattr(self._exchanges[stage][rank], "begin", None)
            if begin is not None:
                begin(rows)
            with torch.inference_mode():
                return self._cells[cell](states[rank], contexts[rank], self._caches[cell])

        with ThreadPoolExecutor(self.layout.ranks) as threads:
            return list(threads.map(run, self._ranks))


def load(stage: Stage, tensors: Mapping[str, Value]) -> None:
    """Gives a stage those tensors of a checkpoint that are its own."""
    for name, tensor in tensors.items():
        try:
            stage.load_tensor(name, tensor)
        except KeyError:
            continue
    stage.finalize()


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest logit expected."""
    return float((logits - expected).abs().max() / expected.abs().max())

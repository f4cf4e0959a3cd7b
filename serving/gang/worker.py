"""One rank's work in a step: rows in, layers, rows out; on the last stage, tokens.

A worker remembers the sequences of its column (tokens, pages, sampling state) and applies the
differences that plans carry. It knows tensors and fabrics, but neither sockets nor Ray.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.cache import LatentCache
from model.context import Span, StepContext
from model.layout import Cell
from model.sampling import SampledToken, SamplingRow, TokenCounts, sample, score
from model.stage import Stage
from serving.engine.plan import NewSequence, RankPlan, RankResult, Sample, Score, Slice
from serving.gang.exchange import StageExchange
from serving.gang.fabric import Fabric
from serving.gang.grammars import Grammar, Grammars
from serving.gang.trace import StepTrace


@dataclass(slots=True)
class Resident:
    """A sequence as its column knows it."""

    tokens: list[int]
    new: NewSequence
    counts: TokenCounts | None = None
    grammar: Grammar | None = None
    pages: list[int] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.new.prompt_tokens :]

    def append(self, piece: Slice) -> None:
        self.tokens.extend(piece.tokens)
        self.pages.extend(piece.pages)
        if self.counts is not None:
            for token in piece.tokens:
                self.counts.append(token)
        if self.grammar is not None:
            self.grammar.append(piece.tokens)


class Worker:
    """The resident half of one cell.

    Args:
        column: the pipeline's group, or None with one stage; `column.rank` is the stage.
        exchange: the stage's expert exchange, or None with one rank.
        grammars: compiles what sequences are restricted to; the last stage must have one.
        trace: of the stage's parts, if results are to tell where their time went.
    """

    def __init__(
        self,
        cell: Cell,
        stage: Stage,
        cache: LatentCache,
        column: Fabric | None,
        exchange: StageExchange | None,
        hidden_size: int,
        grammars: Grammars | None = None,
        trace: StepTrace | None = None,
    ) -> None:
        self._cell = cell
        self._stage = stage
        self._cache = cache
        self._column = column
        self._exchange = exchange
        self._hidden_size = hidden_size
        self._grammars = grammars
        self._trace = trace
        if trace is not None and exchange is not None:
            exchange.trace = trace.add
        self._device, self._dtype = cache.rows.device, cache.rows.dtype
        self._first = column is None or cell.stage == 0
        self._last = column is None or cell.stage == column.size - 1
        self._residents: dict[int, Resident] = {}

    def join(self, column: Fabric | None, peers: Fabric | None) -> None:
        """Takes up the groups of a new generation; the sequences of the old one are forgotten.

        What is in the cache stays there.
        """
        self._residents.clear()
        self._column = column
        if self._exchange is not None and peers is not None:
            self._exchange.join(peers)

    @torch.inference_mode()
    def step(self, plan: RankPlan) -> RankResult:
        """Runs one step; every rank of the gang must run the same steps in the same order."""
        begun = time.perf_counter()
        self._apply(plan)
        rows = [max(count, 1) for count in plan.rows]  # a rank with nothing to do has a dummy row
        if self._exchange is not None:
            self._exchange.begin(rows)
        context = self._context(plan)
        result = RankResult(plan.step, self._cell.stage, self._cell.rank)
        started = time.perf_counter()
        inputs = self._inputs(plan, rows[self._cell.rank])
        arrived = time.perf_counter()
        outputs = self._stage.forward(inputs, context, self._cache)
        computed = time.perf_counter()
        if self._last:
            self._choose(plan, outputs, result)
        elif self._column is not None:
            self._column.send(outputs, self._cell.stage + 1)
        result.wait_s = arrived - started
        ended = time.perf_counter()
        result.compute_s = ended - arrived
        if self._exchange is not None:
            result.exchange_s = self._exchange.seconds
            result.exchange_bytes = self._exchange.bytes_sent
        if self._trace is not None:
            self._trace.add("wait", started, arrived)
            self._trace.add("sample" if self._last else "hand over", computed, ended)
            self._trace.add("step", begun, ended)
            result.events = self._trace.take()
        return result

    def _apply(self, plan: RankPlan) -> None:
        for sequence in plan.finished:
            self._residents.pop(sequence, None)
        for new in plan.new:
            resident = self._residents[new.id] = Resident(new.tokens, new)
            if self._last and new.sampling.penalized:
                resident.counts = TokenCounts(new.tokens[: new.prompt_tokens], resident.output)
            if self._grammars is not None and new.sampling.grammar is not None:
                resident.grammar = self._grammars.begin(new.sampling.grammar, resident.output)
        for piece in plan.slices:
            self._residents[piece.id].append(piece)

    def _context(self, plan: RankPlan) -> StepContext:
        spans = [
            Span(
                start=piece.start,
                count=piece.count,
                pages=self._residents[piece.id].pages,
                logits=piece.count if piece.score else int(piece.sample),
            )
            for piece in plan.slices
        ]
        return StepContext.build(spans, self._device)

    def _inputs(self, plan: RankPlan, rows: int) -> Tensor:
        """Token ids [rows] on the first stage, hidden states [rows, hidden] on the others."""
        if not self._first and self._column is not None:
            hidden = torch.empty(rows, self._hidden_size, dtype=self._dtype, device=self._device)
            self._column.recv(hidden, self._cell.stage - 1)
            return hidden
        ids: list[int] = []
        for piece in plan.slices:
            tokens = self._residents[piece.id].tokens
            ids.extend(tokens[piece.start : piece.start + piece.count])
        return torch.tensor(ids or [0], dtype=torch.int64, device=self._device)

    def _choose(self, plan: RankPlan, logits: Tensor, result: RankResult) -> None:
        """Samples and scores of a step: logits [S, vocabulary], slice by slice."""
        drawn: list[Slice] = []
        rows: list[SamplingRow] = []
        where: list[int] = []
        first = 0
        for piece in plan.slices:
            end = first + (piece.count if piece.score else int(piece.sample))
            if piece.score:
                result.scores.append(self._score(piece, logits[first:end]))
            if piece.sample:
                drawn.append(piece)
                rows.append(self._sampling_row(piece))
                where.append(end - 1)
            first = end
        chosen = logits if len(where) == len(logits) else logits[where]
        for piece, token in zip(drawn, sample_apart(chosen, rows), strict=True):
            grammar = self._residents[piece.id].grammar
            error = (grammar.error if grammar is not None else None) or token.error
            result.samples.append(Sample(piece.id, token.token, token.logprob, token.top, error))

    def _sampling_row(self, piece: Slice) -> SamplingRow:
        resident = self._residents[piece.id]
        params = resident.new.sampling
        return SamplingRow(
            params,
            position=piece.start + piece.count,
            counts=resident.counts,
            output=resident.output if params.restricted else (),
            allowed=resident.grammar.allowed() if resident.grammar is not None else None,
        )

    def _score(self, piece: Slice, logits: Tensor) -> Score:
        """How likely the prompt tokens were that follow the rows of a slice."""
        resident = self._residents[piece.id]
        start = piece.start + 1
        end = min(start + piece.count, resident.new.prompt_tokens)
        targets = resident.tokens[start:end]
        top = resident.new.sampling.prompt_logprobs or 0
        scored = score(logits[: len(targets)], targets, top)
        return Score(piece.id, start, [own for own, _ in scored], [likely for _, likely in scored])


def sample_apart(logits: Tensor, rows: list[SamplingRow]) -> list[SampledToken]:
    """As `sample`; but a row that makes it fail gets an error, and the others their tokens.

    Halves the rows until the one is found: what a row gives does not depend on the others.
    """
    try:
        return sample(logits, rows)
    except Exception as error:  # whatever it is, it is that row's alone
        if len(rows) == 1:
            return [SampledToken(0, error=f"Sampling failed: {type(error).__name__}.")]
    half = len(rows) // 2
    return sample_apart(logits[:half], rows[:half]) + sample_apart(logits[half:], rows[half:])

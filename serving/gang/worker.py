"""One rank's work in a step: rows in, layers, rows out; on the last stage, tokens.

A worker remembers the sequences of its column (tokens, pages, sampling state) and applies the
differences that plans carry. It knows tensors and fabrics, but neither sockets nor Ray.

Where memory is short, the least important slices of a step fail, and the others go on. The rows
of a failed slice stay part of what ranks hand each other, without meaning: so no other rank has to
know. A rank can only drop slices before its peers meet it in the step, or after; one that is alone
can also begin again.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import LatentCache
from model.context import Span, StepContext
from model.graphs import DecodeGraphs
from model.layout import Cell
from model.sampling import TokenCounts
from model.stage import Stage
from serving.engine.plan import RankPlan, RankResult, Sample, Slice
from serving.gang.exchange import StageExchange
from serving.gang.fabric import Fabric
from serving.gang.sampling import Resident, choose, logits_wanted
from serving.gang.trace import StepTrace

if TYPE_CHECKING:  # a bare GPU machine has no llguidance
    from serving.gang.grammars import Grammars

_NO_MEMORY = "the device is out of memory: try again later, or with a shorter prompt"


class Worker:
    """The resident half of one cell.

    Args:
        column: the pipeline's group, or None with one stage; `column.rank` is the stage.
        exchange: the stage's expert exchange, or None with one rank.
        grammars: compiles what sequences are restricted to; the last stage must have one.
        trace: of the stage's parts, if results are to tell where their time went.
        graphs: of decode steps, where the device launches them faster than Python.
        reserve: makes sure of the memory that a step of so many rows takes; raises
            torch.OutOfMemoryError when there is not so much.
    """

    def __init__(
        self,
        cell: Cell,
        stage: Stage,
        cache: LatentCache,
        column: Fabric | None,
        exchange: StageExchange | None,
        hidden_size: int,
        grammars: "Grammars | None" = None,
        trace: StepTrace | None = None,
        graphs: DecodeGraphs | None = None,
        reserve: Callable[[int], None] | None = None,
    ) -> None:
        self._cell = cell
        self._stage = stage
        self._cache = cache
        self._column = column
        self._exchange = exchange
        self._hidden_size = hidden_size
        self._grammars = grammars
        self._trace = trace
        self._graphs = graphs
        self._reserve = reserve
        if trace is not None and exchange is not None:
            exchange.trace = trace.add
        self._device, self._dtype = cache.rows.device, stage.dtype
        self._first = column is None or cell.stage == 0
        self._last = column is None or cell.stage == column.size - 1
        self._residents: dict[int, Resident] = {}

    def join(self, column: Fabric | None, peers: Fabric | None) -> None:
        """Takes up the groups of a new generation; the sequences of the old one are forgotten.

        What is in the cache stays there.
        """
        self._residents.clear()
        self._column = column
        if self._graphs is not None:
            self._graphs.forget()  # their exchanges are the old group's
        if self._exchange is not None and peers is not None:
            self._exchange.join(peers)

    @torch.inference_mode()
    def step(self, plan: RankPlan) -> RankResult:
        """Runs one step; every rank of the gang must run the same steps in the same order.

        Raises:
            FabricError: a peer is gone.
        """
        begun = time.perf_counter()
        self._apply(plan)
        result = RankResult(plan.step, self._cell.stage, self._cell.rank)
        rows = [max(count, 1) for count in plan.rows]  # a rank with nothing to do has a dummy row
        bucket = None
        if self._graphs is not None and plan.decode:
            bucket = self._graphs.bucket(max(rows))
        if self._exchange is not None:
            self._exchange.begin(rows if bucket is None else [bucket] * len(rows))
        kept = plan.slices if bucket is not None else self._affordable(plan.slices)
        started = time.perf_counter()
        hidden = self._receive(rows[self._cell.rank])
        arrived = time.perf_counter()
        outputs, kept = self._compute(kept, hidden, bucket)
        computed = time.perf_counter()
        if self._last:
            kept = self._choose(kept, outputs, result)
        elif self._column is not None:
            self._column.send(_padded(outputs, rows[self._cell.rank]), self._cell.stage + 1)
        for piece in plan.slices[len(kept) :]:
            result.samples.append(Sample(piece.id, 0, error=_NO_MEMORY))
        self._check()
        ended = time.perf_counter()
        result.wait_s, result.compute_s = arrived - started, ended - arrived
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

    def _affordable(self, slices: list[Slice]) -> list[Slice]:
        """The most important slices, as many as there is memory for."""
        kept = slices
        while self._reserve is not None and kept:
            try:
                self._reserve(sum(piece.count for piece in kept))
                break
            except torch.OutOfMemoryError:
                kept = kept[:-1]
        return kept

    def _receive(self, rows: int) -> Tensor | None:
        """Hidden states [rows, hidden] of the previous stage, if there is one."""
        if self._first or self._column is None:
            return None
        hidden = torch.empty(rows, self._hidden_size, dtype=self._dtype, device=self._device)
        self._column.recv(hidden, self._cell.stage - 1)
        return hidden

    def _compute(
        self, slices: list[Slice], hidden: Tensor | None, bucket: int | None
    ) -> tuple[Tensor, list[Slice]]:
        """The stage's outputs, and the slices that they are of."""
        while True:
            try:
                return self._forward(slices, hidden, bucket), slices
            except torch.OutOfMemoryError:
                if self._exchange is not None or self._column is not None or not slices:
                    raise  # peers are waiting for what will not come: the gang must form again
                slices = slices[:-1]

    def _forward(self, slices: list[Slice], hidden: Tensor | None, bucket: int | None) -> Tensor:
        spans = [
            Span(
                start=piece.start,
                count=piece.count,
                pages=self._residents[piece.id].pages,
                logits=logits_wanted(piece),
            )
            for piece in slices
        ]
        if bucket is not None and self._graphs is not None:
            return self._graphs.run(bucket, spans, self._ids(slices) if hidden is None else hidden)
        context = StepContext.build(spans, self._device)
        if hidden is None:
            ids = self._ids(slices) or [0]
            inputs = torch.tensor(ids, dtype=torch.int64, device=self._device)
        else:
            inputs = hidden[: context.rows]
        return self._stage.forward(inputs, context, self._cache)

    def _ids(self, slices: list[Slice]) -> list[int]:
        """Token ids of the slices' rows."""
        ids: list[int] = []
        for piece in slices:
            tokens = self._residents[piece.id].tokens
            ids.extend(tokens[piece.start : piece.start + piece.count])
        return ids

    def _choose(self, slices: list[Slice], logits: Tensor, result: RankResult) -> list[Slice]:
        """Samples and scores of a step: logits [S, vocabulary], slice by slice.

        Returns:
            The slices that there was memory for.
        """
        while True:
            try:
                samples, scores = choose(self._residents, slices, logits)
            except torch.OutOfMemoryError:
                if not slices:
                    raise
                slices = slices[:-1]
            else:
                result.samples, result.scores = samples, scores
                return slices

    def _check(self) -> None:
        """Raises FabricError if what a peer sent did not come, which a GPU tells only now."""
        if self._column is not None:
            self._column.check()
        if self._exchange is not None:
            self._exchange.check()


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows up to `count`; those of slices that failed are zeros."""
    if len(rows) == count:
        return rows
    return torch.cat((rows, rows.new_zeros(count - len(rows), *rows.shape[1:])))

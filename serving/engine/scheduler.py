"""Which sequence computes which positions in the next step.

There are no phases: every sequence has positions that are known and not yet scheduled, and each
column has a budget of tokens per step that goes to its sequences in order of importance. The
rest of this file is who gets a place on which column, and what a result means.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from serving.engine.column import Column, by_rank
from serving.engine.pages import PAGE_TOKENS
from serving.engine.plan import RankPlan, Sample, Score, StepPlan, StepResult
from serving.engine.request import (
    EngineStats,
    Finish,
    FinishReason,
    Output,
    PromptScores,
    Request,
    RequestError,
    TokenOutput,
)
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine can hold and do at once."""

    stages: int
    columns: int
    pages_per_column: int  # the dummy page included
    max_step_tokens: int  # per column
    max_sequences: int  # running, per column
    max_model_len: int  # prompt + output of one sequence
    prefix_cache: bool = True
    vocab_size: int = 2**31

    @property
    def cache_tokens(self) -> int:
        """Of all columns."""
        return (self.pages_per_column - 1) * PAGE_TOKENS * self.columns

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt + output: what the model allows and one column can hold."""
        return min(self.max_model_len, (self.pages_per_column - 1) * PAGE_TOKENS)


class Scheduler:
    """Requests in, step plans out, step results in, tokens out."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._columns = [
            Column(number, limits.pages_per_column - 1) for number in range(limits.columns)
        ]
        self._waiting: list[Sequence] = []  # most important first, as on each column
        self._by_request: dict[str, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}
        self._in_flight: dict[int, list[tuple[Sequence, int, int]]] = {}  # epoch, end position
        self._arrivals = 0
        self._steps = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0
        self._preemptions = 0

    @property
    def idle(self) -> bool:
        """No sequence is left and no step is on its way."""
        return not self._by_request and not self._in_flight

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            RequestError: it can never be served here.
        """
        total, limit = len(request.prompt) + request.max_tokens, self.limits.max_request_tokens
        if not request.prompt:
            raise RequestError("the prompt is empty")
        if min(request.prompt) < 0 or max(request.prompt) >= self.limits.vocab_size:
            raise RequestError("a token id is outside the vocabulary")
        if not 0 <= request.generated < len(request.prompt):
            raise RequestError("of a prompt, at least one token is the client's own")
        if request.max_tokens < (0 if request.scored else 1):
            raise RequestError("max_tokens must be at least 1, or 0 with prompt_logprobs")
        if total > limit:
            raise RequestError(f"prompt and output of {total} tokens exceed the limit of {limit}")
        if request.id in self._by_request:
            raise RequestError("a request with this id is running")
        self._arrivals += 1
        sequence = Sequence(self._arrivals, request, self._arrivals)
        self._by_request[request.id] = self._by_id[sequence.id] = sequence
        insort(self._waiting, sequence, key=by_rank)

    def cancel(self, request_id: str) -> None:
        """Ends a request at once; its pages are free when this returns. Unknown ids are over."""
        sequence = self._by_request.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute now."""
        step = self._steps + 1
        plans = [RankPlan(step, []) for _ in self._columns]
        budgets = [self.limits.max_step_tokens] * len(plans)
        for column, plan in zip(self._columns, plans, strict=True):
            budgets[column.number] = self._continue(column, plan, budgets[column.number])
        self._admit(plans, budgets)
        if not any(plan.slices for plan in plans):
            return None
        rows = [sum(piece.count for piece in plan.slices) for plan in plans]
        decode = rows == [len(plan.slices) for plan in plans]
        flights = []
        for column, plan in zip(self._columns, plans, strict=True):
            plan.rows, plan.decode = rows, decode
            plan.finished = column.take_left()
            for piece in plan.slices:
                sequence = self._by_id[piece.id]
                flights.append((sequence, sequence.epoch, piece.start + piece.count))
        self._in_flight[step] = flights
        self._steps = step
        return StepPlan(step, plans)

    def complete(self, result: StepResult) -> list[Output]:
        """Takes a step's result in; returns what it gave each request.

        A sequence that any rank reports an error for has failed, whatever the others say, and
        nobody will find its pages in the cache.
        """
        outputs: list[Output] = []
        failed = {sample.id for sample in result.samples if sample.error is not None}
        for score in result.scores:
            scored = self._by_id.get(score.id)
            if scored is not None:
                outputs += self._take_score(scored, score)
        for sequence, epoch, end in self._in_flight.pop(result.step):
            sequence.in_flight -= 1
            if epoch == sequence.epoch:
                sequence.computed = end
                if sequence.id in failed:
                    continue
                if self.limits.prefix_cache:
                    self._columns[sequence.column].name_pages(sequence)
                if not sequence.request.max_tokens and end == sequence.known:
                    self._end(sequence)
                    finish = FinishReason.LENGTH
                    outputs.append(Finish(sequence.request.id, finish, stats=sequence.stats))
        for sample in sorted(result.samples, key=lambda sample: sample.error is None):
            taker = self._by_id.get(sample.id)
            if taker is not None:
                outputs.append(self._take_sample(taker, sample))
        return outputs

    def restart(self, empty_columns: Iterable[int]) -> int:
        """The ranks have forgotten every sequence, and the steps in flight are lost.

        Whoever had a place waits for one again, with the tokens it has, and as important as it
        was. Pages whose content is known still hold it, so that little is computed again.

        Args:
            empty_columns: but for these, where a rank has lost its cache.

        Returns:
            how many sequences had a place.
        """
        placed = [sequence for column in self._columns for sequence in column.restart()]
        for sequence in placed:
            insort(self._waiting, sequence, key=by_rank)
        for number in empty_columns:
            self._columns[number].pool.forget()
        for sequence in self._waiting:
            sequence.in_flight = 0
        self._in_flight.clear()
        return len(placed)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=sum(len(column.running) for column in self._columns),
            waiting=len(self._waiting),
            total_pages=sum(column.pool.total for column in self._columns),
            columns=[column.stats for column in self._columns],
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._preemptions,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when the books of sequences, columns and pages disagree."""
        for column in self._columns:
            column.check_integrity()
        placed = [sequence for column in self._columns for sequence in column.running]
        everyone = sorted(sequence.id for sequence in (*placed, *self._waiting))
        assert everyone == sorted(self._by_id), "a sequence is lost or double"
        assert set(self._by_request) == {s.request.id for s in self._by_id.values()}
        assert self._waiting == sorted(self._waiting, key=by_rank), "the queue is out of order"
        for sequence in self._waiting:
            assert sequence.column == -1
            assert not sequence.pages

    def _continue(self, column: Column, plan: RankPlan, budget: int) -> int:
        """Slices for running sequences; returns what is left of the budget.

        The sequences that can go on are shared out over the steps that can still be launched,
        so that with P stages there is work for P steps in flight.
        """
        ready = [each for each in column.running if len(each.tokens) > each.scheduled]
        share = -(-len(ready) // max(1, self.limits.stages - len(self._in_flight)))
        for sequence in ready:
            if budget == 0 or len(plan.slices) == share:
                break
            if sequence.column != column.number:  # just lost its pages to a more important one
                continue
            count = min(sequence.known - sequence.scheduled, budget)
            count = min(count, self._room(sequence, count))
            if count:
                plan.slices.append(sequence.give(count))
                budget -= count
        return budget

    def _room(self, sequence: Sequence, count: int) -> int:
        """How many of the next `count` positions have pages, after preempting if need be.

        Who loses its pages starts over from its tokens when there is room again. A sample of it
        that is still on its way counts: it was computed from a cache that was whole.
        """
        if count <= sequence.room:
            return count
        for preempted in self._columns[sequence.column].make_room(sequence, count):
            preempted.stats.preemptions += 1
            self._preemptions += 1
            insort(self._waiting, preempted, key=by_rank)
        return min(count, sequence.room)

    def _admit(self, plans: list[RankPlan], budgets: list[int]) -> None:
        """Starts waiting sequences, most important first, until one finds no place."""
        while self._waiting:
            sequence = self._waiting[0]
            column = None if sequence.in_flight else self._choose_column(sequence, budgets)
            if column is None:
                return
            del self._waiting[0]
            self._place(sequence, column)
            plan = plans[column.number]
            plan.new.append(sequence.introduce())
            count = min(sequence.known - sequence.scheduled, budgets[column.number])
            plan.slices.append(sequence.give(self._room(sequence, count)))
            budgets[column.number] -= count

    def _choose_column(self, sequence: Sequence, budgets: list[int]) -> Column | None:
        """The column with room where least is in the way: pages held, less pages shared."""
        best: tuple[int, Column] | None = None
        contents = self._contents(sequence)
        for column in self._columns:
            if not budgets[column.number] or len(column.running) >= self.limits.max_sequences:
                continue
            cost = column.cost(sequence.known, contents)
            if cost is not None and (best is None or cost < best[0]):
                best = (cost, column)
        return None if best is None else best[1]

    def _place(self, sequence: Sequence, column: Column) -> None:
        column.place(sequence, self._contents(sequence))
        if sequence.epoch == 0:
            own = sequence.request.prompt_tokens
            sequence.stats.cached_tokens = min(sequence.scheduled, own)
            self._prefix_query_tokens += sequence.known
            self._prefix_hit_tokens += sequence.scheduled

    def _contents(self, sequence: Sequence) -> list[bytes]:
        """Of its leading pages, as far as they may be another's."""
        return sequence.prompt_hashes if self.limits.prefix_cache else []

    def _take_score(self, sequence: Sequence, score: Score) -> list[Output]:
        """What a score says that was not known yet: a preempted sequence computes some again."""
        known = sequence.scored - score.start
        if known >= len(score.logprobs):
            return []
        sequence.scored = score.start + len(score.logprobs)
        return [
            PromptScores(
                sequence.request.id,
                score.start + known,
                score.logprobs[known:],
                score.tops[known:],
            )
        ]

    def _take_sample(self, sequence: Sequence, sample: Sample) -> TokenOutput | Finish:
        request = sequence.request
        if sample.error is not None:
            self._end(sequence)
            return Finish(request.id, FinishReason.ERROR, sample.error, sequence.stats)
        sequence.tokens.append(sample.token)
        sequence.stats.generated_tokens += 1
        output = TokenOutput(request.id, sample.token, sample.logprob, sample.top)
        if sample.token in request.stop_token_ids:
            output.finish = FinishReason.STOP
        elif sequence.stats.generated_tokens == request.max_tokens:
            output.finish = FinishReason.LENGTH
        if output.finish is not None:
            self._end(sequence)
        if output.finish is not None or sequence.stats.generated_tokens == 1:
            output.stats = sequence.stats
        return output

    def _end(self, sequence: Sequence) -> None:
        del self._by_request[sequence.request.id], self._by_id[sequence.id]
        if sequence.column >= 0:
            self._columns[sequence.column].remove(sequence)
        else:
            self._waiting.remove(sequence)

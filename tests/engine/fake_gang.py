"""A gang without tensors that notices every wrong page, token and position.

Each rank keeps what a real one keeps, from the differences in the plans alone. The cache row of
a position is a hash of all tokens up to it, so a row that was overwritten, never written or
written for another prefix is seen the moment a step reads it.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from model.sampling_params import SamplingParams
from serving.engine import pages as pages_module
from serving.engine.loop import GangBroken, GangFailure, Repair
from serving.engine.pages import DUMMY_PAGE
from serving.engine.plan import (
    NewSequence,
    RankPlan,
    RankResult,
    Sample,
    Score,
    Slice,
    StepPlan,
    StepResult,
)
from serving.engine.request import FinishReason, Request
from serving.engine.scheduler import EngineLimits

VOCABULARY = 40
POISON = 7  # as `top_k`: after two tokens the logits are bad
POISON_MESSAGE = "the logits are not finite"


def row_after(row: int, token: int) -> int:
    """The cache row of a token that follows a position with cache row `row`."""
    return hash((row, token))


def first_row(sampling: SamplingParams) -> int:
    """What precedes position 0; tests give each tenant its own seed, so tenants' rows differ."""
    return hash((sampling.seed, -1))


def rows_of(tokens: Sequence[int], sampling: SamplingParams) -> list[int]:
    rows, row = [], first_row(sampling)
    for token in tokens:
        row = row_after(row, token)
        rows.append(row)
    return rows


def score_of(row: int, token: int) -> float:
    """How likely a prompt token is after a position with this cache row."""
    return float(-(hash((row, token, "score")) % 1000))


def undisturbed_scores(request: Request) -> list[float]:
    """Scores of all prompt tokens but the first."""
    prompt = request.prompt[: request.prompt_tokens]
    rows = rows_of(prompt, request.sampling)
    return [score_of(row, token) for row, token in zip(rows, prompt[1:], strict=False)]


def sampled(row: int) -> int:
    """The token that the model picks after a position with this cache row."""
    return row % VOCABULARY


class Generation(NamedTuple):
    """What a request gives when nothing disturbs it."""

    tokens: list[int]
    reason: FinishReason


def undisturbed(request: Request) -> Generation:
    row = rows_of(request.prompt, request.sampling)[-1]
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        if request.sampling.top_k == POISON and request.generated + len(tokens) == 2:
            return Generation(tokens, FinishReason.ERROR)
        token = sampled(row)
        tokens.append(token)
        row = row_after(row, token)
        if token in request.stop_token_ids:
            return Generation(tokens, FinishReason.STOP)
    return Generation(tokens, FinishReason.LENGTH)


@dataclass(slots=True)
class _Resident:
    """A sequence as a rank knows it."""

    new: NewSequence
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # the right cache row of each token
    pages: list[int] = field(default_factory=list)

    def append(self, tokens: list[int]) -> None:
        row = self.rows[-1] if self.rows else first_row(self.new.sampling)
        for token in tokens:
            row = row_after(row, token)
            self.rows.append(row)
        self.tokens += tokens


class _Rank:
    """One cell: residents and a cache of [page][offset] → row."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._cache: list[list[int | None]] = [[None] * page_tokens for _ in range(pages)]
        self.residents: dict[int, _Resident] = {}

    def step(self, plan: RankPlan) -> tuple[list[Sample], list[Score]]:
        for finished in plan.finished:
            del self.residents[finished]
        for new in plan.new:
            resident = self.residents[new.id] = _Resident(new)
            resident.append(new.tokens)
        for piece in plan.slices:
            self.residents[piece.id].append(piece.tokens)
            self.residents[piece.id].pages += piece.pages
        # A step reads and writes layer by layer: nobody may write what another reads.
        for piece in plan.slices:
            self._check_past(piece)
        for piece in plan.slices:
            self._write(piece)
        for piece in plan.slices:
            self._check_past(piece)
        samples = [self._sample(piece) for piece in plan.slices if piece.sample]
        return samples, [self._score(piece) for piece in plan.slices if piece.score]

    def _check_past(self, piece: Slice) -> None:
        resident = self.residents[piece.id]
        for start in range(0, piece.start, self._page_tokens):
            end = min(start + self._page_tokens, piece.start)
            page = resident.pages[start // self._page_tokens]
            assert self._cache[page][: end - start] == resident.rows[start:end], (
                f"sequence {piece.id}: positions {start} to {end - 1} are not in page {page}"
            )

    def _write(self, piece: Slice) -> None:
        resident = self.residents[piece.id]
        for position in range(piece.start, piece.start + piece.count):
            page = resident.pages[position // self._page_tokens]
            self._cache[page][position % self._page_tokens] = resident.rows[position]
        first, last = piece.start, piece.start + piece.count - 1
        written = resident.pages[first // self._page_tokens : last // self._page_tokens + 1]
        for other in self.residents.values():
            assert other is resident or not set(written) & set(other.pages), (
                f"sequence {piece.id} writes to a page of sequence {other.new.id}"
            )

    def _sample(self, piece: Slice) -> Sample:
        resident = self.residents[piece.id]
        generated = len(resident.tokens) - resident.new.prompt_tokens
        if resident.new.sampling.top_k == POISON and generated == 2:
            return Sample(piece.id, 0, error=POISON_MESSAGE)
        return Sample(piece.id, sampled(resident.rows[piece.start + piece.count - 1]))

    def _score(self, piece: Slice) -> Score:
        resident = self.residents[piece.id]
        end = min(piece.start + piece.count, resident.new.prompt_tokens - 1)
        scores = [
            score_of(resident.rows[position], resident.tokens[position + 1])
            for position in range(piece.start, end)
        ]
        assert scores, "a score of nothing"
        return Score(piece.id, piece.start + 1, scores, [[] for _ in scores])


@dataclass(slots=True)
class _Told:
    """How far plans have come with a sequence of a column, whether or not they have run."""

    column: int
    tokens: int
    pages: list[int] = field(default_factory=list)
    end: int | None = None  # of the last slice
    scored: bool = False


class FakeGang:
    """Runs steps when it is told to, each stage in order of submission and on its own pace."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.plans: list[StepPlan] = []  # all that were submitted
        self._page_tokens = pages_module.PAGE_TOKENS
        self._ranks = [
            [_Rank(limits.pages_per_column, self._page_tokens) for _ in range(limits.columns)]
            for _ in range(limits.stages)
        ]
        self._queues: list[deque[tuple[StepPlan, list[RankResult]]]] = [
            deque() for _ in range(limits.stages)
        ]
        self._finished: deque[StepResult] = deque()
        self._told: dict[int, _Told] = {}

    @property
    def ready_stages(self) -> list[int]:
        """Stages that have a step to run."""
        return [stage for stage, queue in enumerate(self._queues) if queue]

    @property
    def has_result(self) -> bool:
        return bool(self._finished)

    @property
    def residents(self) -> set[int]:
        """Sequences that some rank remembers."""
        return {i for ranks in self._ranks for rank in ranks for i in rank.residents}

    def submit(self, plan: StepPlan) -> None:
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        self._check(plan)
        self.plans.append(plan)
        self._queues[0].append((plan, []))
        assert sum(map(len, self._queues)) + len(self._finished) <= self.limits.stages

    def advance(self, stage: int) -> None:
        """Runs the next step of one stage on all its ranks."""
        plan, results = self._queues[stage].popleft()
        for column, rank in enumerate(self._ranks[stage]):
            samples, scores = rank.step(plan.columns[column])
            if stage < self.limits.stages - 1:
                samples, scores = [], []
            results.append(RankResult(plan.step, stage, column, samples, scores))
        if stage + 1 < self.limits.stages:
            self._queues[stage + 1].append((plan, results))
        else:
            self._finished.append(StepResult(plan.step, results))

    def replace(self, dead: set[tuple[int, int]]) -> list[int]:
        """Ranks (stage, column) died, others take their places; what was on its way is lost.

        Returns the columns that have a rank with an empty cache now.
        """
        for queue in self._queues:
            queue.clear()
        self._finished.clear()
        self._told.clear()
        for stage, column in dead:
            pages = self.limits.pages_per_column
            self._ranks[stage][column] = _Rank(pages, self._page_tokens)
        for ranks in self._ranks:
            for rank in ranks:
                rank.residents.clear()
        return sorted({column for _, column in dead})

    def take_result(self) -> StepResult:
        """The oldest step's result, running what it still needs."""
        while not self._finished:
            self.advance(max(self.ready_stages))
        return self._finished.popleft()

    def _check(self, plan: StepPlan) -> None:
        limits = self.limits
        assert len(plan.columns) == limits.columns
        assert plan.step == (self.plans[-1].step + 1 if self.plans else plan.step)
        rows = [sum(piece.count for piece in column.slices) for column in plan.columns]
        assert any(rows), "an empty step"
        for index, column in enumerate(plan.columns):
            assert column.step == plan.step
            assert column.rows == rows
            assert rows[index] <= limits.max_step_tokens
            for finished in column.finished:
                assert self._told.pop(finished).column == index
        for index, column in enumerate(plan.columns):
            for new in column.new:
                assert new.id not in self._told, "a sequence lives on one column"
                assert 0 < new.prompt_tokens <= len(new.tokens)
                scored = new.sampling.prompt_logprobs is not None
                self._told[new.id] = _Told(index, len(new.tokens), scored=scored)
            for piece in column.slices:
                self._check_slice(index, piece)
            ids = [piece.id for piece in column.slices]
            assert len(ids) == len(set(ids)), "a sequence is twice in a step"
            assert {new.id for new in column.new} <= set(ids)
            living = sum(told.column == index for told in self._told.values())
            assert living <= limits.max_sequences

    def _check_slice(self, column: int, piece: Slice) -> None:
        told = self._told[piece.id]
        assert told.column == column
        assert piece.count >= 1
        assert not (told.end is None and piece.tokens), "a new sequence comes with all its tokens"
        if told.end is None:
            assert piece.start % self._page_tokens == 0, "cached pages are whole"
        else:
            assert piece.start == told.end, "positions follow one another"
        told.tokens += len(piece.tokens)
        told.pages += piece.pages
        told.end = piece.start + piece.count
        assert told.end <= told.tokens, "rows of tokens that nobody has told, or a sample awaited"
        only_scored = told.scored and told.end == told.tokens and not piece.sample
        assert piece.sample == (told.end == told.tokens) or only_scored
        assert len(told.pages) * self._page_tokens >= told.end
        assert len(told.pages) == len(set(told.pages))
        assert DUMMY_PAGE not in told.pages
        assert max(told.pages) < self.limits.pages_per_column


class AsyncFakeGang(FakeGang):
    """The same for an `EngineLoop`; steps end when `finish` is called, or by themselves."""

    def __init__(self, limits: EngineLimits, by_itself: bool = False) -> None:
        super().__init__(limits)
        self.by_itself = by_itself
        self.broken = False
        self._results: asyncio.Queue[StepResult | Exception] = asyncio.Queue()
        self._outcome: asyncio.Future[Repair] = asyncio.Future()  # of the repair to come

    @property
    def in_flight(self) -> int:
        """Steps that have not come back."""
        return sum(map(len, self._queues))

    def submit(self, plan: StepPlan) -> None:
        if self.broken:
            self.plans.append(plan)  # and nobody hears of it
            return
        super().submit(plan)
        if self.by_itself:
            asyncio.get_running_loop().call_soon(self.finish)

    def finish(self) -> None:
        """The oldest step comes back, if there still is one."""
        if not self.in_flight:
            return
        try:
            self._results.put_nowait(self.take_result())
        except AssertionError as error:
            self._results.put_nowait(error)

    def fail(self, message: str) -> None:
        self._results.put_nowait(GangFailure(message))

    def kill(self, dead: set[tuple[int, int]]) -> None:
        """Ranks die; what has come back before still counts."""
        self.broken = True
        cells = [f"{stage}.{column}" for stage, column in sorted(dead)]
        self._repair = Repair(1, cells, self.replace(dead))
        self._results.put_nowait(GangBroken("a rank is gone"))

    def mend(self) -> None:
        """The gang is whole again."""
        if not self._outcome.done():
            self._outcome.set_result(self._repair)

    def give_up(self, message: str) -> None:
        """The repair fails."""
        self._outcome.set_exception(GangFailure(message))

    async def result(self) -> StepResult:
        result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    async def repair(self) -> Repair:
        repair = await self._outcome
        self._outcome = asyncio.Future()
        self.broken = False
        return repair

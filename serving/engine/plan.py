"""The only messages between an engine and its ranks: what to compute, and what came of it.

A plan carries differences. A rank keeps, for each sequence that lives on its column, the
tokens and pages it was told of, so a step in steady state costs one small `Slice` a sequence.
Every rank of every stage receives a plan for every step, even one without slices: the expert
exchange needs all ranks of a stage.

Rank r of stage 0, rank r of stage 1, … form *column* r. A sequence lives on one column, and
its page ids mean the same on all stages of that column.
"""

from dataclasses import dataclass, field

from model.sampling_params import SamplingParams


@dataclass(slots=True)
class NewSequence:
    """Everything a column must know of a sequence that it sees for the first time.

    Sent again after a preemption, since a preempted sequence is forgotten by its column.
    """

    id: int
    tokens: list[int]  # prompt and whatever was generated already
    prompt_tokens: int  # how many of `tokens` are the prompt: penalties tell them apart
    sampling: SamplingParams


@dataclass(slots=True)
class Slice:
    """Consecutive positions of one sequence to compute in this step."""

    id: int
    start: int  # position of the first row; everything before it is in the cache
    count: int
    tokens: list[int] = field(default_factory=list)  # sampled since the last slice: append
    pages: list[int] = field(default_factory=list)  # allocated since the last slice: append
    sample: bool = False  # the last row's logits give the next token
    score: bool = False  # every row's logits say how likely the prompt token after it was


@dataclass(slots=True)
class RankPlan:
    """One step as one column sees it; identical for all stages of the column."""

    step: int
    rows: list[int]  # token rows of every column in this step, this column's included
    finished: list[int] = field(default_factory=list)  # forget these, before anything else
    new: list[NewSequence] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    decode: bool = False  # every slice of every column is a single position


@dataclass(slots=True)
class StepPlan:
    """One step of the whole gang: a `RankPlan` for each column."""

    step: int
    columns: list[RankPlan]

    @property
    def rows(self) -> int:
        return sum(self.columns[0].rows)


@dataclass(slots=True)
class Sample:
    """The token that a sequence got, or why it cannot go on."""

    id: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)  # (token, logprob), likeliest first
    error: str | None = None  # set: `token` means nothing and the sequence must be failed


@dataclass(slots=True)
class Score:
    """Log-probabilities of consecutive prompt tokens, each given all that stand before it."""

    id: int
    start: int  # position of the first one
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]  # for each: (token, logprob), likeliest first


TraceEvent = tuple[str, float, float]  # what it was, from when to when, in seconds


@dataclass(slots=True)
class RankResult:
    """What one rank reports of one step; samples and scores come from the last stage only."""

    step: int
    stage: int
    rank: int
    samples: list[Sample] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    compute_s: float = 0.0
    wait_s: float = 0.0  # waiting for the previous stage's hidden states
    exchange_s: float = 0.0  # inside expert exchanges, waiting for peers included
    exchange_bytes: int = 0  # sent to peers; steps that a graph replays tell neither
    events: list[TraceEvent] = field(default_factory=list)  # of the host's clock; if traced


@dataclass(slots=True)
class StepResult:
    """All ranks' results of one step."""

    step: int
    ranks: list[RankResult]

    @property
    def samples(self) -> list[Sample]:
        return [sample for rank in self.ranks for sample in rank.samples]

    @property
    def scores(self) -> list[Score]:
        return [score for rank in self.ranks for score in rank.scores]

"""A column's sequences, and what the last stage's logits give them: tokens and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.sampling import SampledToken, SamplingRow, TokenCounts, sample, score
from serving.engine.plan import NewSequence, Sample, Score, Slice

if TYPE_CHECKING:  # a bare GPU machine has no llguidance
    from serving.gang.grammars import Grammar


@dataclass(slots=True)
class Resident:
    """A sequence as its column knows it."""

    tokens: list[int]
    new: NewSequence
    counts: TokenCounts | None = None
    grammar: "Grammar | None" = None
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

    def sampling_row(self, position: int) -> SamplingRow:
        """How the token at this position is to be drawn."""
        params = self.new.sampling
        return SamplingRow(
            params,
            position,
            counts=self.counts,
            output=self.output if params.restricted else (),
            allowed=self.grammar.allowed() if self.grammar is not None else None,
        )

    def score(self, piece: Slice, logits: Tensor) -> Score:
        """How likely the prompt tokens were that follow the rows of a slice."""
        start = piece.start + 1
        end = min(start + piece.count, self.new.prompt_tokens)
        targets = self.tokens[start:end]
        top = self.new.sampling.prompt_logprobs or 0
        scored = score(logits[: len(targets)], targets, top)
        return Score(piece.id, start, [own for own, _ in scored], [likely for _, likely in scored])


def logits_wanted(piece: Slice) -> int:
    """How many rows of logits a slice wants, its last ones."""
    return piece.count if piece.score else int(piece.sample)


def choose(
    residents: Mapping[int, Resident], slices: Sequence[Slice], logits: Tensor
) -> tuple[list[Sample], list[Score]]:
    """Samples and scores of a step: logits [S, vocabulary], slice by slice."""
    drawn: list[Slice] = []
    rows: list[SamplingRow] = []
    where: list[int] = []
    scores: list[Score] = []
    first = 0
    for piece in slices:
        end = first + logits_wanted(piece)
        if piece.score:
            scores.append(residents[piece.id].score(piece, logits[first:end]))
        if piece.sample:
            drawn.append(piece)
            rows.append(residents[piece.id].sampling_row(piece.start + piece.count))
            where.append(end - 1)
        first = end
    chosen = logits if len(where) == len(logits) else logits[where]
    samples: list[Sample] = []
    for piece, token in zip(drawn, sample_apart(chosen, rows), strict=True):
        grammar = residents[piece.id].grammar
        error = (grammar.error if grammar is not None else None) or token.error
        samples.append(Sample(piece.id, token.token, token.logprob, token.top, error))
    return samples, scores


def sample_apart(logits: Tensor, rows: list[SamplingRow]) -> list[SampledToken]:
    """As `sample`; but a row that makes it fail gets an error, and the others their tokens.

    Halves the rows until the one is found: what a row gives does not depend on the others.
    """
    try:
        return sample(logits, rows)
    except torch.OutOfMemoryError:
        raise  # of all rows together
    except Exception as error:  # whatever it is, it is that row's alone
        if len(rows) == 1:
            return [SampledToken(0, error=f"Sampling failed: {type(error).__name__}.")]
    half = len(rows) // 2
    return sample_apart(logits[:half], rows[:half]) + sample_apart(logits[half:], rows[half:])

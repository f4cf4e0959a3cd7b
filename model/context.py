"""What all layers of a stage must know of one step: whose rows these are, and their past.

Rows of a step are of two kinds. A *decode row* is the only position of its sequence in the
step; all of them go through attention as one batch. A *chunk* is several consecutive positions
of one sequence; chunks go one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.cache import DUMMY_PAGE, PAGE_TOKENS

# From so many queries on, expanding the cached latents to keys and values costs less than
# querying the latents themselves: 2 * 512 * 256 FLOP a cached token and head against
# 2 * (576 + 512) - 2 * (192 + 128) FLOP a query, cached token and head.
EXPANDED_QUERIES = 170


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions of one sequence that one rank computes in a step."""

    start: int
    count: int
    pages: Sequence[int]  # all pages of the sequence so far; they cover start + count tokens
    logits: int = 0  # how many of its last rows need logits


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The step's decode rows, those with the longest past first.

    Attributes:
        rows: [B] int64, which row of the step each one is; None if they are the whole step in
            its order.
        pages: [B, P] int64 page tables, padded with the dummy page.
        lengths: [B] int64, keys that each one sees, its own included; at least 1.
    """

    rows: Tensor | None
    pages: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several consecutive positions of one sequence.

    Attributes:
        rows: where they are in the step.
        past: [start] int64, cache slots of everything before them; may be empty.
        absorbed: whether they query the past's latents as they are, or expanded.
    """

    rows: slice
    past: Tensor
    absorbed: bool


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step as attention sees it; built once and shared by all layers.

    Attributes:
        positions: [T] int64, of each row in its sequence.
        slots: [T] int64, cache row of each, page * 64 + offset.
        decode: the rows that are alone in the step, if there are any.
        chunks: the others.
        logit_rows: [S] int64, rows whose logits are wanted, in the order of the spans.
    """

    positions: Tensor
    slots: Tensor
    decode: DecodeRows | None
    chunks: tuple[Chunk, ...]
    logit_rows: Tensor

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    @classmethod
    def build(cls, spans: Sequence[Span], device: torch.device) -> "StepContext":
        """The context of these spans, whose rows follow each other in this order.

        Without any span the rank has nothing to do but must take part in the step: it gets one
        row on the dummy page, whose result nobody asks for.

        Raises:
            ValueError: an empty span, or one that its pages do not cover.
        """
        spans = spans or (Span(start=0, count=1, pages=(DUMMY_PAGE,)),)
        placed = _place(spans)
        lone = [each for each in placed if each.span.count == 1]
        logit_rows = [
            row for each in placed for row in range(each.end - each.span.logits, each.end)
        ]
        return cls(
            positions=_tensor(
                np.concatenate([np.arange(s.start, s.start + s.count) for s in spans]), device
            ),
            slots=_tensor(np.concatenate([e.slots[e.span.start :] for e in placed]), device),
            decode=_decode_rows(lone, device) if lone else None,
            chunks=tuple(_chunk(each, device) for each in placed if each.span.count > 1),
            logit_rows=_tensor(np.array(logit_rows, dtype=np.int64), device),
        )


class _Placed(NamedTuple):
    """A span, its first row in the step, and the cache slots of its sequence up to its end."""

    span: Span
    row: int
    pages: np.ndarray  # [P] int64
    slots: np.ndarray  # [start + count] int64

    @property
    def end(self) -> int:
        """The row after its last."""
        return self.row + self.span.count


def _place(spans: Sequence[Span]) -> list[_Placed]:
    placed, row = [], 0
    for span in spans:
        end = span.start + span.count
        if span.count < 1 or len(span.pages) * PAGE_TOKENS < end:
            raise ValueError(
                f"a span of {span.count} rows from {span.start} on with {len(span.pages)} pages"
            )
        pages = np.asarray(span.pages[: -(-end // PAGE_TOKENS)], dtype=np.int64)
        slots = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(-1)[:end]
        placed.append(_Placed(span, row, pages, slots))
        row += span.count
    return placed


def _decode_rows(placed: list[_Placed], device: torch.device) -> DecodeRows:
    placed = sorted(placed, key=lambda each: each.span.start, reverse=True)
    tables = np.full((len(placed), len(placed[0].pages)), DUMMY_PAGE, dtype=np.int64)
    for table, each in zip(tables, placed, strict=True):
        table[: len(each.pages)] = each.pages
    return DecodeRows(
        rows=_tensor(np.array([each.row for each in placed]), device),
        pages=_tensor(tables, device),
        lengths=_tensor(np.array([each.span.start + 1 for each in placed]), device),
    )


def _chunk(placed: _Placed, device: torch.device) -> Chunk:
    span, row = placed.span, placed.row
    return Chunk(
        rows=slice(row, row + span.count),
        past=_tensor(placed.slots[: span.start], device),
        absorbed=span.count < EXPANDED_QUERIES,
    )


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)

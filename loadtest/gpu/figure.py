"""Figures by name, and what they must reach."""

from collections.abc import Mapping
from dataclasses import dataclass

COPY = "copy bandwidth"
MATMUL = "bf16 matmul"
ONE_STREAM = "Lite bf16, one stream, 1K context"
MANY_STREAMS = "Lite bf16, 256 streams, 1K context"
PREFILL = "Lite bf16 prefill, 8K-token batch"
EAGER = "Lite bf16, one stream, 1K context, without graphs"
OURS_64 = "Lite bf16, 64 streams, prompts included"
ATTEND_128 = "MLA decode, 128 heads, batch 64, 8K context"
ATTEND_16 = "MLA decode, 16 heads, batch 64, 8K context"
ATTEND_ERROR = "MLA decode, bf16, error against fp64"
EXPERTS_DECODE = "experts, 236B layer, decode batch 128"
EXPERTS_PREFILL = "experts, 236B layer, prefill of 8K tokens"
EXPERTS_ERROR = "experts, bf16, error against fp64"
PEER_64 = "transformers, 64 streams, prompts included"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure, or its ratio to another of the same run, that must be reached.

    Attributes:
        at_most: whether less is better, as for errors.
    """

    figure: str
    bound: float
    over: str | None = None
    at_most: bool = False

    def reached(self, figures: Mapping[str, Figure]) -> float | None:
        """The value; None if something of it was not measured."""
        measured = figures.get(self.figure)
        if measured is None:
            return None
        if self.over is None:
            return measured.value
        other = figures.get(self.over)
        return measured.value / other.value if other is not None and other.value else None

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


GOALS = (
    # With 128 heads products are the tighter limit, with 16 the reading of the cache.
    Goal(ATTEND_128, 0.5, over=MATMUL),
    Goal(ATTEND_16, 0.7, over=COPY),
    Goal(ATTEND_ERROR, 1e-2, at_most=True),
    Goal(EXPERTS_DECODE, 0.7, over=COPY),
    Goal(EXPERTS_PREFILL, 0.5, over=MATMUL),
    Goal(EXPERTS_ERROR, 1e-2, at_most=True),
    Goal(ONE_STREAM, 250.0),
    Goal(MANY_STREAMS, 10_000.0),
    Goal(PREFILL, 0.4, over=MATMUL),
    Goal(ONE_STREAM, 3.0, over=EAGER),
    Goal(OURS_64, 8.0, over=PEER_64),
)

"""The figures of the comparison, from what was timed: the same arithmetic for every candidate.

Offline: prefill is all prompt tokens over the time until every request has its first token;
decode is the tokens after the first ones over the time that they take, which is the whole run
less that. HTTP: all output tokens over the time of the bursts, from arrivals to the last end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from loadtest.report import LoadReport

Part = Literal["offline", "http"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One column of the table."""

    name: str
    title: str
    part: Part
    higher_is_better: bool = True

    def times_as_good(self, value: float, reference: float) -> float | None:
        """Above one: better than the reference, whichever direction better is."""
        over, under = (value, reference) if self.higher_is_better else (reference, value)
        return over / under if under > 0 else None


PREFILL = Figure("prefill_tokens_per_second", "prefill tok/s", "offline")
DECODE = Figure("decode_tokens_per_second", "decode tok/s", "offline")
DECODE_ONE = Figure("decode_tokens_per_second_batch_1", "decode tok/s, batch 1", "offline")
OUTPUT = Figure("output_tokens_per_second", "output tok/s", "http")
TTFT = Figure("ttft_p50_ms", "TTFT p50 ms", "http", higher_is_better=False)
ITL = Figure("itl_p50_ms", "ITL p50 ms", "http", higher_is_better=False)
TPOT = Figure("tpot_p50_ms", "time/token p50 ms", "http", higher_is_better=False)
FIGURES = (PREFILL, DECODE, DECODE_ONE, OUTPUT, TTFT, ITL, TPOT)
Values = dict[str, float]  # by figure name


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(min(values), median(values), max(values))


def offline_figures(runs: list[dict[str, Any]]) -> Values:
    """From what `timing.measure` told; prefill and decode of the largest batch.

    Raises:
        ValueError: the longer run took no longer than the run of one token.
    """
    largest = max(runs, key=lambda run: int(run["batch"]))
    values = {
        PREFILL.name: largest["prompt_tokens"] / largest["first_s"],
        DECODE.name: _decode(largest),
    }
    for run in runs:
        if run["batch"] == 1:
            values[DECODE_ONE.name] = _decode(run)
    return values


def _decode(run: dict[str, Any]) -> float:
    seconds = float(run["all_s"]) - float(run["first_s"])
    if seconds <= 0:
        raise ValueError(f"decoding took {seconds:.3f} s: the machine is too busy to measure")
    return float(run["later_tokens"]) / seconds


def http_figures(reports: Sequence[LoadReport]) -> Values:
    """Of several bursts: tokens over the sum of their times, medians over all their requests.

    Between chunks (ITL) is what a reader sees; the time per token counts tokens that a server
    sends several to a chunk.
    """
    good = [record for report in reports for record in report.records if record.succeeded]
    seconds = sum(report.seconds for report in reports)
    first = [(r.first_s or 0.0) - r.intended_s for r in good]
    gaps = [gap for record in good for gap in record.gaps_s]
    each = [
        ((r.last_s or 0.0) - (r.first_s or 0.0)) / (r.output_tokens - 1)
        for r in good
        if r.output_tokens > 1
    ]
    return {
        OUTPUT.name: sum(record.output_tokens for record in good) / seconds,
        TTFT.name: 1e3 * median(first),
        ITL.name: 1e3 * median(gaps),
        TPOT.name: 1e3 * median(each),
    }

"""What came out: every candidate's figures, and the ratios that are to be reached."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.peers.candidates import OURS, OURS_INT8, OURS_SERVER, RAY_LLM, VLLM, VLLM_SERVER
from loadtest.peers.figures import (
    DECODE,
    DECODE_ONE,
    FIGURES,
    OUTPUT,
    PREFILL,
    TTFT,
    Figure,
    Spread,
    Values,
)

_LAYOUT = re.compile(r" \d+x\d+$")
Round = Mapping[str, Values | str]  # candidate → its figures, or why it has none


@dataclass(frozen=True, slots=True)
class Goal:
    """One ratio: ours over theirs, in the same round.

    Attributes:
        ours: beginning of the names of candidates; the best of them counts.
        bound: at least; at most for a figure of which less is better.
    """

    figure: Figure
    ours: str
    theirs: str
    bound: float

    @property
    def title(self) -> str:
        return f"{self.figure.title}: {self.ours} / {self.theirs}"

    def ratio(self, measured: Round) -> float | None:
        """None where one of the two has no figure."""
        reference = measured.get(self.theirs)
        found = [
            values[self.figure.name]
            for name, values in measured.items()
            if isinstance(values, dict) and self._is_ours(name) and self.figure.name in values
        ]
        if not found or not isinstance(reference, dict) or self.figure.name not in reference:
            return None
        best = max(found) if self.figure.higher_is_better else min(found)
        return best / reference[self.figure.name]

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.figure.higher_is_better else ratio <= self.bound

    def _is_ours(self, name: str) -> bool:
        """The candidate itself, or one of its layouts, whose names end with `stages`x`ranks`."""
        return _LAYOUT.sub("", name) == self.ours


GOALS = (
    Goal(DECODE, OURS, VLLM, 1.3),
    Goal(DECODE_ONE, OURS, VLLM, 1.2),
    Goal(PREFILL, OURS, VLLM, 1.3),
    Goal(DECODE, OURS_INT8, VLLM, 1.8),
    Goal(OUTPUT, OURS_SERVER, RAY_LLM, 1.8),
    Goal(OUTPUT, OURS_SERVER, VLLM_SERVER, 1.4),
    Goal(TTFT, OURS_SERVER, RAY_LLM, 0.6),
)


def markdown(rounds: Sequence[Round]) -> str:
    """Both tables; a cell is `median (min – max)` over the rounds."""
    return f"{_figures(rounds)}\n\n{_goals(rounds)}\n"


def _figures(rounds: Sequence[Round]) -> str:
    names = list(dict.fromkeys(name for measured in rounds for name in measured))
    head = ["", *(figure.title for figure in FIGURES)]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in names:
        results = [measured[name] for measured in rounds if name in measured]
        known = [values for values in results if isinstance(values, dict)]
        if not known:
            lines.append(_row([name, str(results[-1]), *[""] * (len(FIGURES) - 1)]))
            continue
        cells = [_cell([v[f.name] for v in known if f.name in v], 1) for f in FIGURES]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def _goals(rounds: Sequence[Round]) -> str:
    head = ["ratio", "wanted", "measured", "met by the median"]
    lines = [_row(head), _row(["---"] * len(head))]
    for goal in GOALS:
        ratios = [ratio for measured in rounds if (ratio := goal.ratio(measured)) is not None]
        sign = "≥" if goal.figure.higher_is_better else "≤"
        verdict = ""
        if ratios:
            verdict = "yes" if goal.met(Spread.of(ratios).median) else "no"
        lines.append(_row([goal.title, f"{sign} {goal.bound:g}", _cell(ratios, 2), verdict]))
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = Spread.of(values)
    low, middle, high = (f"{v:.{digits}f}" for v in (spread.min, spread.median, spread.max))
    return f"{middle} ({low} – {high})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

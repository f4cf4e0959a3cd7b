"""Steps as a timeline: a Chrome trace for the eye, means for the table.

The format is the Trace Event Format's JSON array of complete events, which chrome://tracing and
Perfetto open.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.engine.loop import StepTimes
from serving.engine.plan import StepPlan, StepResult

ENGINE = "engine"


@dataclass(slots=True)
class Timeline:
    """What engine and ranks did in every step of this host, by its monotonic clock.

    Beside what ranks report there is *plan*, the scheduler's work, and *wire*: what passes from a
    step's submission to its result while no rank is at it, the way there and back and the waiting
    behind earlier steps. A rank's *exchange* has its waiting for peers in it; a stage's *exchange
    without waiting* is, of each exchange, the time of the rank that came last.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # of each phase
    seconds: dict[tuple[str, str, str], float] = field(
        default_factory=lambda: defaultdict(float)
    )  # by phase, who and what

    def add(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None:
        """Takes one finished step."""
        self.steps[_phase(plan)] += 1
        self._event(ENGINE, "plan", times.begun, times.submitted, plan)
        starts, ends = [], []
        exchanges: dict[int, list[list[float]]] = defaultdict(list)  # by stage: of each rank
        for rank in result.ranks:
            for name, started, ended in rank.events:
                self._event(f"rank {rank.stage}.{rank.rank}", name, started, ended, plan)
                if name == "step":
                    starts.append(started)
                    ends.append(ended)
            took = [ended - started for name, started, ended in rank.events if name == "exchange"]
            exchanges[rank.stage].append(took)
        for stage, by_rank in exchanges.items():
            alone = sum(min(each) for each in zip(*by_rank, strict=True))
            if alone:
                self.seconds[_phase(plan), f"stage {stage}", "exchange without waiting"] += alone
        if starts:
            self._event(ENGINE, "wire", times.submitted, min(starts), plan)
            self._event(ENGINE, "wire", max(ends), times.finished, plan)

    def _event(self, who: str, name: str, started: float, ended: float, plan: StepPlan) -> None:
        self.seconds[_phase(plan), who, name] += ended - started
        self.events.append(
            {
                "ph": "X",
                "pid": who,
                "tid": 0,
                "name": name,
                "ts": 1e6 * started,
                "dur": 1e6 * (ended - started),
                "args": {"step": plan.step, "rows": plan.rows},
            }
        )

    def write(self, path: Path) -> None:
        """Writes the trace, with times from its first event on."""
        first = min((event["ts"] for event in self.events), default=0.0)
        shifted = [event | {"ts": event["ts"] - first} for event in self.events]
        path.write_text(json.dumps({"traceEvents": shifted}), encoding="utf-8")

    def means_ms(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds a step, by phase, who and what."""
        means: dict[str, dict[str, dict[str, float]]] = {}
        for (phase, who, name), seconds in sorted(self.seconds.items()):
            each = means.setdefault(phase, {}).setdefault(who, {})
            each[name] = 1e3 * seconds / self.steps[phase]
        return means


def _phase(plan: StepPlan) -> str:
    """Whether any sequence has more than one row in the step."""
    slices = (piece for column in plan.columns for piece in column.slices)
    return "prefill" if any(piece.count > 1 for piece in slices) else "decode"

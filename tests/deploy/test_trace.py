"""The timeline of steps, by hand-made ones."""

import json
from pathlib import Path

import pytest

from deploy.trace import Timeline
from serving.engine.loop import StepTimes
from serving.engine.plan import RankPlan, RankResult, Slice, StepPlan, StepResult, TraceEvent


def step(number: int, count: int, *events: list[TraceEvent]) -> tuple[StepPlan, StepResult]:
    """A step of one slice, and what each of its ranks says."""
    plan = RankPlan(number, [count], slices=[Slice(1, 0, count)])
    ranks = [RankResult(number, 0, rank, events=each) for rank, each in enumerate(events)]
    return StepPlan(number, [plan] * len(events)), StepResult(number, ranks)


def test_means_tell_prefill_from_decode_and_wire_from_work(tmp_path: Path) -> None:
    timeline = Timeline()
    first: list[TraceEvent] = [("exchange", 1.30, 1.40), ("step", 1.20, 1.50)]
    second: list[TraceEvent] = [("exchange", 1.38, 1.41), ("step", 1.25, 1.60)]
    for number in range(2):
        timeline.add(*step(number, 1, first, second), StepTimes(1.0, 1.1, 1.7))
    timeline.add(*step(2, 5, [("step", 2.0, 4.0)]), StepTimes(2.0, 2.0, 4.0))
    means = timeline.means_ms()
    assert means["decode"]["engine"] == pytest.approx({"plan": 100, "wire": 200})
    assert means["decode"]["rank 0.0"] == pytest.approx({"exchange": 100, "step": 300})
    assert means["decode"]["rank 0.1"] == pytest.approx({"exchange": 30, "step": 350})
    assert means["decode"]["stage 0"] == pytest.approx({"exchange without waiting": 30})
    assert means["prefill"]["rank 0.0"] == pytest.approx({"step": 2000})

    file = tmp_path / "trace.json"
    timeline.write(file)
    events = json.loads(file.read_text())["traceEvents"]
    assert min(event["ts"] for event in events) == 0.0
    (late,) = [e for e in events if e["name"] == "step" and e["args"]["step"] == 2]
    assert (late["ts"], late["dur"], late["pid"]) == pytest.approx((1e6, 2e6, "rank 0.0"))


def test_no_steps_make_an_empty_trace(tmp_path: Path) -> None:
    Timeline().write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == {"traceEvents": []}

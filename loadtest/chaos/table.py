"""What is to be reached, and what was: one line for each goal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.chaos.outcome import Outcome
from loadtest.chaos.scenarios.disconnect import STEPS
from loadtest.chaos.scenarios.engine_kill import PAUSE as ENGINE_PAUSE
from loadtest.chaos.scenarios.rank_kill import PAUSE as RANK_PAUSE
from loadtest.chaos.scenarios.rank_kill import RESTART
from loadtest.chaos.scenarios.router_kill import EXTRA, FAILED
from loadtest.chaos.scenarios.soak import GROWING

Outcomes = Mapping[str, Outcome]  # by scenario


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table; at most `bound` is wanted.

    Attributes:
        values: one for each fault, or one of all; empty if it was not measured.
    """

    title: str
    bound: float
    values: Callable[[Outcomes], Sequence[float]]
    unit: str = ""

    def met(self, values: Sequence[float]) -> bool:
        """By the median."""
        return median(values) <= self.bound


def _sum(of: Callable[[Outcome], float]) -> Callable[[Outcomes], Sequence[float]]:
    """Over all scenarios that were run."""
    return lambda outcomes: [sum(map(of, ran))] if (ran := _ran(outcomes)) else []


def _figure(name: str) -> Callable[[Outcomes], Sequence[float]]:
    """A figure's values, of whoever measured it."""
    return lambda outcomes: [
        value for outcome in outcomes.values() for value in outcome.figures.get(name, ())
    ]


def _errors_of(scenario: str) -> Callable[[Outcomes], Sequence[float]]:
    """What failed in one scenario, if it was run to its end."""

    def values(outcomes: Outcomes) -> Sequence[float]:
        outcome = outcomes.get(scenario)
        if outcome is None or outcome.skipped or outcome.broken:
            return []
        return [sum(outcome.errors.values())]

    return values


def _ratio(outcomes: Outcomes) -> Sequence[float]:
    """Of a repair's pause to that of a restart, by their medians."""
    repair, restart = _figure(RANK_PAUSE)(outcomes), _figure(RESTART)(outcomes)
    return [median(repair) / median(restart)] if repair and restart else []


def _ran(outcomes: Outcomes) -> list[Outcome]:
    return [outcome for outcome in outcomes.values() if outcome.skipped is None]


GOALS = (
    Goal(
        "requests that a client saw fail, ingress kills excepted",
        0,
        _sum(lambda o: sum(o.errors.values())),
    ),
    Goal("tokens lost, doubled or different", 0, _sum(lambda o: o.tokens)),
    Goal(
        "answers wrong in anything else: finish, usage, text, log-probabilities",
        0,
        _sum(lambda o: o.wrong),
    ),
    Goal("rank kill -9 → next token, one replica (repair)", 6, _figure(RANK_PAUSE), "s"),
    Goal("the same, over a replica restart", 0.5, _ratio),
    Goal("engine kill -9 → next token, two replicas (resume)", 1, _figure(ENGINE_PAUSE), "s"),
    Goal("router kill -9: requests failed", 0, _figure(FAILED)),
    Goal("router kill -9: extra time to first token, p99", 100, _figure(EXTRA), "ms"),
    Goal("rolling update of the engine under load: errors", 0, _errors_of("rolling-update")),
    Goal("head kill -9 and restart with Redis: errors", 0, _errors_of("head-loss")),
    Goal("client leaves → pages free: steps", 1, _figure(STEPS)),
    Goal("soak: errors", 0, _errors_of("soak")),
    Goal("soak: figures that grow (memory, descriptors, pages)", 0, _figure(GROWING)),
    Goal("what was not given back after a fault", 0, _sum(lambda o: len(o.kept))),
    Goal("scenarios that broke off", 0, _sum(lambda o: o.broken is not None)),
)


def markdown(outcomes: Outcomes) -> str:
    """The goals, and below them every scenario."""
    return f"{_goals(outcomes)}\n\n{_scenarios(outcomes)}\n"


def _goals(outcomes: Outcomes) -> str:
    lines = [_row(["figure", "at most", "median", "worst", "of", "met"]), _row(["---"] * 6)]
    for goal in GOALS:
        values = goal.values(outcomes)
        cells = ["not measured", "", "", ""]
        if values:
            figures = [_number(median(values), goal.unit), _number(max(values), goal.unit)]
            cells = [*figures, str(len(values)), "yes" if goal.met(values) else "no"]
        lines.append(_row([goal.title, _number(goal.bound, goal.unit), *cells]))
    return "\n".join(lines)


def _scenarios(outcomes: Outcomes) -> str:
    head = ["scenario", "layout", "faults", "requests", "errors", "tokens wrong", "not given back",
            "longest silence", "result"]  # fmt: skip
    lines = [_row(head), _row(["---"] * len(head))]
    for name, outcome in outcomes.items():
        if outcome.skipped:
            lines.append(_row([name, *[""] * (len(head) - 2), f"skipped: {outcome.skipped}"]))
            continue
        errors = str(sum(outcome.errors.values()))
        if outcome.excused:
            errors += f" (and {sum(outcome.excused.values())} of killed ingresses)"
        result = f"broke off: {outcome.broken}" if outcome.broken else "to its end"
        cells = [outcome.layout, str(len(outcome.faults)), str(outcome.requests), errors]
        cells += [str(outcome.tokens), str(len(outcome.kept)), f"{outcome.silence_s:.1f} s"]
        lines.append(_row([name, *cells, result]))
    total = sum(outcome.requests for outcome in outcomes.values())
    faults = sum(len(outcome.faults) for outcome in outcomes.values())
    lines.append(_row(["all", "", str(faults), str(total), *[""] * (len(head) - 4)]))
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

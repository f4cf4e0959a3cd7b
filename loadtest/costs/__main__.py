"""`python -m loadtest.costs`: measures, prints one table and writes what came out."""

import argparse
import asyncio
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from deploy.bench import machine
from loadtest.costs import lease, plan, streams, tokens
from loadtest.costs.client import ClientError
from loadtest.costs.result import Result, markdown
from loadtest.costs.server import paced_server
from loadtest.peers.process import ROOT, PeerFailed, adopt_orphans

SCHEMA = "expertline.costs/1"
NAMES = ("tokens", "streams", "lease", "plan")
_PACKAGES = ("expertline", "ray", "torch")


def main() -> int:
    """The command; exit code 1 if something could not be measured, 130 after Ctrl-C."""
    options = _options()
    adopt_orphans()
    gc.collect()
    gc.freeze()  # a pause for what only this process has loaded is no cost of serving
    results: list[Result | str] = []
    try:
        for result in measured(options.only or NAMES, options.seconds):
            results.append(result)
            told = result if isinstance(result, str) else f"{result.name}: {result.value:.4g}"
            print(told, file=sys.stderr, flush=True)
            write(options.out, results)
    except KeyboardInterrupt:
        return 130
    print(markdown(results))
    return 1 if any(isinstance(result, str) for result in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.costs", description=__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, help="repeatable")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of tokens; a level of streams takes a third"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results")
    return parser.parse_args()


def measured(names: Sequence[str], seconds: float) -> Iterator[Result | str]:
    """One after the other; a string says why there is no figure."""
    if "lease" in names:
        yield lease.measure()
    if "plan" in names:
        yield plan.measure()
    if {"tokens", "streams"} & set(names):
        yield from _served(names, seconds)


def _served(names: Sequence[str], seconds: float) -> Iterator[Result | str]:
    """What needs a server, of one server."""
    try:
        with paced_server(max(streams.LEVELS)) as server:
            if "tokens" in names:
                yield asyncio.run(tokens.measure(server, seconds=seconds))
            if "streams" in names:
                yield asyncio.run(streams.measure(server, seconds=seconds / 3))
    except (PeerFailed, ClientError) as error:
        yield f"not measured: {error}"


def write(folder: Path, results: Sequence[Result | str]) -> None:
    """`costs.json` and `costs.md`, anew after every figure: a run that ends early has some."""
    where = machine()
    command = f"python -m loadtest.costs {' '.join(sys.argv[1:])}".strip()
    report = {
        "schema": SCHEMA,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "versions": {name: version(name) for name in _PACKAGES},
        "results": [each if isinstance(each, str) else each.as_dict() for each in results],
    }
    about = (
        f"# What serving costs beside the model\n\n{where['cpu']}, {where['cpus']} cores; "
        f"`{command}`. Versions and all figures are in `costs.json`.\n\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2)
    (folder / "costs.json").write_text(text + "\n", encoding="utf-8")
    (folder / "costs.md").write_text(about + markdown(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

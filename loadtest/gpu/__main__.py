"""`python -m loadtest.gpu`: one part after the other, each within its time, and one report."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.gpu.figure import Figure
from loadtest.gpu.report import Outcome, as_json, as_markdown, machine

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """A module of this package, or a run of pytest, and the seconds that it may take."""

    name: str
    limit_s: float
    tests: tuple[str, ...] = ()


PARTS = (
    Part("roofline", 40),
    Part("attention", 60),
    Part("experts", 45),
    Part("sampling", 15),
    Part("lite", 150),
    Part("peer", 90),
    Part("tests of the device", 90, ("tests/gpu",)),
    Part("tests of the fabric", 40, ("tests/gang/test_fabric.py", "-k", "nccl")),
)


def main() -> int:
    """The command; exit code 1 if nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to see whether it runs at all")
    parser.add_argument("--only", action="append", default=[], help="a part's name")
    parser.add_argument("--seconds", type=float, default=530.0, help="for all parts together")
    options = parser.parse_args()
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    return run(parts, options.out, options.device, options.tiny, options.seconds)


def run(parts: Sequence[Part], out: Path, device: str, tiny: bool, seconds: float) -> int:
    """Writes the report anew after every part, so that whatever ends us leaves it behind."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    figures: list[Figure] = []
    outcomes: list[Outcome] = []
    where = machine(device)
    with TemporaryDirectory() as scratch, open(out / "gpu.log", "wb") as log:
        for part in parts:
            written = Path(scratch) / "figures.json"
            written.unlink(missing_ok=True)
            command = _command(part, device, tiny, written)
            outcomes.append(_outcome(part, command, log.fileno(), deadline))
            print(f"{part.name}: {outcomes[-1].fate} ({outcomes[-1].seconds:.0f} s)", flush=True)
            if written.exists():
                found = json.loads(written.read_text(encoding="utf-8"))
                figures += [Figure(**each) for each in found]
            report = as_json(where, figures, outcomes)
            text = json.dumps(report, indent=1) + "\n"
            (out / "gpu.json").write_text(text, encoding="utf-8")
            (out / "gpu.md").write_text(as_markdown(where, figures, outcomes), encoding="utf-8")
    print((out / "gpu.md").read_text(encoding="utf-8"))
    return 0 if figures else 1


def _command(part: Part, device: str, tiny: bool, written: Path) -> list[str]:
    if part.tests:
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *part.tests]
    more = ["--tiny"] if tiny else []
    module = ["loadtest.gpu.stage", part.name, "--device", device, "--out", str(written)]
    return [sys.executable, "-m", *module, *more]


def _outcome(part: Part, command: list[str], log: int, deadline: float) -> Outcome:
    """Runs one part; its failure, or its taking too long, is its own."""
    started = time.monotonic()
    limit_s = min(part.limit_s, deadline - started)
    if part.tests and find_spec("pytest") is None:
        return Outcome(part.name, "pytest is not installed", 0.0)
    if limit_s <= 0:
        return Outcome(part.name, "no time was left", 0.0)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        code = child.wait(limit_s)
        fate = "ok" if code == 0 else f"failed with exit code {code}: see gpu.log"
    except subprocess.TimeoutExpired:
        fate = f"not done after {limit_s:.0f} s"
        os.killpg(child.pid, signal.SIGKILL)  # its own group, compilers and all
        child.wait()
    return Outcome(part.name, fate, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())

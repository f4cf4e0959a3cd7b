"""One part of the benchmark in a process of its own, writing figures as they come.

python -m loadtest.gpu.stage MODULE --device cuda --out FILE [--tiny]
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from loadtest.gpu.figure import Figure

Measure = Callable[[torch.device, bool], Iterator[Figure]]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu.stage")
    parser.add_argument("module", help="of loadtest.gpu, with a function `measure`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to see whether it runs at all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    measure: Measure = importlib.import_module(f"loadtest.gpu.{options.module}").measure
    record(measure(torch.device(options.device), options.tiny), options.out)


def record(figures: Iterator[Figure], out: Path) -> None:
    """Writes all figures so far after each one: whoever ends us keeps what was measured."""
    seen: list[Figure] = []
    for figure in figures:
        seen.append(figure)
        print(f"{figure.name}: {figure.value:.4g} {figure.unit}", flush=True)
        fresh = out.with_suffix(".new")
        fresh.write_text(json.dumps([asdict(each) for each in seen]), encoding="utf-8")
        fresh.replace(out)


if __name__ == "__main__":
    main()

"""The report of a run, as JSON and as Markdown."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loadtest.gpu.figure import GOALS, Figure, Goal

SCHEMA = "expertline.gpu/1"
_PACKAGES = ("torch", "triton", "cupy-cuda13x", "transformers", "safetensors")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one part of a run went; `fate` is "ok", or says what happened."""

    name: str
    fate: str
    seconds: float


def machine(device: str) -> dict[str, Any]:
    """Where it was measured."""
    told: dict[str, Any] = {"device": device, "python": platform.python_version()}
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return told | {"versions": {name: _version(name) for name in _PACKAGES}}


def as_json(
    where: dict[str, Any], figures: Sequence[Figure], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything, raw."""
    return {
        "schema": SCHEMA,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "figures": [asdict(figure) for figure in figures],
        "goals": [asdict(goal) | {"reached": _reached(goal, figures)} for goal in GOALS],
        "parts": [asdict(outcome) for outcome in outcomes],
    }


def as_markdown(
    where: dict[str, Any], figures: Sequence[Figure], outcomes: Sequence[Outcome]
) -> str:
    """For people: what must be reached, what was measured, how each part went."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [f"# {where['device']}", "", f"Python {where['python']}, {versions}.", ""]
    lines += ["| must reach | at least | measured | |", "|---|---|---|---|"]
    lines += [_row(goal, figures) for goal in GOALS]
    lines += ["", "| figure | value | |", "|---|---|---|"]
    lines += [f"| {each.name} | {each.value:.4g} | {each.unit} |" for each in figures]
    lines += ["", "| part | went | seconds |", "|---|---|---|"]
    lines += [f"| {each.name} | {each.fate} | {each.seconds:.0f} |" for each in outcomes]
    return "\n".join(lines) + "\n"


def _row(goal: Goal, figures: Sequence[Figure]) -> str:
    title = goal.figure if goal.over is None else f"{goal.figure} / {goal.over}"
    bound = f"{'≤ ' if goal.at_most else ''}{goal.bound:g}"
    value = _reached(goal, figures)
    if value is None:
        return f"| {title} | {bound} | not measured | |"
    return f"| {title} | {bound} | {value:.4g} | {'yes' if goal.met(value) else 'no'} |"


def _reached(goal: Goal, figures: Sequence[Figure]) -> float | None:
    return goal.reached({figure.name: figure for figure in figures})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

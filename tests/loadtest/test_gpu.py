"""The GPU benchmark, run where there is none: every part of it but CUDA's own calls."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import loadtest.gpu.__main__ as command
from loadtest.gpu import lite, peer
from loadtest.gpu.__main__ import PARTS, Part, run
from loadtest.gpu.figure import COPY, GOALS, MATMUL, ONE_STREAM, PREFILL, Figure, Goal
from loadtest.gpu.lite import TINY, LiteEngine, Step, decode_rate
from loadtest.gpu.report import Outcome, as_json, as_markdown
from model.context import Span, StepContext

CPU = torch.device("cpu")
ROOT = command.ROOT
WHERE: dict[str, Any] = {"device": "a GPU", "python": "3", "versions": {"torch": "2"}}


@pytest.mark.timeout(900)
def test_a_part_that_fails_or_takes_too_long_loses_nobody_elses_figures(tmp_path: Path) -> None:
    parts = [Part("roofline", 400), Part("no_such_module", 400), Part("lite", 0.05)]
    assert run(parts, tmp_path, "cpu", tiny=True, seconds=900) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [figure["name"] for figure in report["figures"]] == [COPY, MATMUL]
    fates = [part["fate"] for part in report["parts"]]
    assert fates == ["ok", "failed with exit code 1: see gpu.log", "not done after 0 s"]
    assert "No module named 'loadtest.gpu.no_such_module'" in (tmp_path / "gpu.log").read_text()
    assert "not measured" in (tmp_path / "gpu.md").read_text()


def test_no_part_begins_after_the_end(tmp_path: Path) -> None:
    assert run([Part("roofline", 60)], tmp_path, "cpu", tiny=True, seconds=0) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["fate"] == "no time was left"


def test_tests_are_left_out_where_there_is_no_pytest(tmp_path: Path) -> None:
    with patch.object(command, "find_spec", return_value=None):
        run([Part("tests", 60, ("tests/gpu",))], tmp_path, "cpu", tiny=True, seconds=60)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts[0]["fate"] == "pytest is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes")
def test_the_script_says_what_is_missing_without_a_gpu(tmp_path: Path) -> None:
    script = Path(command.ROOT) / "tests" / "gpu" / "run.sh"
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stderr


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module where the serving stack's packages are not to be found."""
    command = [sys.executable, "tests/gpu/bare.py", *arguments]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "ALSO_ABSENT": "pydantic rich typer",
    }  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def test_a_machine_without_the_serving_stack_runs_the_benchmark(tmp_path: Path) -> None:
    parts = [word for part in PARTS if not part.tests for word in ("--only", part.name)]
    done = bare("loadtest.gpu", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0", *parts)
    assert "no time was left" in (tmp_path / "gpu.md").read_text(), done.stderr
    done = bare("loadtest.gpu.lite")  # which does nothing but its imports, the most of any part
    assert done.returncode == 0, done.stderr


def test_a_machine_without_the_serving_stack_collects_the_tests() -> None:
    files = [word for part in PARTS for word in part.tests]
    done = bare("pytest", "-p", "no:cacheprovider", "-q", "--collect-only", *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_the_exchange_goes_into_a_graph" not in done.stdout  # -k nccl
    assert "test_fabric.py" in done.stdout


def test_all_parts_together_keep_to_nine_minutes() -> None:
    assert sum(part.limit_s for part in PARTS) <= 530
    root = Path(command.ROOT)
    assert all((root / part.tests[0]).exists() for part in PARTS if part.tests)
    modules = [part.name for part in PARTS if not part.tests]
    assert all((root / "loadtest" / "gpu" / f"{name}.py").exists() for name in modules)


def test_every_figure_that_must_be_reached_is_measured() -> None:
    with torch.inference_mode():
        figures = {figure.name: figure for figure in lite.measure(CPU, tiny=True)}
        figures |= {figure.name: figure for figure in peer.measure(CPU, tiny=True)}
    assert all(figure.value > 0 for figure in figures.values())
    own = {goal.figure for goal in GOALS if "Lite" in goal.figure}
    assert own <= figures.keys()
    assert {goal.over for goal in GOALS if goal.over and goal.figure in own} <= figures.keys() | {
        MATMUL
    }


def test_the_peer_has_our_weights() -> None:
    engine, ids = LiteEngine(TINY, CPU), list(range(30))
    context = StepContext.build([Span(0, len(ids), [1], logits=1)], CPU)
    with torch.inference_mode():
        ours = engine.stage.forward(torch.tensor(ids), context, engine.cache)[0]
        theirs = peer.peer(TINY, CPU)(torch.tensor([ids])).logits[0, -1].float()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_the_rate_is_that_of_steps_in_which_everybody_answers() -> None:
    steps = [
        Step(False, 64, 2, 5.0),  # prompts
        Step(True, 2, 2, 3.0),  # the first after them
        Step(True, 2, 2, 0.5),
        Step(True, 2, 2, 0.5),
        Step(True, 1, 1, 0.1),
    ]
    assert decode_rate(steps, 2) == 4.0


def test_a_report_tells_what_is_reached() -> None:
    figures = [Figure(ONE_STREAM, 300, "tok/s"), Figure(PREFILL, 30, "x"), Figure(MATMUL, 100, "x")]
    text = as_markdown(WHERE, figures, [Outcome("lite", "ok", 3.2)])
    assert f"| {ONE_STREAM} | 250 | 300 | yes |" in text
    assert f"| {PREFILL} / {MATMUL} | 0.4 | 0.3 | no |" in text
    reached = [goal["reached"] for goal in as_json(WHERE, figures, [])["goals"]]
    assert reached.count(None) == len(GOALS) - 2


@pytest.mark.parametrize(("value", "met"), [(0.5, True), (2.0, False)])
def test_of_errors_less_is_better(value: float, met: bool) -> None:
    assert Goal("error", 1.0, at_most=True).met(value) is met

"""The short cut of the chaos suite: what dies under load costs no request and no token."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos.nodes import why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2000)]

WITHIN_S = 1800.0  # many times what it takes: the machine may be a slow one
_ENDS_S = 120.0


def test_killed_ranks_engines_and_routers_cost_no_request_and_no_token(tmp_path: Path) -> None:
    outcomes = _outcomes(tmp_path, "router-kill", "rank-kill", "engine-kill")
    assert [outcome["excused"] for outcome in outcomes] == [{}] * 3


def test_a_lost_node_costs_no_token_and_no_request_but_those_of_its_ingress(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    _outcomes(tmp_path, "node-loss")


def _outcomes(folder: Path, *scenarios: str) -> list[dict[str, Any]]:
    """Of scenarios that were run to their end, with every answer right."""
    only = [word for name in scenarios for word in ("--only", name)]
    command = [sys.executable, "-m", "loadtest.chaos", "--quick", *only, "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    said = _output(command, environment, folder / "chaos.log")
    report = json.loads((folder / "chaos-quick.json").read_text(encoding="utf-8"))
    outcomes = report["scenarios"]
    assert set(outcomes) == set(scenarios), said
    for outcome in outcomes.values():
        assert outcome["broken"] is None, said
        assert outcome["requests"] > 0, said
        assert outcome["errors"] == {}, said
        assert (outcome["tokens"], outcome["wrong"]) == (0, 0), said
    return list(outcomes.values())


def _output(command: list[str], environment: dict[str, str], log: Path) -> str:
    """What the command said; it is ended with its servers if it takes too long."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            process.wait(WITHIN_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(_ENDS_S)
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]

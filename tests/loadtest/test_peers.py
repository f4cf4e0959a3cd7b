"""The comparison's arithmetic and its care for processes, without any peer."""

import json
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loadtest.peers import __main__ as command
from loadtest.peers.candidates import Candidate, Offline, Server, Subject, candidates
from loadtest.peers.checkpoint import silence
from loadtest.peers.environments import Environment
from loadtest.peers.figures import (
    DECODE,
    DECODE_ONE,
    PREFILL,
    TTFT,
    Spread,
    Values,
    http_figures,
    offline_figures,
)
from loadtest.peers.plan import FULL, QUICK
from loadtest.peers.process import PeerFailed, descendants, output_of, started
from loadtest.peers.table import GOALS, Goal, markdown
from loadtest.report import LoadReport, summarize
from loadtest.request import RequestRecord


def test_offline_figures_leave_prefill_out_of_decode() -> None:
    runs = [
        {"batch": 4, "prompt_tokens": 400, "later_tokens": 80, "first_s": 2.0, "all_s": 6.0},
        {"batch": 1, "prompt_tokens": 100, "later_tokens": 20, "first_s": 1.0, "all_s": 3.0},
    ]
    assert offline_figures(runs) == {
        PREFILL.name: 200.0,
        DECODE.name: 20.0,
        DECODE_ONE.name: 10.0,
    }
    with pytest.raises(ValueError, match="too busy"):
        offline_figures([{**runs[0], "all_s": 2.0}])


def test_http_figures_are_of_all_requests_of_all_bursts() -> None:
    def burst(first_s: float) -> LoadReport:
        record = RequestRecord(0, "completion", intended_s=0.0)
        record.sent_s, record.first_s, record.last_s, record.end_s = 0.0, first_s, 4.0, 4.0
        record.output_tokens, record.gaps_s = 11, [0.1, 0.3]
        return summarize({}, [record], 0.0)

    figures = http_figures([burst(1.0), burst(2.0)])
    assert figures["ttft_p50_ms"] == pytest.approx(1500)
    assert figures["output_tokens_per_second"] == pytest.approx(22 / 8)
    assert figures["itl_p50_ms"] == pytest.approx(200)
    assert figures["tpot_p50_ms"] == pytest.approx(250)


def test_a_goal_takes_the_best_layout_of_its_kind() -> None:
    measured: dict[str, Values | str] = {
        "Us 1x1": {DECODE.name: 10.0},
        "Us 1x2": {DECODE.name: 30.0},
        "Us int8 1x2": {DECODE.name: 90.0},
        "Them": {DECODE.name: 20.0},
    }
    goal = Goal(DECODE, "Us", "Them", 1.5)
    assert goal.ratio(measured) == 1.5
    assert Goal(DECODE, "Us int8", "Them", 1.8).ratio(measured) == 4.5
    assert goal.met(1.5)
    assert not goal.met(1.49)
    assert goal.ratio(measured | {"Them": "failed: no such thing"}) is None
    less = Goal(TTFT, "Us", "Them", 0.6)
    assert less.met(0.6)
    assert not less.met(0.61)


def test_the_table_tells_spreads_verdicts_and_reasons() -> None:
    rounds: list[dict[str, Values | str]] = [
        {"vLLM": {DECODE.name: 10.0}, "Expertline 1x1": {DECODE.name: rate}, "Other": "failed: no"}
        for rate in (20.0, 10.0)
    ]
    table = markdown(rounds)
    assert "| Expertline 1x1 |  | 15.0 (10.0 – 20.0) |" in table
    assert "| Other | failed: no |" in table
    assert "| decode tok/s: Expertline / vLLM | ≥ 1.3 | 1.50 (1.00 – 2.00) | yes |" in table
    assert "| TTFT p50 ms: Expertline server / Ray Serve LLM | ≤ 0.6 |  |  |" in table
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)


def test_every_goal_names_candidates_that_there_are() -> None:
    known = candidates(cores=2)
    names = [candidate.name for candidate in known]
    assert len(set(names)) == len(names)
    for goal in GOALS:
        assert goal.theirs in names
        assert any(goal._is_ours(name) for name in names)
    for server in (c for c in known if isinstance(c, Server)):
        words = [w.format(model="m", name="n", port="1") for w in server.command]
        assert {"m", "n", "1"} <= set(words)


def test_plans_ask_everybody_the_same_and_no_prompt_twice() -> None:
    assert FULL.prompts() == FULL.prompts()
    prompts = [tuple(prompt) for burst in range(FULL.bursts) for prompt in FULL.prompts(burst)]
    assert len(set(prompts)) == FULL.bursts * FULL.batch
    assert QUICK.batches == [4, 1]


def test_silence_zeroes_the_rows_of_what_cannot_be_said(tmp_path: Path) -> None:
    head = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
    other = np.ones((2, 2), dtype=np.float32)
    save_file({"lm_head.weight": head, "other": other}, tmp_path / "model.safetensors")
    silence(tmp_path, spoken=[1, 4])
    found = load_file(tmp_path / "model.safetensors")
    assert found["lm_head.weight"][[1, 4]].tolist() == head[[1, 4]].tolist()
    assert not found["lm_head.weight"][[0, 2, 3, 5]].any()
    assert found["other"].all()
    empty = tmp_path / "empty"
    empty.mkdir()
    header = json.dumps({}).encode()
    (empty / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(PeerFailed, match="lm_head"):
        silence(empty, spoken=[])


def test_a_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    # A grandchild in a session of its own, as servers start them.
    script = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True); time.sleep(600)"
    )
    with started([sys.executable, "-c", script], os.environ, tmp_path / "log") as process:
        deadline = time.monotonic() + 60
        while not (family := descendants(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert process.poll() is not None
    for pid in family:
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z"


def test_a_command_that_fails_or_hangs_says_so_in_a_line(tmp_path: Path) -> None:
    python, log = sys.executable, tmp_path / "log"
    assert output_of([python, "-c", "print(5)"], os.environ, log, 120.0) == "5\n"
    with pytest.raises(PeerFailed, match="ValueError: no such luck"):
        output_of([python, "-c", "raise ValueError('no such luck')"], os.environ, log, 120.0)
    with pytest.raises(PeerFailed, match="longer than 1 s"):
        output_of([python, "-c", "import time; time.sleep(600)"], os.environ, log, 1.0)


@dataclass(frozen=True)
class Broken(Candidate):
    """Cannot be measured; or not even be installed."""

    installs: bool = True

    def prepare(self, environment: Environment) -> None:
        if not self.installs:
            raise PeerFailed("installation failed: no index")

    def measure(self, subject: Subject) -> Values:
        raise PeerFailed("it did not come up")


@dataclass(frozen=True)
class Steady(Broken):
    def measure(self, subject: Subject) -> Values:
        return {DECODE.name: 12.0}


def test_one_that_fails_is_a_line_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everybody = [
        Broken("absent", "offline", installs=False),
        Broken("broken", "offline"),
        Steady("steady", "offline"),
    ]
    monkeypatch.setattr(command, "candidates", lambda cores: everybody)
    monkeypatch.setattr(command, "make", lambda *args: tmp_path)
    monkeypatch.setattr(command, "adopt_orphans", lambda: None)
    monkeypatch.setattr(sys, "argv", ["peers", "--quick", "--rounds", "2", "--out", str(tmp_path)])
    assert command.main() == 0
    report = json.loads((tmp_path / "peers-nano.json").read_text())
    expected = {
        "absent": "installation failed: no index",
        "broken": "failed: it did not come up",
        "steady": {DECODE.name: 12.0},
    }
    assert report["rounds"] == [expected, expected]
    assert report["versions"]["own"]["torch"]
    assert "| steady |  | 12.0 (12.0 – 12.0) |" in (tmp_path / "peers-nano.md").read_text()
    assert "| broken | failed: it did not come up |" in capsys.readouterr().out


def test_an_offline_script_that_tells_nothing_has_failed(tmp_path: Path) -> None:
    subject = Subject(QUICK, tmp_path, 1, os.environ)
    with pytest.raises(PeerFailed, match="no figures"):
        Offline("silent", "offline", python=sys.executable, module="this").measure(subject)

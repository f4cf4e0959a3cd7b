"""A gang of real processes that loses ranks: the same tokens, and only what died is replaced."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from model.sampling_params import SamplingParams
from serving.engine.loop import GangFailure, Repair, StepTimes
from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import Request
from serving.gang.members import Cell
from serving.gang.processes import ProcessLauncher
from serving.local_engine import GenerationFailed, LocalEngine, local_engine
from tests.test_local_engine import assert_nothing_is_held, generate, prompts, settings
from tests.waiting import until

PATIENCE_S = 120.0  # a new rank is there in two seconds, on a machine with nothing else to do
TOKENS = 70  # over a page's edge


class Repairs:
    """Notes what happens to the gang."""

    def __init__(self) -> None:
        self.steps = 0
        self.stepped = asyncio.Event()
        self.repairs: list[Repair] = []
        self.sequences = 0

    def step_finished(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None:
        self.steps += 1
        self.stepped.set()

    def gang_repaired(self, repair: Repair, seconds: float, sequences: int) -> None:
        self.repairs.append(repair)
        self.sequences += sequences


class Room:
    """An engine over processes that the test can kill."""

    def __init__(self, engine: LocalEngine, launcher: ProcessLauncher, notes: Repairs) -> None:
        self.engine = engine
        self.launcher = launcher
        self.notes = notes

    @property
    def pids(self) -> dict[Cell, int]:
        return self.launcher.pids

    async def after_steps(self, count: int) -> None:
        wanted = self.notes.steps + count
        async with asyncio.timeout(PATIENCE_S):
            while self.notes.steps < wanted:
                self.notes.stepped.clear()
                await self.notes.stepped.wait()


@asynccontextmanager
async def room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repairs_per_hour: int = 6, **gang: Any
) -> AsyncIterator[Room]:
    launcher, notes = ProcessLauncher(), Repairs()
    monkeypatch.setattr("serving.local_engine.ProcessLauncher", lambda: launcher)
    wanted = settings(tmp_path, 2, 2, **{"gather_timeout_s": PATIENCE_S, **gang})
    engine_settings = wanted.engine.model_copy(update={"repairs_per_hour": repairs_per_hour})
    wanted = wanted.model_copy(update={"engine": engine_settings})
    async with local_engine(wanted, observer=notes) as engine:
        yield Room(engine, launcher, notes)
        if not engine.running.done():
            await assert_nothing_is_held(engine)
    assert not [pid for pid in launcher.pids.values() if os.path.exists(f"/proc/{pid}")]


def requests(name: str) -> list[Request]:
    """Greedy and seeded, penalized, and prompts of up to two pages."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=1, top_p=0.9),
        SamplingParams(temperature=0.0, prompt_logprobs=1),
        SamplingParams(temperature=0.8, seed=2, frequency_penalty=0.3, logprobs=2),
    ]
    return [
        Request(f"{name}{i}", prompt, TOKENS, params[i % 4])
        for i, prompt in enumerate(prompts(12)[::2])
    ]


async def test_what_runs_goes_on_with_the_same_tokens_when_ranks_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room(tmp_path, monkeypatch) as it:
        calm = await it.engine.generate(requests("calm"))
        first = it.pids

        running = asyncio.create_task(it.engine.generate(requests("one dies")))
        await it.after_steps(10)
        os.kill(first[0, 1], signal.SIGSTOP)
        await asyncio.sleep(0.5)  # much less than a step may take: it is waited for
        os.kill(first[0, 1], signal.SIGCONT)
        await it.after_steps(10)
        assert it.notes.repairs == []
        os.kill(first[1, 1], signal.SIGKILL)
        one_died = await asyncio.wait_for(running, PATIENCE_S)
        second = it.pids
        assert [cell for cell in first if second[cell] != first[cell]] == [(1, 1)]
        assert it.notes.repairs == [Repair(1, ["1.1"], [1])]
        assert it.notes.sequences == len(calm)

        running = asyncio.create_task(it.engine.generate(requests("two die")))
        await it.after_steps(20)
        os.kill(second[0, 0], signal.SIGKILL)
        await until(lambda: it.pids.get((0, 0), second[0, 0]) != second[0, 0], PATIENCE_S)
        os.kill(second[1, 0], signal.SIGKILL)  # while the first one's successor starts
        two_died = await asyncio.wait_for(running, PATIENCE_S)
        third = it.pids
        assert [cell for cell in second if third[cell] != second[cell]] == [(0, 0), (1, 0)]
        assert it.notes.repairs[1].cells == ["0.0", "1.0"]
        assert it.notes.repairs[1].empty_columns == [0]

        for disturbed in (one_died, two_died):
            for got, wanted in zip(disturbed, calm, strict=True):
                assert got.token_ids == wanted.token_ids
                assert [s.start for s in got.scores] == [s.start for s in wanted.scores]


async def test_a_rank_that_stands_still_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"step_timeout_s": 5.0, "gather_timeout_s": 4.0}
    async with room(tmp_path, monkeypatch, repairs_per_hour=50, **bounds) as it:
        calm = await generate(it.engine, requests("calm"))
        stopped = it.pids[1, 0]
        running = asyncio.create_task(generate(it.engine, requests("stopped")))
        await it.after_steps(10)
        os.kill(stopped, signal.SIGSTOP)
        assert await asyncio.wait_for(running, PATIENCE_S) == calm
        assert "1.0" in [cell for repair in it.notes.repairs for cell in repair.cells]
        assert not os.path.exists(f"/proc/{stopped}")


async def test_groups_over_tcp_form_anew_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room(tmp_path, monkeypatch, fabric="gloo") as it:
        calm = await generate(it.engine, requests("calm"))
        first = it.pids
        running = asyncio.create_task(generate(it.engine, requests("killed")))
        await it.after_steps(20)
        os.kill(first[0, 0], signal.SIGKILL)  # the one that keeps the store where they meet
        assert await asyncio.wait_for(running, PATIENCE_S) == calm
        assert [cell for cell in first if it.pids[cell] != first[cell]] == [(0, 0)]


async def test_one_repair_too_many_ends_the_gang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room(tmp_path, monkeypatch, repairs_per_hour=0) as it:
        running = asyncio.create_task(it.engine.generate(requests("lost")))
        await it.after_steps(3)
        os.kill(it.pids[0, 1], signal.SIGKILL)
        with pytest.raises(GenerationFailed, match="more than 0 times"):
            await asyncio.wait_for(running, PATIENCE_S)
        with pytest.raises(GangFailure):
            await it.engine.running

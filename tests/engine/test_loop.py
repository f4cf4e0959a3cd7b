"""The step loop over a gang that answers when it is told to."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from random import Random

import pytest

from serving.engine.loop import EngineLoop, GangFailure, Repair, StepTimes
from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import Finish, FinishReason, Request, RequestError, TokenOutput
from serving.engine.scheduler import EngineLimits, Scheduler
from tests.engine.fake_gang import AsyncFakeGang, undisturbed
from tests.engine.simulation import limits, request


class Room:
    """An engine loop, its gang, and all that it emitted, batch by batch."""

    def __init__(self, limits: EngineLimits, by_itself: bool = False) -> None:
        self.scheduler = Scheduler(limits)
        self.gang = AsyncFakeGang(limits, by_itself)
        self.batches: list[list[TokenOutput | Finish]] = []
        self.observed: list[tuple[int, int, float]] = []
        self.repairs: list[str] = []
        self.loop = EngineLoop(
            self.scheduler, self.gang, self._emit, count(0.0, 0.5).__next__, observer=self
        )
        self.running: asyncio.Task[None]

    def _emit(self, outputs: Sequence[TokenOutput | Finish]) -> None:
        self.batches.append(list(outputs))

    def step_finished(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None:
        self.observed.append((plan.step, result.step, times.seconds))

    def gang_repaired(self, repair: Repair, seconds: float, sequences: int) -> None:
        self.repairs.append(f"{','.join(repair.cells)} replaced, {sequences} start over")

    @property
    def last(self) -> dict[str, TokenOutput | Finish]:
        return {output.request_id: output for output in self.batches[-1]}

    def tokens(self, request_id: str) -> list[int]:
        return [
            output.token
            for batch in self.batches
            for output in batch
            if isinstance(output, TokenOutput) and output.request_id == request_id
        ]

    async def settle(self) -> None:
        """Lets the loop do all that it can without the gang."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """The oldest step comes back and is dealt with."""
        self.gang.finish()
        await self.settle()

    async def until_idle(self) -> None:
        while not self.scheduler.idle:
            await asyncio.sleep(0)
            if self.running.done():
                self.running.result()
        await self.settle()


@asynccontextmanager
async def room(limits: EngineLimits, by_itself: bool = False) -> AsyncIterator[Room]:
    it = Room(limits, by_itself)
    it.running = asyncio.create_task(it.loop.run())
    await it.settle()
    yield it
    if it.running.cancel():
        with suppress(asyncio.CancelledError):
            await it.running


async def test_a_step_gives_one_batch() -> None:
    async with room(limits()) as it:
        for name in ("a", "b", "c"):
            it.loop.submit(request(name, [ord(name)], 3))
        await it.settle()
        assert it.batches == []
        for step in range(3):
            await it.finish()
            assert len(it.batches) == step + 1
            assert set(it.last) == {"a", "b", "c"}
        for name in ("a", "b", "c"):
            assert it.tokens(name) == undisturbed(request(name, [ord(name)], 3)).tokens


async def test_a_step_that_gives_nothing_emits_nothing() -> None:
    async with room(limits(step_tokens=4)) as it:
        it.loop.submit(request("x", list(range(10)), 1))
        await it.settle()
        await it.finish()
        await it.finish()
        assert it.batches == []
        await it.finish()
        assert set(it.last) == {"x"}


@pytest.mark.parametrize("stages", [1, 2, 4])
async def test_as_many_steps_are_in_flight_as_there_are_stages(stages: int) -> None:
    async with room(limits(stages=stages, sequences=64)) as it:
        for number in range(stages):
            it.loop.submit(request(str(number), [number], 20))
            await it.settle()
            assert it.gang.in_flight == number + 1
        it.loop.submit(request("one more", [50], 2))
        await it.settle()
        assert it.gang.in_flight == stages
        await it.finish()
        assert it.gang.in_flight == stages


async def test_a_request_starts_while_a_step_is_in_flight() -> None:
    async with room(limits(stages=2)) as it:
        it.loop.submit(request("early", [1], 2))
        await it.settle()
        it.loop.submit(request("late", [2], 2))
        await it.settle()
        assert it.gang.in_flight == 2
        await it.finish()
        assert set(it.last) == {"early"}
        await it.finish()
        assert set(it.last) == {"late"}


@pytest.mark.parametrize("result_turn", range(7))
@pytest.mark.parametrize("request_turn", [0, 3, 6])
async def test_a_result_and_a_request_that_meet_are_both_seen(
    result_turn: int, request_turn: int
) -> None:
    async with room(limits(stages=3)) as it:
        it.loop.submit(request("early", [1], 3))
        await it.settle()
        for turn in range(7):  # of the event loop
            if turn == result_turn:
                it.gang.finish()
            if turn == request_turn:
                it.loop.submit(request("late", [2], 3))
            await asyncio.sleep(0)
        await it.settle()
        assert len(it.tokens("early")) == 1
        while it.gang.in_flight:
            await it.finish()
        for name, first in (("early", 1), ("late", 2)):
            assert it.tokens(name) == undisturbed(request(name, [first], 3)).tokens


async def test_a_refused_request_leaves_the_loop_running() -> None:
    async with room(limits()) as it:
        with pytest.raises(RequestError):
            it.loop.submit(request("x", [], 2))
        it.loop.submit(request("y", [1], 1))
        await it.settle()
        await it.finish()
        assert set(it.last) == {"y"}


async def test_nothing_is_emitted_for_a_cancelled_request() -> None:
    async with room(limits()) as it:
        it.loop.submit(request("gone", [1], 5))
        it.loop.submit(request("stays", [2], 5))
        await it.settle()
        await it.finish()
        it.loop.cancel("gone")
        for _ in range(4):
            await it.finish()
        assert len(it.tokens("gone")) == 1
        assert len(it.tokens("stays")) == 5
        assert all(isinstance(output, TokenOutput) for batch in it.batches for output in batch)


async def test_a_cancellation_makes_room_for_a_waiting_request_at_once() -> None:
    async with room(limits(stages=2, sequences=1)) as it:
        it.loop.submit(request("first", [1], 5))
        it.loop.submit(request("second", [2], 5))
        await it.settle()
        assert it.gang.in_flight == 1
        it.loop.cancel("first")
        await it.settle()
        assert it.gang.in_flight == 2


async def test_the_observer_is_told_of_every_step_and_how_long_it_took() -> None:
    async with room(limits()) as it:
        it.loop.submit(request("x", [1], 2))
        await it.settle()
        await it.finish()
        await it.finish()
        assert it.observed == [(1, 1, 0.5), (2, 2, 0.5)]


async def test_a_lost_gang_fails_every_request_and_ends_the_loop() -> None:
    async with room(limits(stages=2, sequences=2)) as it:
        it.loop.submit(request("over", [1], 1))
        it.loop.submit(request("cancelled", [2], 9))
        await it.settle()
        await it.finish()
        it.loop.cancel("cancelled")
        for name in ("running", "in prefill", "waiting"):
            it.loop.submit(request(name, [3] * 10, 9))
        await it.settle()
        it.gang.fail("rank 1.0 is gone")
        with pytest.raises(GangFailure, match=r"rank 1\.0 is gone"):
            await asyncio.wait_for(it.running, 30)
        assert all(isinstance(output, Finish) for output in it.batches[-1])
        assert set(it.last) == {"running", "in prefill", "waiting"}
        for finish in it.last.values():
            assert isinstance(finish, Finish)
            assert (finish.reason, finish.message) == (FinishReason.MOVED, "rank 1.0 is gone")
        with pytest.raises(GangFailure, match="the gang is lost"):
            it.loop.submit(request("too late", [1], 1))
        it.loop.cancel("running")  # clients may still leave


@pytest.mark.parametrize("stages", [1, 2])
async def test_a_gang_that_is_lost_with_its_pipeline_full_ends_the_loop(stages: int) -> None:
    async with room(limits(stages=stages)) as it:
        for number in range(stages):
            it.loop.submit(request(str(number), [number], 9))
            await it.settle()
        assert it.gang.in_flight == stages
        it.gang.fail("gone")
        with pytest.raises(GangFailure, match="gone"):
            await asyncio.wait_for(it.running, 30)


async def test_a_gang_that_is_lost_while_idle_ends_the_loop() -> None:
    async with room(limits()) as it:
        it.gang.fail("gone")
        with pytest.raises(GangFailure, match="gone"):
            await asyncio.wait_for(it.running, 30)
        with pytest.raises(GangFailure):
            it.loop.submit(request("x", [1], 1))


async def test_results_that_came_before_the_loss_are_emitted_first() -> None:
    async with room(limits(stages=2)) as it:
        it.loop.submit(request("x", [1], 9))
        await it.settle()
        it.gang.finish()
        it.gang.fail("gone")
        with pytest.raises(GangFailure):
            await asyncio.wait_for(it.running, 30)
        first, last = it.batches
        assert isinstance(first[0], TokenOutput)
        assert isinstance(last[0], Finish)


async def test_a_leak_is_seen_when_the_engine_falls_idle() -> None:
    async with room(limits()) as it:
        it.loop.submit(request("x", [1], 1))
        await it.settle()
        it.scheduler._columns[0].pool.take(1)
        it.gang.finish()
        with pytest.raises(GangFailure, match="held by others"):
            await asyncio.wait_for(it.running, 30)
        with pytest.raises(GangFailure):
            it.loop.submit(request("late", [1], 1))


async def test_the_loop_can_be_cancelled_in_any_state() -> None:
    for stages, submitted in ((1, 0), (1, 1), (2, 1)):
        async with room(limits(stages=stages)) as it:
            for number in range(submitted):
                it.loop.submit(request(str(number), [1], 5))
            await it.settle()
            it.running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await it.running
    assert len(asyncio.all_tasks()) == 1  # no helper is left behind


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_many_clients_get_their_tokens(stages: int) -> None:
    random = Random(stages)
    wanted: dict[str, Request] = {}
    async with room(
        limits(stages=stages, columns=2, pages=8, step_tokens=50, sequences=4), by_itself=True
    ) as it:
        for number in range(60):
            prompt = [random.randrange(3) for _ in range(random.randint(1, 300))]
            id = str(number)
            wanted[id] = request(id, prompt, random.randint(1, 100), frozenset({0}))
            it.loop.submit(wanted[id])
            if random.random() < 0.15:
                it.loop.cancel(gone := random.choice(list(wanted)))
                del wanted[gone]
            for _ in range(random.randint(0, 40)):
                await asyncio.sleep(0)
        await asyncio.wait_for(it.until_idle(), 60)
        for id, one in wanted.items():
            assert it.tokens(id) == undisturbed(one).tokens

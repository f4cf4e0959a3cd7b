"""The step loop over a gang that breaks: nothing is lost, nothing comes twice."""

import asyncio
from contextlib import suppress
from random import Random

import pytest

from serving.engine.loop import EngineLoop, GangFailure
from serving.engine.request import Finish, Request, TokenOutput
from serving.engine.scheduler import EngineLimits, Scheduler
from tests.engine.fake_gang import AsyncFakeGang, undisturbed
from tests.engine.simulation import limits, request
from tests.engine.test_loop import Room, room


def check_tokens(it: Room, *requests: Request) -> None:
    for one in requests:
        assert it.tokens(one.id) == undisturbed(one).tokens
    it.scheduler.check_integrity()


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_what_came_back_before_the_break_stays_and_the_rest_is_computed_again(
    stages: int,
) -> None:
    wanted = [request(name, [ord(name)] * 70, 9) for name in "abc"]
    async with room(limits(stages=stages)) as it:
        for one in wanted:
            it.loop.submit(one)
        await it.settle()
        for _ in range(3 * stages):
            await it.finish()
        it.gang.finish()
        it.gang.kill({(0, 0)})
        await it.settle()
        assert it.loop.repairing
        assert all(it.tokens(name) for name in "abc")
        it.gang.mend()
        await it.settle()
        assert not it.loop.repairing
        while not it.scheduler.idle:
            await it.finish()
        check_tokens(it, *wanted)
        assert it.repairs == ["0.0 replaced, 3 start over"]


async def test_nothing_is_planned_while_the_gang_is_repaired() -> None:
    async with room(limits(stages=2)) as it:
        it.loop.submit(request("early", [1], 4))
        await it.settle()
        it.gang.kill({(1, 0)})
        await it.settle()
        planned = len(it.gang.plans)
        it.loop.submit(request("late", [2], 4))
        it.loop.submit(request("leaves", [3], 4))
        await it.settle()
        it.loop.cancel("leaves")
        it.loop.cancel("early")
        await it.settle()
        assert len(it.gang.plans) == planned
        assert it.gang.in_flight == 0
        it.gang.mend()
        await it.settle()
        while not it.scheduler.idle:
            await it.finish()
        check_tokens(it, request("late", [2], 4))
        assert it.tokens("early") == it.tokens("leaves") == []
        assert it.scheduler.idle


async def test_a_gang_that_breaks_while_idle_is_repaired_too() -> None:
    async with room(limits()) as it:
        it.gang.kill({(0, 0)})
        await it.settle()
        assert it.loop.repairing
        it.gang.mend()
        it.loop.submit(request("x", [1], 2))
        await it.settle()
        await it.finish()
        await it.finish()
        check_tokens(it, request("x", [1], 2))


async def test_a_repair_that_fails_fails_every_request_and_ends_the_loop() -> None:
    async with room(limits()) as it:
        it.loop.submit(request("running", [1], 4))
        await it.settle()
        it.gang.kill({(0, 0)})
        await it.settle()
        it.loop.submit(request("waiting", [2], 4))
        it.gang.give_up("too many repairs")
        with pytest.raises(GangFailure, match="too many"):
            await asyncio.wait_for(it.running, 30)
        assert set(it.last) == {"running", "waiting"}
        assert all(isinstance(output, Finish) for output in it.last.values())


async def test_the_loop_can_be_cancelled_while_the_gang_is_repaired() -> None:
    async with room(limits()) as it:
        it.gang.kill({(0, 0)})
        await it.settle()
        it.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await it.running


async def test_computed_pages_of_columns_without_a_dead_rank_are_not_computed_again() -> None:
    async with room(limits(columns=2, step_tokens=256)) as it:
        for name in "ab":
            it.loop.submit(request(name, [ord(name)] * 200, 5))
        await it.settle()
        await it.finish()
        it.gang.kill({(0, 0)})
        await it.settle()
        before = len(it.gang.plans)
        it.gang.mend()
        await it.settle()
        starts = {
            piece.id: piece.start for plan in it.gang.plans[before].columns for piece in plan.slices
        }
        assert sorted(starts.values()) == [0, 192]
        while not it.scheduler.idle:
            await it.finish()
        check_tokens(it, *(request(name, [ord(name)] * 200, 5) for name in "ab"))


async def test_time_without_progress_counts_only_when_there_is_something_to_do() -> None:
    now = 0.0
    scheduler = Scheduler(limits())
    gang = AsyncFakeGang(scheduler.limits)
    loop = EngineLoop(scheduler, gang, lambda outputs: None, lambda: now)
    running = asyncio.create_task(loop.run())

    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    await settle()
    now = 100.0
    assert loop.stalled_s == 0
    loop.submit(request("x", [1], 2))
    await settle()
    now = 107.0
    loop.submit(request("y", [2], 2))  # a request is no progress
    assert loop.stalled_s == 7
    gang.finish()
    await settle()
    assert loop.stalled_s == 0
    gang.kill({(0, 0)})
    await settle()
    now = 110.0
    assert loop.stalled_s == 3
    gang.mend()
    await settle()
    assert loop.stalled_s == 0
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


def random_limits(random: Random) -> EngineLimits:
    return limits(
        stages=random.randint(1, 3),
        columns=random.randint(1, 3),
        pages=random.choice([5, 8, 40]),
        step_tokens=random.choice([16, 50]),
        sequences=random.choice([2, 8]),
        prefix_cache=random.random() < 0.8,
    )


@pytest.mark.parametrize("seed", range(12))
async def test_many_clients_get_their_tokens_whatever_dies_and_when(seed: int) -> None:
    random = Random(seed)
    wanted: dict[str, Request] = {}
    kills = 0
    async with room(random_limits(random), by_itself=True) as it:
        stages, columns = it.scheduler.limits.stages, it.scheduler.limits.columns
        longest = it.scheduler.limits.max_request_tokens // 2
        while len(wanted) < 25 or not it.scheduler.idle:
            if len(wanted) < 25 and random.random() < 0.1:
                id = str(len(wanted))
                prompt = [random.randrange(3) for _ in range(random.randint(1, longest))]
                wanted[id] = request(id, prompt, random.randint(1, longest), frozenset({0}))
                it.loop.submit(wanted[id])
            if random.random() < 0.02 and not it.gang.broken:
                cells = [(stage, column) for stage in range(stages) for column in range(columns)]
                it.gang.kill(set(random.sample(cells, random.randint(0, min(2, len(cells))))))
                kills += 1
            elif it.gang.broken and random.random() < 0.3:
                it.gang.mend()
            await asyncio.sleep(0)
            if it.running.done():
                it.running.result()
        if it.gang.broken:
            it.gang.mend()
        await it.settle()
        assert kills > 3
        check_tokens(it, *wanted.values())
        ends = [o.request_id for batch in it.batches for o in batch if o.ends]
        assert sorted(ends) == sorted(wanted)
        assert all(isinstance(o, TokenOutput) for batch in it.batches for o in batch)
        assert sum(column.held for column in it.scheduler.stats().columns) == 0

"""The engine's side of a gang, with ranks that are tasks of the test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from serving import wire
from serving.engine.loop import GangBroken, GangFailure, Repair
from serving.engine.plan import RankPlan, RankResult, StepPlan
from serving.gang.gang import Gang, GangStartError
from serving.gang.members import Cell
from serving.gang.messages import (
    GANG_CODEC,
    FormGang,
    Gather,
    GroupBroken,
    LoadProgress,
    RankFailed,
    RankHello,
    RankOffer,
    RankReady,
    RankSpec,
)
from serving.gang.repair import GangBounds, RepairBudget
from serving.wire import Channel
from tests.waiting import until

SECRET = b"a secret of the test"
HOST = "127.0.0.1"


def spec(stage: int, rank: int, port: int) -> RankSpec:
    return RankSpec(
        stage,
        rank,
        2,
        1,
        "",
        "float32",
        "cpu",
        "gather",
        8,
        1,
        HOST,
        port,
        HOST,
        60,
        60,
        "",
        "INFO",
    )


@dataclass
class TaskLauncher:
    """Ranks that speak the protocol and compute nothing; `fate` says how one of them fails."""

    fate: str = ""
    launches: list[list[int]] = field(default_factory=list)  # stages, launch by launch
    channels: dict[int, Channel] = field(default_factory=dict)
    formed: list[FormGang] = field(default_factory=list)
    plans: list[tuple[int, RankPlan]] = field(default_factory=list)
    deaf: set[int] = field(default_factory=set)  # stages that do not gather any more
    stopped: bool = False
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        self.launches.append([each.stage for each in specs])
        for each in specs:
            if each.stage in self._tasks:
                self._tasks[each.stage].cancel()
            self._tasks[each.stage] = asyncio.create_task(self._live(each, secret))

    async def watch(self) -> tuple[Cell, str]:
        if self.fate != "never starts":
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        return (0, 0), "rank process 1 ended with code 1"

    async def stop(self) -> None:
        self.stopped = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _live(self, mine: RankSpec, secret: bytes) -> None:
        if self.fate == "never starts":
            return
        if self.fate == "does not come back" and len(self.launches) > 1:
            return
        channel = await wire.connect(HOST, mine.engine_port, secret, GANG_CODEC)
        self.channels[mine.stage] = channel
        self.deaf.discard(mine.stage)
        channel.send(RankHello(mine.stage, mine.rank, 1, f"metrics{mine.stage}"))
        while True:
            await self._obey(mine, channel, await channel.receive())

    async def _obey(self, mine: RankSpec, channel: Channel, order: object) -> None:
        match order:
            case Gather() if mine.stage not in self.deaf:
                offer = {f"stage{mine.stage}": bytes([mine.stage, order.generation])}
                channel.send(RankOffer(order.generation, offer))
            case FormGang():
                self.formed.append(order)
                channel.send(LoadProgress(50, 100))
                if mine.stage == 1 and self.fate == "bad checkpoint":
                    channel.send(RankFailed("shard 3 is truncated", user_error=True))
                elif mine.stage == 1 and self.fate in ("dies", "dies once it is back"):
                    self.fate = "dies" if self.fate == "dies" else ""
                    channel.abort()
                elif mine.stage == 0 or self.fate != "hangs":
                    channel.send(RankReady(order.generation))
            case RankPlan():
                self.plans.append((mine.stage, order))


BOUNDS = GangBounds(
    step_timeout_s=60, gather_timeout_s=60, respawn_timeout_s=60, repair_timeout_s=60,
    repairs_per_hour=3,
)  # fmt: skip


@asynccontextmanager
async def started(
    launcher: TaskLauncher, timeout_s: float = 30, **bounds: float
) -> AsyncIterator[Gang]:
    gang = Gang(launcher, SECRET, 2, 1, replace(BOUNDS, **bounds))
    port = await gang.listen(HOST)
    seen: list[tuple[int, int]] = []
    await gang.start(
        [spec(0, 0, port), spec(1, 0, port)], timeout_s, lambda *done: seen.append(done)
    )
    assert seen[-1] == (100, 200)
    told = len(seen)
    try:
        yield gang
        assert len(seen) == told, "a repair told how far a start is"
    finally:
        await gang.stop()
    assert len(seen) == 2  # repairs are no part of the start's progress


def finish(launcher: TaskLauncher, step: int) -> None:
    for stage, channel in launcher.channels.items():
        channel.send(RankResult(step, stage, 0))


def plan(step: int) -> StepPlan:
    return StepPlan(step, [RankPlan(step, [1])])


async def test_all_ranks_get_everybodys_offers_and_then_the_plans() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        assert [form.offers for form in launcher.formed] == [
            {"stage0": b"\0\0", "stage1": b"\1\0"}
        ] * 2
        assert gang.metrics_addresses == ["metrics0", "metrics1"]
        gang.submit(plan(1))
        await until(lambda: len(launcher.plans) == 2)
        finish(launcher, 1)
        result = await gang.result()
        assert result.step == 1
        assert sorted(rank.stage for rank in result.ranks) == [0, 1]
    assert launcher.stopped


async def test_a_step_is_finished_when_all_ranks_have_answered() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.channels[0].send(RankResult(1, 0, 0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gang.result(), 0.2)
        launcher.channels[1].send(RankResult(1, 1, 0))
        assert (await asyncio.wait_for(gang.result(), 30)).step == 1


async def test_cancelling_a_wait_loses_no_step() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        for step in range(1, 40):
            waiting = asyncio.ensure_future(gang.result())
            finish(launcher, step)
            for _ in range(step % 13):  # cancel at every turn of the event loop
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            got = waiting.result() if not waiting.cancelled() else await gang.result()
            assert got.step == step


async def test_a_rank_that_dies_breaks_the_gang_after_what_it_finished() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        finish(launcher, 1)
        await launcher.channels[1].close()
        assert (await gang.result()).step == 1
        with pytest.raises(GangBroken, match=r"rank 1\.0 is gone"):
            await asyncio.wait_for(gang.result(), 30)
        gang.submit(plan(2))  # harmless: the break has been told


FATES = {
    "bad checkpoint": ("shard 3 is truncated", True),
    "dies": (r"rank 1\.0 is gone", False),
    "hangs": ("not ready after 0.5 s", False),
    "never starts": ("ended with code 1", False),
}


@pytest.mark.parametrize(("fate", "message", "user_error"), [(k, *v) for k, v in FATES.items()])
async def test_a_start_that_fails_says_why_and_stops_all_ranks(
    fate: str, message: str, user_error: bool
) -> None:
    launcher = TaskLauncher(fate)
    with pytest.raises(GangStartError, match=message) as caught:
        async with started(launcher, timeout_s=0.5 if fate == "hangs" else 60):
            raise AssertionError("it must not start")
    assert caught.value.user_error is user_error
    assert launcher.stopped


async def kill(launcher: TaskLauncher, gang: Gang, stage: int) -> None:
    """A rank dies, and the gang is known to be broken."""
    launcher.channels[stage].abort()
    with pytest.raises(GangBroken):
        await asyncio.wait_for(gang.result(), 30)


async def test_a_repair_replaces_the_dead_rank_and_all_meet_in_a_new_generation() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        gang.submit(plan(1))
        launcher.channels[0].send(RankResult(1, 0, 0))  # half of step 1
        await kill(launcher, gang, 1)
        assert await gang.repair() == Repair(1, ["1.0"], [0])
        assert launcher.launches == [[0, 1], [1]]
        offers = {"stage0": b"\0\1", "stage1": b"\1\1"}
        assert launcher.formed[2:] == [FormGang(1, offers)] * 2
        gang.submit(plan(2))
        await until(lambda: [p.step for _, p in launcher.plans[-2:]] == [2, 2])
        finish(launcher, 2)
        assert (await asyncio.wait_for(gang.result(), 30)).step == 2


async def test_what_a_rank_says_of_an_older_generation_counts_no_more() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        gang.submit(plan(1))
        await kill(launcher, gang, 1)
        launcher.channels[0].send(RankResult(1, 0, 0))  # before it hears of the new generation
        launcher.channels[0].send(GroupBroken(0, "a peer is gone"))
        await gang.repair()
        launcher.channels[0].send(GroupBroken(0, "a peer is gone"))
        gang.submit(plan(2))
        finish(launcher, 2)
        result = await asyncio.wait_for(gang.result(), 30)
        assert [part.step for part in result.ranks] == [2, 2]


async def test_a_group_that_breaks_without_a_death_forms_anew_with_the_same_ranks() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.channels[0].send(GroupBroken(0, "the link is down"))
        with pytest.raises(GangBroken, match=r"rank 0\.0: the link is down"):
            await asyncio.wait_for(gang.result(), 30)
        assert await gang.repair() == Repair(1, [], [])
        assert launcher.launches == [[0, 1]]


async def test_a_rank_that_does_not_answer_is_replaced() -> None:
    launcher = TaskLauncher()
    async with started(launcher, gather_timeout_s=0.2) as gang:
        launcher.deaf.add(0)
        await kill(launcher, gang, 1)
        assert (await gang.repair()).cells == ["0.0", "1.0"]
        assert launcher.launches == [[0, 1], [1], [0]]


async def test_a_step_that_does_not_come_back_breaks_the_gang() -> None:
    launcher = TaskLauncher()
    async with started(launcher, step_timeout_s=0.4) as gang:
        with pytest.raises(TimeoutError):  # no step is under way
            await asyncio.wait_for(gang.result(), 1)
        gang.submit(plan(1))
        launcher.channels[0].send(RankResult(1, 0, 0))
        with pytest.raises(GangBroken, match=r"no step came back for 0\.4 s"):
            await asyncio.wait_for(gang.result(), 30)
        await gang.repair()
        gang.submit(plan(2))
        with pytest.raises(GangBroken, match="no step came back"):
            await asyncio.wait_for(gang.result(), 30)


async def test_a_second_death_while_the_groups_form_starts_the_repair_again() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.fate = "dies once it is back"
        await kill(launcher, gang, 1)
        assert await gang.repair() == Repair(2, ["1.0"], [0])
        assert launcher.launches == [[0, 1], [1], [1]]


async def test_a_rank_that_dies_at_every_repair_ends_the_gang() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.fate = "dies"
        await kill(launcher, gang, 1)
        with pytest.raises(GangFailure, match="more than 3 times"):
            await asyncio.wait_for(gang.repair(), 30)
        with pytest.raises(GangFailure, match="more than 3 times"):
            await gang.result()


async def test_a_rank_that_never_comes_back_ends_the_gang() -> None:
    launcher = TaskLauncher()
    async with started(launcher, respawn_timeout_s=0.2) as gang:
        launcher.fate = "does not come back"
        await kill(launcher, gang, 1)
        with pytest.raises(GangFailure, match=r"rank 1\.0 did not come back in 0\.2 s"):
            await asyncio.wait_for(gang.repair(), 30)


async def test_a_repair_has_an_end() -> None:
    launcher = TaskLauncher()
    async with started(launcher, repair_timeout_s=0.2) as gang:
        launcher.fate = "hangs"
        await kill(launcher, gang, 1)
        with pytest.raises(GangFailure, match=r"not whole again after 0\.2 s"):
            await asyncio.wait_for(gang.repair(), 30)


async def test_a_checkpoint_that_went_bad_is_not_tried_again() -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.fate = "bad checkpoint"
        await kill(launcher, gang, 1)
        with pytest.raises(GangFailure, match="shard 3 is truncated"):
            await asyncio.wait_for(gang.repair(), 30)


def test_repairs_are_counted_for_an_hour() -> None:
    now = 0.0
    budget = RepairBudget(2, lambda: now)
    budget.spend()
    now = 1800.0
    budget.spend()
    now = 3599.0
    with pytest.raises(GangFailure, match="more than 2 times in an hour"):
        budget.spend()
    now = 3600.0
    budget.spend()


GARBAGE = {
    "an unknown kind": b"\x03\0\0\0\xff\x01\x02",
    "no message": b"\x05\0\0\0\x06\xc1\xc1\xc1\xc1",
    "a frame too long": b"\xff\xff\xff\xff\x00",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_a_rank_that_sends_garbage_is_replaced_and_the_others_stay(garbage: bytes) -> None:
    launcher = TaskLauncher()
    async with started(launcher) as gang:
        launcher.channels[1].send_frame(garbage)
        with pytest.raises(GangBroken, match=r"rank 1\.0 is gone"):
            await asyncio.wait_for(gang.result(), 30)
        assert (await gang.repair()).cells == ["1.0"]
        assert launcher.launches == [[0, 1], [1]]


async def test_a_stranger_on_the_gangs_port_changes_nothing() -> None:
    launcher = TaskLauncher()
    gang = Gang(launcher, SECRET, 2, 1, BOUNDS)
    port = await gang.listen(HOST)
    _, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await gang.start([spec(0, 0, port), spec(1, 0, port)], 60)
    double = await wire.connect(HOST, port, SECRET, GANG_CODEC)
    double.send(RankHello(0, 0, 1, ""))
    with pytest.raises(wire.WireError):
        await asyncio.wait_for(double.receive(), 30)
    finish(launcher, 1)
    assert (await gang.result()).step == 1
    writer.close()
    await gang.stop()

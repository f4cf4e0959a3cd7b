"""The ingress's side of the fleet, with a real router and engines that do as they are told."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from serving import wire
from serving.api.errors import ApiError
from serving.config import Settings
from serving.engine.request import Finish, FinishReason, TokenOutput
from serving.fleet import (
    ROUTER_CODEC,
    STREAM_CODEC,
    Cancel,
    Condition,
    EngineBeat,
    EngineHello,
    LeaseRequest,
    StreamHello,
    TokenFrame,
)
from serving.ingress.fleet import FleetClient
from serving.ingress.inbox import EngineLost, Inbox
from serving.router.link import RouterLink
from serving.wire import Channel, ChannelServer
from tests.router.local import HOST, SECRET, LocalRouter, RouterHandle, new_router
from tests.waiting import until

SETTINGS = Settings.model_validate({"router": {"silence_s": 3600}})  # engines have no beat here


class Engine:
    """An engine's two ends of the wire: one to the routers, one for the ingresses."""

    def __init__(self, name: str, tokens: int = 1000) -> None:
        self.name = name
        self.cancelled: list[str] = []
        self.streams: dict[str, Channel] = {}
        self._tokens = tokens
        self._server = ChannelServer(SECRET, STREAM_CODEC, self._serve)

    async def join(self, handle: RouterHandle) -> None:
        port = await self._server.start(HOST)
        hello = EngineHello(self.name, HOST, port, "nano", self._tokens, self._tokens, [])
        self.link = RouterLink(handle, SECRET, lambda: hello)

    def say(self, request_id: str, *tokens: int, finish: FinishReason | None = None) -> None:
        """One frame to every ingress: tokens of a request, the last one with the finish."""
        outputs = [TokenOutput(request_id, token) for token in tokens]
        outputs[-1].finish = finish
        for channel in self.streams.values():
            channel.send(TokenFrame(tokens=outputs))

    def turn(self, condition: Condition) -> None:
        """Says what it is about from now on."""
        for channel in self.streams.values():
            channel.send(EngineBeat(condition))

    def cut(self) -> None:
        """The connections break; the engine lives."""
        for channel in self.streams.values():
            channel.abort()

    async def die(self) -> None:
        await self.link.close()
        await self._server.close()

    async def _serve(self, channel: Channel) -> None:
        hello = await channel.receive()
        assert isinstance(hello, StreamHello)
        self.streams[hello.ingress_id] = channel
        channel.send(hello)
        while True:
            message = await channel.receive()
            assert isinstance(message, Cancel)
            self.cancelled.append(message.request_id)


class World:
    """A router that can be lost and replaced, engines, and one ingress."""

    def __init__(self) -> None:
        self.handle = RouterHandle()
        self.engines: dict[str, Engine] = {}

    async def start(self) -> None:
        await self.new_router()
        self.client = FleetClient(self.handle, SECRET, "ingress", f"{HOST}:1", SETTINGS)
        await until(lambda: self.client._link.connected)

    @property
    def router(self) -> LocalRouter:
        assert isinstance(self.handle.router, LocalRouter)
        return self.handle.router

    async def new_router(self) -> None:
        self.handle.router = await new_router(queue_timeout_s=60)

    async def lose_router(self) -> None:
        lost, self.handle.router = self.router, None
        await lost.close()
        await until(lambda: not self.client._link.connected)

    async def add(self, name: str, tokens: int = 1000) -> Engine:
        engine = self.engines[name] = Engine(name, tokens)
        await engine.join(self.handle)
        await until(lambda: name in self.client._streams)
        await until(lambda: self.client._streams[name].connected)
        return engine

    async def stop(self) -> None:
        await self.client.close()
        for engine in self.engines.values():
            await engine.die()
        if self.handle.router is not None:
            await self.router.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.start()
    yield made
    await made.stop()


def ask(name: str, tokens: int = 100, deadline_s: float = 60.0) -> LeaseRequest:
    return LeaseRequest(name, "tenant", 0, tokens, 1, [], deadline_s)


async def reads(inbox: Inbox) -> list[int]:
    while not (tokens := inbox.take()) and inbox.ended is None:
        await asyncio.wait_for(inbox.news(), 30)
    return [output.token for output in tokens]


async def test_an_inbox_gives_tokens_before_a_failure_that_came_with_them() -> None:
    inbox = Inbox()
    inbox.push(TokenOutput("r", 1))
    inbox.push(TokenOutput("r", 2))
    inbox.fail(ApiError(500, "first"))
    inbox.fail(ApiError(500, "second"))
    assert await reads(inbox) == [1, 2]
    with pytest.raises(ApiError, match="first"):
        await reads(inbox)


async def test_an_inbox_gives_tokens_before_the_end_and_then_nothing() -> None:
    inbox = Inbox()
    inbox.push(TokenOutput("r", 1))
    inbox.end(Finish("r", FinishReason.CANCELLED))
    assert await reads(inbox) == [1]
    assert await reads(inbox) == []


async def test_an_inbox_wakes_its_reader_for_each_arrival() -> None:
    inbox = Inbox()
    for token in (1, 2):
        reading = asyncio.create_task(reads(inbox))
        await asyncio.sleep(0)
        assert not reading.done()
        inbox.push(TokenOutput("r", token))
        assert await reading == [token]


async def test_a_lease_brings_a_stream_of_tokens_and_ends_with_the_last(world: World) -> None:
    engine = await world.add("e")
    inbox = world.client.open("r")
    assert await world.client.acquire(ask("r")) == "e"
    assert world.router.status()["leases"] == 1
    engine.say("r", 1, 2)
    engine.say("another", 9)
    assert await reads(inbox) == [1, 2]
    engine.say("r", 3, finish=FinishReason.STOP)
    assert await reads(inbox) == [3]
    await until(lambda: world.router.status()["leases"] == 0)  # before anybody closes it
    world.client.close_request("r", "e", finished=True)
    await asyncio.sleep(0.05)
    assert engine.cancelled == []


async def test_a_request_that_is_left_early_is_cancelled_and_released(world: World) -> None:
    engine = await world.add("e")
    world.client.open("r")
    await world.client.acquire(ask("r"))
    world.client.close_request("r", "e", finished=False)
    await until(lambda: engine.cancelled == ["r"])
    await until(lambda: world.router.status()["leases"] == 0)
    assert world.client._streams["e"].requests == set()


async def test_a_client_that_leaves_the_queue_gives_up_its_place(world: World) -> None:
    await world.add("e", tokens=150)
    await world.client.acquire(ask("holder"))
    waiting = asyncio.create_task(world.client.acquire(ask("leaver")))
    await until(lambda: world.router.status()["queued"] == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    world.client.close_request("leaver", None, finished=True)
    await until(lambda: world.router.status()["queued"] == 0)
    assert not world.client._pending


async def test_refusals_carry_status_and_when_to_come_again(world: World) -> None:
    await world.add("e")
    with pytest.raises(ApiError) as too_long:
        await world.client.acquire(ask("r", tokens=2000))
    assert (too_long.value.status, too_long.value.retry_after_s) == (400, None)
    await world.client.acquire(ask("holder", tokens=900))
    with pytest.raises(ApiError) as late:
        await world.client.acquire(ask("late", tokens=900, deadline_s=0.05))
    assert (late.value.status, late.value.retry_after_s) == (503, 1.0)


async def test_without_router_requests_spread_over_the_engines(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.add(name)
    await world.lose_router()
    chosen = await asyncio.gather(*(world.client.acquire(ask(f"r{i}")) for i in range(9)))
    assert sorted(chosen) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


async def test_without_router_engines_that_do_not_serve_are_passed_over(world: World) -> None:
    a, b = await world.add("a"), await world.add("b")
    await world.lose_router()
    a.turn(Condition.DRAINING)
    await until(lambda: world.client.serving == 1)
    assert [await world.client.acquire(ask(f"r{i}")) for i in range(3)] == ["b"] * 3
    b.turn(Condition.REPAIRING)
    await until(lambda: world.client.serving == 0)
    waiting = asyncio.create_task(world.client.acquire(ask("waits", deadline_s=60)))
    await until(lambda: "waits" in world.client._pending)
    world.client.tick()
    assert not waiting.done()  # it will serve again
    b.turn(Condition.STOPPING)
    assert await waiting == "a"  # the last resort


async def test_without_router_an_engine_to_be_avoided_is_taken_only_if_it_is_alone(
    world: World,
) -> None:
    await world.add("a")
    await world.lose_router()
    assert await world.client.acquire(replace(ask("1"), avoid="a")) == "a"
    await world.new_router()
    await world.add("b")
    await world.lose_router()
    chosen = [await world.client.acquire(replace(ask(f"r{i}"), avoid="b")) for i in range(3)]
    assert chosen == ["a"] * 3


async def test_the_queue_is_bounded_without_a_router_too(world: World) -> None:
    world.client._settings = Settings.model_validate({"router": {"queue_limit": 1}})
    await world.lose_router()
    waiting = [asyncio.create_task(world.client.acquire(ask(f"r{i}", deadline_s=60)))
               for i in range(2)]  # fmt: skip
    await until(lambda: len(world.client._pending) == 2)
    with pytest.raises(ApiError) as full:
        await world.client.acquire(ask("late"))
    assert full.value.status == 429
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_who_waits_when_the_router_is_lost_is_spread_over_the_engines(world: World) -> None:
    for name in ("a", "b"):
        await world.add(name, tokens=150)
        await world.client.acquire(ask(f"holder-{name}"))
    waiting = [asyncio.create_task(world.client.acquire(ask(f"r{i}"))) for i in range(4)]
    await until(lambda: world.router.status()["queued"] == 4)
    await world.lose_router()
    assert sorted(await asyncio.gather(*waiting)) == ["a", "a", "b", "b"]
    world.client.close_request("r0", waiting[0].result(), finished=False)
    loads = [len(stream.requests) for stream in world.client._streams.values()]
    assert sorted(loads) == [2, 3]


async def test_without_router_and_engines_a_request_waits_for_its_time(world: World) -> None:
    await world.lose_router()
    with pytest.raises(ApiError) as caught:
        await asyncio.wait_for(world.client.acquire(ask("r", deadline_s=0.05)), 10)
    assert caught.value.status == 503
    world.client.close_request("r", None, finished=True)
    assert not world.client._held


async def test_who_waits_without_router_and_engines_is_placed_when_either_comes(
    world: World,
) -> None:
    await world.lose_router()
    waiting = asyncio.create_task(world.client.acquire(ask("r", deadline_s=30)))
    await asyncio.sleep(0)
    await world.new_router()
    await world.add("e")
    assert await waiting == "e"
    assert world.router.status()["leases"] == 1


async def test_a_new_router_that_knows_no_engine_yet_cuts_no_stream(world: World) -> None:
    engine = await world.add("e")
    inbox = world.client.open("r")
    await world.client.acquire(ask("r"))
    await engine.link.close()  # so that the ingress is back before the engine
    await world.lose_router()
    await world.new_router()
    await until(lambda: world.router.status()["ingresses"] == 1)
    await until(lambda: not world.client._streams["e"].listed)
    assert world.client.ready
    assert world.client.max_request_tokens == 1000
    engine.say("r", 1, finish=FinishReason.STOP)
    assert await reads(inbox) == [1]
    assert await asyncio.wait_for(world.client.acquire(ask("blind")), 30) == "e"
    engine.link = RouterLink(world.handle, SECRET, lambda: world.client._streams["e"].engine)
    await until(lambda: world.client._streams["e"].listed)
    assert world.router.status()["leases"] == 1  # what was granted without it
    assert await world.client.acquire(ask("next")) == "e"
    assert engine.cancelled == []


async def test_an_engine_that_left_the_fleet_finishes_what_it_has(world: World) -> None:
    engine = await world.add("e")
    inbox = world.client.open("r")
    await world.client.acquire(ask("r"))
    await engine.link.close()
    await until(lambda: not world.client._streams["e"].listed)
    engine.say("r", 1, finish=FinishReason.LENGTH)
    assert await reads(inbox) == [1]
    engine.cut()
    await until(lambda: not world.client._streams)
    assert not world.client.ready


async def test_an_engine_that_dies_fails_its_requests_after_their_last_token(
    world: World,
) -> None:
    lost, kept = await world.add("lost"), await world.add("kept")
    inboxes = {name: world.client.open(name) for name in ("1", "2")}
    homes = {name: await world.client.acquire(ask(name)) for name in inboxes}
    assert sorted(homes.values()) == ["kept", "lost"]
    victim, survivor = sorted(homes, key=lambda name: homes[name] != "lost")
    lost.say(victim, 1, 2)
    await lost.die()
    assert await reads(inboxes[victim]) == [1, 2]
    with pytest.raises(EngineLost, match="lost"):
        await reads(inboxes[victim])
    kept.say(survivor, 3)
    assert await reads(inboxes[survivor]) == [3]
    await until(lambda: set(world.client._streams) == {"kept"})


async def test_a_stream_that_breaks_comes_back_and_its_requests_are_told(world: World) -> None:
    engine = await world.add("e")
    inbox = world.client.open("before")
    await world.client.acquire(ask("before"))
    engine.cut()
    with pytest.raises(EngineLost, match="lost"):
        await reads(inbox)
    world.client.close_request("before", "e", finished=False)
    after = world.client.open("after")
    assert await world.client.acquire(ask("after")) == "e"
    engine.say("after", 7)
    assert await reads(after) == [7]


async def test_a_lease_on_an_engine_that_leaves_before_its_stream_opens_goes_to_another(
    world: World,
) -> None:
    hello = EngineHello("ghost", HOST, 1, "nano", 1000, 1000, [])  # nobody listens there
    channel = await wire.connect(*world.router.address(), SECRET, ROUTER_CODEC)
    channel.send(hello)
    asking = asyncio.create_task(world.client.acquire(ask("r", deadline_s=60)))
    await until(lambda: world.router.status()["leases"] == 1)
    await asyncio.sleep(0.05)
    channel.abort()
    await world.add("e")
    assert await asyncio.wait_for(asking, 30) == "e"
    assert world.router.status()["leases"] == 1

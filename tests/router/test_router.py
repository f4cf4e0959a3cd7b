"""The router over real connections."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from serving import wire
from serving.engine.request import EngineStats
from serving.fleet import (
    BEAT_S,
    ROUTER_CODEC,
    Condition,
    EngineHello,
    EngineLoading,
    EngineReport,
    Fleet,
    IngressHello,
    LeaseGrant,
    LeaseHeld,
    LeaseRefusal,
    LeaseRelease,
    LeaseRequest,
    RouterBeat,
)
from serving.router.link import RouterLink
from serving.router.router import Router
from serving.wire import Channel
from tests.router.local import HOST, SECRET, RouterHandle, local_router, new_router
from tests.waiting import until

OPEN: list[Channel] = []


@pytest.fixture(autouse=True)
async def connections() -> AsyncIterator[None]:
    yield
    for channel in OPEN:
        channel.abort()
    OPEN.clear()


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with local_router(queue_limit=2) as made:
        yield made


async def dial(router: Router, hello: Any) -> Channel:
    channel = await wire.connect(*router.address(), SECRET, ROUTER_CODEC)
    channel.send(hello)
    OPEN.append(channel)  # a channel that nobody holds would close
    return channel


def engine(name: str = "e", tokens: int = 1000) -> EngineHello:
    return EngineHello(name, HOST, 9, "nano", tokens, tokens, ["127.0.0.1:1"])


def report(condition: Condition = Condition.SERVING) -> EngineReport:
    return EngineReport(EngineStats(0, 0, 16, [], 0, 0, 0), condition)


def ask(name: str, prompt: int = 400) -> LeaseRequest:
    return LeaseRequest(name, "tenant", 0, prompt, 100, [], 60.0)


async def answer(channel: Channel) -> Any:
    """The next message that is about a lease."""
    while True:
        message = await asyncio.wait_for(channel.receive(), 30)
        if not isinstance(message, Fleet | RouterBeat):
            return message


async def fleet(channel: Channel, engines: set[str]) -> Fleet:
    """The fleet, once it has these engines."""
    while True:
        message = await asyncio.wait_for(channel.receive(), 30)
        if isinstance(message, Fleet) and {e.engine_id for e in message.engines} == engines:
            return message


async def test_engines_join_and_leave_with_their_connections(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", "127.0.0.1:2"))
    one = await dial(router, engine("one"))
    await dial(router, engine("two"))
    both = await fleet(ingress, {"one", "two"})
    assert {"127.0.0.1:1", "127.0.0.1:2"} <= set(both.metrics_addresses)
    one.abort()
    await fleet(ingress, {"two"})


async def test_a_lease_is_queued_until_there_is_room(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    await dial(router, engine(tokens=900))
    await fleet(ingress, {"e"})
    ingress.send(ask("1"))
    assert await answer(ingress) == LeaseGrant("1", "e", 500)
    ingress.send(ask("2"))
    await until(lambda: router.status()["queued"] == 1)
    ingress.send(LeaseRelease("1"))
    assert await answer(ingress) == LeaseGrant("2", "e", 500)


async def test_a_full_queue_is_a_429(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    for name in ("1", "2", "3"):
        ingress.send(ask(name))
    refusal = await answer(ingress)
    assert isinstance(refusal, LeaseRefusal)
    assert (refusal.request_id, refusal.status) == ("3", 429)
    assert router.status()["queued"] == 2


async def test_a_late_turn_is_a_503() -> None:
    async with local_router(queue_timeout_s=0.1) as router:
        ingress = await dial(router, IngressHello("i", ""))
        for name in ("1", "2"):
            ingress.send(ask(name))
        late = [await answer(ingress), await answer(ingress)]
        assert {(each.request_id, each.status) for each in late} == {("1", 503), ("2", 503)}
        assert router.status()["queued"] == 0


async def test_without_a_queue_only_what_must_wait_is_refused() -> None:
    async with local_router(queue_limit=0) as router:
        ingress = await dial(router, IngressHello("i", ""))
        await dial(router, engine(tokens=900))
        await fleet(ingress, {"e"})
        ingress.send(ask("1"))
        assert await answer(ingress) == LeaseGrant("1", "e", 500)
        ingress.send(ask("2"))
        assert (await answer(ingress)).status == 429


async def test_a_client_that_waits_no_longer_is_refused_before_the_others(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    ingress.send(ask("patient"))
    ingress.send(replace(ask("hasty"), deadline_s=0.01))
    refusal = await answer(ingress)
    assert (refusal.request_id, refusal.status) == ("hasty", 503)
    assert router.status()["queued"] == 1


async def test_a_request_that_comes_twice_is_granted_and_held_once(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    ingress.send(ask("1"))
    ingress.send(ask("1"))
    await until(lambda: router.status()["queued"] == 1)
    await dial(router, engine(tokens=2000))
    assert isinstance(await answer(ingress), LeaseGrant)
    ingress.send(ask("1"))
    assert isinstance(await answer(ingress), LeaseGrant)
    ingress.send(LeaseRelease("1"))
    await until(lambda: router.status()["leases"] == 0)
    assert router._book.engines["e"].reserved_tokens == 0


async def test_whoever_leaves_the_queue_is_not_granted(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    for message in (ask("1"), ask("2"), LeaseRelease("1")):
        ingress.send(message)
    await dial(router, engine(tokens=900))
    assert await answer(ingress) == LeaseGrant("2", "e", 500)


async def test_what_never_fits_is_a_400(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    await dial(router, engine(tokens=300))
    await fleet(ingress, {"e"})
    ingress.send(ask("1"))
    refusal = await answer(ingress)
    assert (refusal.status, refusal.request_id) == (400, "1")


async def test_an_ingress_that_vanishes_frees_what_it_held(router: Router) -> None:
    await dial(router, engine(tokens=900))
    gone = await dial(router, IngressHello("gone", ""))
    gone.send(ask("1"))
    assert isinstance(await answer(gone), LeaseGrant)
    stays = await dial(router, IngressHello("stays", ""))
    stays.send(ask("2"))
    await until(lambda: router.status()["queued"] == 1)
    gone.abort()
    assert await answer(stays) == LeaseGrant("2", "e", 500)


async def test_an_engine_that_comes_back_before_its_old_connection_ends_stays(
    router: Router,
) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    old = await dial(router, engine())
    await fleet(ingress, {"e"})
    await dial(router, engine(tokens=2000))
    await until(lambda: router.status()["cache_tokens"] == 2000)
    old.abort()
    ingress.send(ask("1"))
    assert isinstance(await answer(ingress), LeaseGrant)
    await asyncio.wait_for(old_connection_is_gone(router), 30)
    assert router.status()["engines"] == ["e"]


async def test_an_ingress_that_comes_back_before_its_old_connection_ends_keeps_its_leases(
    router: Router,
) -> None:
    await dial(router, engine(tokens=900))
    old = await dial(router, IngressHello("i", ""))
    old.send(ask("1"))
    assert isinstance(await answer(old), LeaseGrant)
    new = await dial(router, IngressHello("i", ""))
    await fleet(new, {"e"})
    old.abort()
    await old_connection_is_gone(router)
    assert (router.status()["ingresses"], router.status()["leases"]) == (1, 1)
    new.send(ask("2"))
    await until(lambda: router.status()["queued"] == 1)
    new.send(LeaseRelease("1"))
    assert await answer(new) == LeaseGrant("2", "e", 500)


async def old_connection_is_gone(router: Router) -> None:
    await until(lambda: len(router._server._tasks) == 2)


async def test_loading_is_shown_until_the_engine_is_there(router: Router) -> None:
    channel = await dial(router, EngineLoading("e", 10, 100))
    await until(lambda: router.status()["loading"] == {"e": [10, 100]})
    channel.send(EngineLoading("e", 90, 100))
    await until(lambda: router.status()["loading"] == {"e": [90, 100]})
    channel.send(engine())
    await until(lambda: router.status()["engines"] == ["e"])
    assert router.status()["loading"] == {}


async def test_an_engine_that_dies_while_it_loads_is_forgotten(router: Router) -> None:
    for reports in (1, 2):
        channel = await dial(router, EngineLoading("e", 0, 100))
        if reports == 2:
            channel.send(EngineLoading("e", 50, 100))
        await until(lambda: router.status()["loading"] != {})
        channel.abort()
        await until(lambda: router.status()["loading"] == {})
    assert router.status()["engines"] == []


async def test_garbage_and_strangers_on_the_port_hurt_nobody(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    host, port = router.address()
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(300), b"", b"XPL1"):
        _, writer = await asyncio.open_connection(host, port)
        writer.write(garbage)
        writer.close()
    with pytest.raises(wire.WireError):
        await wire.connect(host, port, b"another secret", ROUTER_CODEC)
    member = await dial(router, IngressHello("bad", ""))
    member.send_frame(b"\xff\xff\xff\xff\x00")
    await until(lambda: router.status()["ingresses"] == 1)
    await dial(router, engine())
    await fleet(ingress, {"e"})
    assert router._server.rejected >= 4


async def test_a_connection_that_never_says_who_it_is_hurts_nobody(router: Router) -> None:
    stranger = await dial(router, LeaseRelease("x"))
    with pytest.raises(wire.WireError):
        await asyncio.wait_for(stranger.receive(), 30)
    ingress = await dial(router, IngressHello("i", ""))
    await dial(router, engine())
    await fleet(ingress, {"e"})


async def test_a_link_finds_the_next_router_when_one_is_lost() -> None:
    handle, lost = RouterHandle(), []
    link = RouterLink(handle, SECRET, engine, lost=lambda: lost.append(1))
    with pytest.raises(wire.WireError):
        link.send(ask("too early"))
    for rounds in (1, 2):
        router = handle.router = await new_router()
        await until(lambda: link.connected)
        await until(lambda router=router: router.status()["engines"] == ["e"])  # type: ignore[misc]
        await router.close()
        await until(lambda: not link.connected)
        assert len(lost) == rounds
    await link.close()


async def test_requests_wait_for_an_engine_under_repair(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    repaired = await dial(router, engine())
    repaired.send(report(Condition.REPAIRING))
    await fleet(ingress, {"e"})
    await until(lambda: not router._book.engines["e"].serving)
    ingress.send(ask("1"))
    await until(lambda: router.status()["queued"] == 1)
    repaired.send(report())
    assert await answer(ingress) == LeaseGrant("1", "e", 500)


async def test_an_engine_that_says_nothing_gets_nothing_until_it_speaks() -> None:
    async with local_router(silence_s=1.0, queue_timeout_s=60) as router:
        ingress = await dial(router, IngressHello("i", ""))
        silent = await dial(router, engine())
        await fleet(ingress, {"e"})
        await until(lambda: router._book.engines["e"].silent, 30)
        ingress.send(ask("1"))
        await until(lambda: router.status()["queued"] == 1)
        silent.send(report())
        assert await answer(ingress) == LeaseGrant("1", "e", 500)


async def test_a_router_says_that_it_is_there(router: Router) -> None:
    hellos = (IngressHello("i", ""), engine(), EngineLoading("l", 0, 0))
    for channel in [await dial(router, hello) for hello in hellos]:
        message = None
        while not isinstance(message, RouterBeat):
            message = await asyncio.wait_for(channel.receive(), 30)


async def test_a_request_that_another_engine_began_is_not_turned_away_and_goes_first() -> None:
    async with local_router(queue_limit=1, queue_timeout_s=60) as router:
        ingress = await dial(router, IngressHello("i", ""))
        ingress.send(ask("new"))
        ingress.send(replace(ask("continued"), continued=True, priority=5))
        await until(lambda: router.status()["queued"] == 2)
        ingress.send(ask("newer"))
        refusal = await answer(ingress)
        assert (refusal.request_id, refusal.status) == ("newer", 429)
        await dial(router, engine(tokens=600))
        assert await answer(ingress) == LeaseGrant("continued", "e", 500)
        ingress.send(LeaseRelease("continued"))
        assert await answer(ingress) == LeaseGrant("new", "e", 500)


async def test_a_new_router_learns_what_runs_where(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    ingress.send(LeaseHeld(ask("running"), "e"))
    ingress.send(ask("queued"))
    ingress.send(LeaseHeld(ask("queued"), "e"))  # placed without waiting for the answer
    await until(lambda: router.status()["leases"] == 2)
    assert router.status()["queued"] == 0
    await dial(router, engine(tokens=1000))
    await until(lambda: bool(router._book.engines))
    assert router._book.engines["e"].reserved_tokens == 1000
    ingress.abort()
    await until(lambda: router._book.engines["e"].reserved_tokens == 0)


async def test_a_link_gives_up_a_router_that_says_nothing() -> None:
    heard: list[str] = []

    async def mute(channel: Channel) -> None:
        await channel.receive()
        heard.append("hello")
        await asyncio.Event().wait()

    server = wire.ChannelServer(SECRET, ROUTER_CODEC, mute)
    port = await server.start(HOST)

    class Handle:
        address = property(lambda self: self)

        async def remote(self) -> tuple[str, int]:
            return HOST, port

    lost: list[int] = []
    link = RouterLink(Handle(), SECRET, engine, lost=lambda: lost.append(1), silence_s=2 * BEAT_S)
    await until(lambda: link.connected)
    await until(lambda: bool(lost), 30)
    await until(lambda: len(heard) == 2, 30)  # and it tries again
    await link.close()
    await server.close()

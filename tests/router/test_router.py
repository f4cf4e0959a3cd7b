"""The router over real connections."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serving import wire
from serving.config import Settings
from serving.fleet import (
    ROUTER_CODEC,
    EngineHello,
    EngineLoading,
    Fleet,
    IngressHello,
    LeaseGrant,
    LeaseRefusal,
    LeaseRelease,
    LeaseRequest,
)
from serving.router.link import RouterLink
from serving.router.router import Router
from serving.wire import Channel
from tests.waiting import until

SECRET = b"a secret of the test"
HOST = "127.0.0.1"
OPEN: list[Channel] = []

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .Router.__del__.")  # Serve awaits it


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    made = await new_router(tmp_path)
    yield made
    for channel in OPEN:
        channel.abort()
    OPEN.clear()
    await made.__del__()


async def new_router(tmp_path: Path) -> Router:
    settings = Settings.model_validate(
        {
            "internal_host": HOST,
            "router": {"queue_limit": 2, "queue_timeout_s": 0.4},
            "telemetry": {"targets_directory": tmp_path / "targets"},
        }
    )
    made = Router.__new__(Router)
    await made.__init__(settings, SECRET)  # type: ignore[misc]  # as Serve does
    return made


async def dial(router: Router, hello: Any) -> Channel:
    channel = await wire.connect(*router.address(), SECRET, ROUTER_CODEC)
    channel.send(hello)
    OPEN.append(channel)  # a channel that nobody holds would close
    return channel


def engine(name: str = "e", tokens: int = 1000) -> EngineHello:
    return EngineHello(name, HOST, 9, "nano", tokens, tokens, ["127.0.0.1:1"])


def ask(name: str, prompt: int = 400) -> LeaseRequest:
    return LeaseRequest(name, "tenant", 0, prompt, 100, [], 10.0)


async def answer(channel: Channel) -> Any:
    """The next message that is not about the fleet."""
    while True:
        message = await asyncio.wait_for(channel.receive(), 5)
        if not isinstance(message, Fleet):
            return message


async def fleet(channel: Channel, engines: set[str]) -> Fleet:
    """The fleet, once it has these engines."""
    while True:
        message = await asyncio.wait_for(channel.receive(), 5)
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


async def test_a_full_queue_is_a_429_and_a_late_turn_a_503(router: Router) -> None:
    ingress = await dial(router, IngressHello("i", ""))
    for name in ("1", "2", "3"):
        ingress.send(ask(name))
    first = await answer(ingress)
    assert isinstance(first, LeaseRefusal)
    assert (first.request_id, first.status) == ("3", 429)
    late = [await answer(ingress), await answer(ingress)]
    assert {(refusal.request_id, refusal.status) for refusal in late} == {("1", 503), ("2", 503)}
    assert router.status()["queued"] == 0


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
    await asyncio.wait_for(old_connection_is_gone(router), 5)
    assert router.status()["engines"] == ["e"]


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


async def test_a_connection_that_never_says_who_it_is_hurts_nobody(router: Router) -> None:
    stranger = await dial(router, LeaseRelease("x"))
    with pytest.raises(wire.WireError):
        await asyncio.wait_for(stranger.receive(), 5)
    ingress = await dial(router, IngressHello("i", ""))
    await dial(router, engine())
    await fleet(ingress, {"e"})


class Handle:
    """A Serve handle to whatever router there is now."""

    def __init__(self) -> None:
        self.router: Router | None = None
        self.address = self

    async def remote(self) -> tuple[str, int]:
        if self.router is None:
            raise RuntimeError("no replica")
        return self.router.address()


async def test_a_link_finds_the_next_router_when_one_is_lost(tmp_path: Path) -> None:
    handle, lost = Handle(), []
    link = RouterLink(handle, SECRET, engine, lost=lambda: lost.append(1))
    with pytest.raises(wire.WireError):
        link.send(ask("too early"))
    for rounds in (1, 2):
        handle.router = await new_router(tmp_path)
        await until(lambda: link.connected)
        status = handle.router.status
        await until(lambda status=status: status()["engines"] == ["e"])  # type: ignore[misc]
        await handle.router.__del__()
        await until(lambda: not link.connected)
        assert len(lost) == rounds
    await link.close()

"""The engine's end of the token streams, over real connections."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serving import wire
from serving.engine.request import Finish, FinishReason, PromptScores, TokenOutput
from serving.fleet import STREAM_CODEC, Cancel, Condition, EngineBeat, StreamHello, TokenFrame
from serving.token_streams import TokenStreams
from serving.wire import Channel
from tests.waiting import until

SECRET = b"a secret of the test"
HOST = "127.0.0.1"


class Engine:
    """Streams, and what they wanted cancelled."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.streams = TokenStreams(SECRET, self.cancelled.append)

    async def start(self) -> None:
        self.port = await self.streams.start(HOST)

    async def ingress(self, name: str) -> Channel:
        """A connection that may send requests."""
        channel = await wire.connect(HOST, self.port, SECRET, STREAM_CODEC)
        channel.send(StreamHello(name))
        assert await receive(channel) == StreamHello(name)
        return channel


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    await made.start()
    yield made
    await made.streams.close()


async def receive(channel: Channel) -> Any:
    return await asyncio.wait_for(channel.receive(), 30)


async def frame(channel: Channel) -> TokenFrame:
    """The next one; beats are passed over."""
    while not isinstance(message := await receive(channel), TokenFrame):
        assert isinstance(message, EngineBeat)
    return message


async def test_each_ingress_gets_its_own_in_one_frame(engine: Engine) -> None:
    one, two = await engine.ingress("one"), await engine.ingress("two")
    ends = [engine.streams.open(name, ingress) for name, ingress in (("a", "one"), ("b", "two"))]
    scores = PromptScores("a", 1, [-1.0], [[]])
    token, last = TokenOutput("a", 5), TokenOutput("b", 6, finish=FinishReason.STOP)
    engine.streams.emit([scores, token, last, TokenOutput("unknown", 9)])
    assert await frame(one) == TokenFrame(tokens=[token], scores=[scores])
    assert await frame(two) == TokenFrame(tokens=[last])
    assert [end.done() for end in ends] == [False, True]


async def test_an_ingress_without_a_stream_cannot_ask(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="no token stream"):
        engine.streams.open("a", "nobody")
    assert engine.streams.requests == []


async def test_a_cancel_ends_its_request_alone(engine: Engine) -> None:
    ingress = await engine.ingress("i")
    first, second = engine.streams.open("a", "i"), engine.streams.open("b", "i")
    ingress.send(Cancel("a"))
    ingress.send(Cancel("over"))
    await until(first.done)
    assert engine.cancelled == ["a"]
    assert not second.done()


async def test_an_ingress_that_leaves_takes_its_requests_with_it(engine: Engine) -> None:
    leaving, staying = await engine.ingress("leaving"), await engine.ingress("staying")
    gone, kept = engine.streams.open("a", "leaving"), engine.streams.open("b", "staying")
    leaving.abort()
    await until(gone.done)
    assert engine.cancelled == ["a"]
    assert not kept.done()
    engine.streams.emit([TokenOutput("b", 1)])
    assert (await frame(staying)).tokens[0].token == 1


async def test_an_ingress_that_connects_anew_keeps_what_it_asks_for_from_then_on(
    engine: Engine,
) -> None:
    old = await engine.ingress("i")
    new = await engine.ingress("i")
    asked = engine.streams.open("a", "i")
    old.abort()
    engine.streams.emit([TokenOutput("a", 1)])
    assert (await frame(new)).tokens[0].token == 1
    assert not asked.done()


async def test_requests_that_are_sent_away_are_over_here(engine: Engine) -> None:
    ingress = await engine.ingress("i")
    ends = [engine.streams.open(name, "i") for name in ("a", "b", "c")]
    engine.streams.move(["a", "c"], "draining")
    got = await frame(ingress)
    assert got.ended == [Finish(name, FinishReason.MOVED, "draining") for name in ("a", "c")]
    assert engine.cancelled == ["a", "c"]
    assert [end.done() for end in ends] == [True, False, True]
    engine.streams.forget("a")
    engine.streams.emit([TokenOutput("a", 1), TokenOutput("b", 2)])
    assert [output.request_id for output in (await frame(ingress)).tokens] == ["b"]


async def test_a_stream_has_a_beat_that_says_what_the_engine_is_about(engine: Engine) -> None:
    ingress = await engine.ingress("i")
    beats = [await receive(ingress) for _ in range(3)]
    assert beats == [EngineBeat(Condition.SERVING)] * 3
    engine.streams.condition = Condition.DRAINING
    while await receive(ingress) != EngineBeat(Condition.DRAINING):
        pass  # one may have been under way
    late = await engine.ingress("late")
    assert await receive(late) == EngineBeat(Condition.DRAINING)


async def test_streams_are_cut_after_what_was_said(engine: Engine) -> None:
    ingress = await engine.ingress("i")
    engine.streams.open("a", "i")
    engine.streams.emit([TokenOutput("a", 1)])
    await engine.streams.cut()
    assert (await frame(ingress)).tokens[0].token == 1
    with pytest.raises(wire.WireError):
        await nothing_more(ingress)


async def nothing_more(channel: Channel) -> None:
    """Reads to the end of a connection."""
    while True:
        await receive(channel)

"""The wire: frames arrive as they were sent, and strangers get nowhere."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import wire
from serving.wire import BlockingChannel, Channel, ChannelServer, Codec, ProtocolError, WireError
from tests.waiting import until

SECRET = b"a secret of the test"
HOST = "127.0.0.1"


@dataclass(slots=True)
class Ping:
    number: int
    payload: bytes = b""
    names: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Pong:
    number: int


CODEC = Codec(Ping, Pong)


@asynccontextmanager
async def echo_server() -> AsyncIterator[tuple[ChannelServer, int]]:
    async def echo(channel: Channel) -> None:
        while True:
            ping = await channel.receive()
            channel.send(Pong(ping.number))

    server = ChannelServer(SECRET, CODEC, echo)
    port = await server.start(HOST)
    try:
        yield server, port
    finally:
        await server.close()


async def answers(port: int) -> bool:
    channel = await wire.connect(HOST, port, SECRET, CODEC)
    channel.send(Ping(7))
    answer = await channel.receive()
    await channel.close()
    return bool(answer == Pong(7))


@given(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=2000), st.lists(st.text()))
def test_a_frame_decodes_to_what_was_encoded(number: int, payload: bytes, names: list[str]) -> None:
    names = [name.encode("utf-8", "ignore").decode() for name in names]
    ping = Ping(number, payload, names)
    assert CODEC.decode(CODEC.frame(ping)[4:]) == ping


@given(st.binary(max_size=200))
def test_garbage_decodes_to_an_error_and_to_nothing_else(garbage: bytes) -> None:
    try:
        decoded = CODEC.decode(garbage)
    except ProtocolError:
        return
    assert isinstance(decoded, (Ping, Pong))


async def test_messages_keep_their_order_both_ways() -> None:
    async with echo_server() as (_, port):
        channel = await wire.connect(HOST, port, SECRET, CODEC)
        for number in range(500):
            channel.send(Ping(number, os.urandom(100)))
        assert [(await channel.receive()).number for _ in range(500)] == list(range(500))
        await channel.close()


async def test_a_client_without_the_secret_is_cut() -> None:
    async with echo_server() as (server, port):
        with pytest.raises(WireError):
            await wire.connect(HOST, port, b"another secret", CODEC)
        assert await answers(port)
        await until(lambda: server.rejected == 1)


async def test_a_server_without_the_secret_is_refused() -> None:
    async def never(channel: Channel) -> None:
        raise AssertionError("the client must not accept this server")

    server = ChannelServer(b"another secret", CODEC, never)
    port = await server.start(HOST)
    with pytest.raises(ProtocolError):
        await wire.connect(HOST, port, SECRET, CODEC)
    await server.close()


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("1603010200010001fc0303") + b"\0" * 64,
    "zeros": b"\0" * 1000,
    "half a handshake": b"XPL1" + b"\1" * 10,
    "wrong proof": b"XPL1" + b"\1" * 32 + b"\2" * 32,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_before_the_handshake_closes_that_connection_only(garbage: bytes) -> None:
    async with echo_server() as (server, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 30)
        writer.close()
        await until(lambda: server.rejected == 1)
        assert await answers(port)


FRAMES = {
    "huge": struct.pack("<I", 2**31) + b"x",
    "empty": struct.pack("<I", 0),
    "unknown kind": struct.pack("<I", 2) + b"\xff\x00",
    "not msgpack": struct.pack("<I", 3) + b"\x00\xc1\xc1",
    "wrong type": CODEC.frame(Pong(1))[:4] + b"\x00" + CODEC.frame(Pong(1))[5:-1] + b"\xa1",
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
async def test_a_bad_frame_closes_that_connection_only(frame: bytes) -> None:
    async with echo_server() as (server, port):
        channel = await wire.connect(HOST, port, SECRET, CODEC)
        channel.send_frame(frame)
        with pytest.raises(WireError):
            await asyncio.wait_for(channel.receive(), 30)
        await until(lambda: server.rejected == 1)
        assert await answers(port)


async def test_a_peer_that_stops_reading_is_cut_at_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "MAX_BUFFERED_BYTES", 1 << 20)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def flood(channel: Channel) -> None:
        sent = 0
        try:
            while True:
                channel.send(Ping(0, bytes(1 << 16)))
                sent += 1
        except WireError:
            ended.set_result(sent)

    server = ChannelServer(SECRET, CODEC, flood)
    port = await server.start(HOST)
    channel = await wire.connect(HOST, port, SECRET, CODEC)
    assert await asyncio.wait_for(ended, 60) < 1000
    channel.abort()
    await server.close()


async def test_closing_the_server_ends_its_handlers() -> None:
    async with echo_server() as (server, port):
        channel = await wire.connect(HOST, port, SECRET, CODEC)
        channel.send(Ping(1))
        await channel.receive()
        await server.close()
        with pytest.raises(WireError):
            await asyncio.wait_for(channel.receive(), 30)


async def test_nobody_listening_is_a_wire_error() -> None:
    async with echo_server() as (server, port):
        await server.close()
        with pytest.raises(WireError, match="cannot connect"):
            await wire.connect(HOST, port, SECRET, CODEC)


async def test_a_thread_can_hold_the_other_end() -> None:
    async with echo_server() as (_, port):
        got: list[Any] = []

        def talk() -> None:
            channel = BlockingChannel.connect(HOST, port, SECRET, CODEC)
            for number in range(10):
                channel.send(Ping(number, bytes(100_000)))
                got.append(channel.receive())
            channel.close()

        await asyncio.to_thread(talk)
        assert got == [Pong(number) for number in range(10)]


async def test_closing_a_blocking_channel_wakes_its_reader() -> None:
    async with echo_server() as (_, port):
        channel = await asyncio.to_thread(BlockingChannel.connect, HOST, port, SECRET, CODEC)
        failures: list[WireError] = []

        def read() -> None:
            try:
                channel.receive()
            except WireError as error:
                failures.append(error)

        thread = Thread(target=read)
        thread.start()
        channel.close()
        await asyncio.to_thread(thread.join, 60)
        assert len(failures) == 1


async def test_a_blocking_client_without_the_secret_is_refused() -> None:
    async with echo_server() as (_, port):
        with pytest.raises(WireError):
            await asyncio.to_thread(BlockingChannel.connect, HOST, port, b"wrong", CODEC)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")
async def test_no_connection_waits_long_for_a_host_that_has_vanished() -> None:
    served: list[Channel] = []

    async def keep(channel: Channel) -> None:
        served.append(channel)
        await channel.receive()

    server = ChannelServer(SECRET, CODEC, keep)
    port = await server.start(HOST)
    channel = await wire.connect(HOST, port, SECRET, CODEC)
    await until(lambda: bool(served))
    for end in (channel, *served):
        sock = end._writer.get_extra_info("socket")
        patience_ms = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert patience_ms == wire.UNACKNOWLEDGED_MS
    await channel.close()
    await server.close()

"""What stands in for a gang, and what reads the streams, where a token's way is measured."""

import asyncio

import pytest

from loadtest.token_path.streams import TokenStream, open_streams
from loadtest.token_path.stub import StubGang
from serving.engine.loop import EngineLoop
from serving.engine.request import Output, Request, TokenOutput
from serving.engine.scheduler import EngineLimits, Scheduler
from tests.waiting import until

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


async def test_every_running_sequence_gets_its_tokens_from_a_gang_without_ranks() -> None:
    out: list[Output] = []
    ended = asyncio.Event()

    def emit(outputs: object) -> None:
        out.extend(outputs)  # type: ignore[arg-type]
        if sum(output.ends for output in out) == 2:
            ended.set()

    gang = StubGang([5, 6, 7], steps_per_second=1000.0)
    scheduler = Scheduler(EngineLimits(1, 1, 64, 512, 16, 1024))
    loop = EngineLoop(scheduler, gang, emit, asyncio.get_running_loop().time)
    running = asyncio.create_task(loop.run())
    loop.submit(Request("a", [1] * 100, 6))
    loop.submit(Request("b", [2] * 3, 4))
    await asyncio.wait_for(ended.wait(), 30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    tokens = [output for output in out if isinstance(output, TokenOutput)]
    assert sum(output.request_id == "a" for output in tokens) == 6
    assert sum(output.request_id == "b" for output in tokens) == 4
    assert {output.token for output in tokens} <= {5, 6, 7}


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD)
    for _ in range(3):
        writer.write(b"data: {}\n\n")
        await writer.drain()
    await reader.read()  # until the client leaves
    writer.close()


async def test_streams_are_counted_without_being_parsed() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    streams = await open_streams("127.0.0.1", port, count=4, max_tokens=8)
    await until(lambda: all(stream.events == 3 for stream in streams), timeout_s=30)
    assert [stream.problem for stream in streams] == [""] * 4
    for stream in streams:
        stream.close()
    server.close()


def test_gaps_are_those_of_one_streams_arrivals_inside_the_window() -> None:
    stream = TokenStream(b"")
    stream.arrivals = [0.5, 1.0, 1.25, 2.0, 9.0]
    assert stream.gaps_s(1.0, 3.0) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("data", [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"garbage"])
def test_an_answer_that_is_no_stream_is_a_problem(data: bytes) -> None:
    stream = TokenStream(b"request")
    stream.data_received(data)
    assert stream.problem.encode() == data

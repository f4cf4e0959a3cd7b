"""One streamed request: what is sent, and what is measured of the answer."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.sse import GrammarError, ServerError, StreamCheck
from loadtest.transcript import Transcript

MAX_MESSAGE = 200  # characters kept of an error


@dataclass(frozen=True, slots=True)
class Reading:
    """How a client reads its answer: to the end and at once, unless told otherwise.

    Attributes:
        leave_after: it closes the connection after so many chunks with text.
        pause_s: it does nothing for so long after each chunk with text.
    """

    leave_after: int | None = None
    pause_s: float = 0.0


TO_THE_END = Reading()


@dataclass(slots=True)
class RequestRecord:
    """One request's story. Times are seconds since the run's start; None: it never came so far."""

    number: int
    kind: str
    intended_s: float
    sent_s: float | None = None
    first_s: float | None = None  # first text
    last_s: float | None = None  # latest text
    end_s: float | None = None
    status: int | None = None  # HTTP
    error: str | None = None  # what kind: http_429, timeout, connection, grammar, server, client
    message: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0  # by the server's count
    finish_reason: str | None = None
    left: bool = False  # the client went away before the end, as it was to
    gaps_s: list[float] = field(default_factory=list)  # between chunks with text

    @property
    def succeeded(self) -> bool:
        return self.error is None and self.end_s is not None

    @property
    def silence_s(self) -> float:
        """The longest time between two chunks with text."""
        return max(self.gaps_s, default=0.0)

    def heard(self, now: float) -> None:
        """A chunk with text has come."""
        if self.first_s is None or self.last_s is None:
            self.first_s = now
        else:
            self.gaps_s.append(now - self.last_s)
        self.last_s = now

    def fail(self, kind: str, message: str) -> None:
        self.error, self.message = kind, message[:MAX_MESSAGE]


class Clock:
    """Seconds since the run's start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start


async def stream_request(
    client: httpx.AsyncClient,
    url: str,
    body: dict[str, Any],
    record: RequestRecord,
    clock: Clock,
    reading: Reading = TO_THE_END,
) -> Transcript:
    """Sends one request and reads its stream (or, if it asks for none, its answer) to the end,
    or as far as the reading goes.

    What goes wrong is in the record; what was said until then is returned.
    """
    record.sent_s = clock()
    check = StreamCheck()
    try:
        async with client.stream("POST", url, json=body) as response:
            record.status = response.status_code
            if response.status_code != httpx.codes.OK:
                record.fail(f"http_{response.status_code}", (await response.aread()).decode())
            elif body.get("stream"):
                await _read(response, check, record, clock, reading)
            else:
                check.whole((await response.aread()).decode())
                check.end()
                record.heard(clock())
    except GrammarError as error:
        record.fail("grammar", str(error))
    except ServerError as error:
        record.fail("server", str(error))
    except httpx.TimeoutException as error:
        record.fail("timeout", type(error).__name__)
    except (httpx.HTTPError, UnicodeDecodeError) as error:
        record.fail("connection", f"{type(error).__name__}: {error}")
    finally:
        said = check.transcript
        record.end_s = clock()
        record.prompt_tokens = said.prompt_tokens or 0
        record.output_tokens = said.output_tokens or 0
        record.finish_reason = said.choices[0].finish_reason if 0 in said.choices else None
    return said


async def _read(
    response: httpx.Response,
    check: StreamCheck,
    record: RequestRecord,
    clock: Clock,
    reading: Reading,
) -> None:
    content_type = response.headers.get("content-type", "")
    if not content_type.startswith("text/event-stream"):
        raise GrammarError(f"content-type {content_type!r} instead of text/event-stream")
    chunks = 0
    async for data in _events(response):
        if not check.feed(data):
            continue
        record.heard(clock())
        chunks += 1
        if chunks == reading.leave_after:
            record.left = True
            return
        if reading.pause_s:
            await asyncio.sleep(reading.pause_s)
    check.end()


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event; comments and other fields are skipped, as SSE has it."""
    data: list[str] = []
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data.clear()
    if data:
        raise GrammarError("the stream ended inside an event")

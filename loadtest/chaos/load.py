"""An open-loop load around a fault, every answer judged as it ends."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import httpx

from loadtest.chaos.golden import Golden
from loadtest.chaos.waiting import until
from loadtest.chaos.workload import UNHURRIED, in_turn
from loadtest.oracle import Verdict, compare
from loadtest.request import RequestRecord
from loadtest.runner import Call, OpenLoop, poisson
from loadtest.transcript import Transcript

REQUEST_S = 300.0
_HEARD = 3  # chunks of a stream that is running
_RUNNING_S = 300.0
_AFTER = 0.5  # seconds after a fault within which the silence that it makes begins


@dataclass(frozen=True, slots=True)
class Judged:
    """A request that is over."""

    record: RequestRecord
    verdict: Verdict


class Load:
    """Use as an async context manager: entering lets requests arrive, leaving stops that and
    waits for the answers.

    Args:
        rate: mean arrivals in a second.
        seed: of arrivals and of the order of the cases.
        streams: so many long ones arrive at the very beginning, to be hit.
    """

    def __init__(self, url: str, golden: Golden, rate: float, seed: int, streams: int = 1) -> None:
        self.judged: list[Judged] = []
        self._golden = golden
        self._rate = rate
        self._seed = seed
        self._streams = streams
        self._order = in_turn(golden.calls, seed, streams)
        self._stopped = False
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(REQUEST_S, connect=60.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self.loop = OpenLoop(self._client, f"{url}/v1", self._call, REQUEST_S, self._judge)
        self._playing: asyncio.Task[None] | None = None

    @property
    def records(self) -> list[RequestRecord]:
        return self.loop.records

    @property
    def now(self) -> float:
        """Seconds since the load began, as records have them."""
        return self.loop.clock()

    async def __aenter__(self) -> "Load":
        self._playing = asyncio.create_task(self.loop.play(self._arrivals()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._playing is not None
        self._stopped = True
        if kind is not None and not issubclass(kind, Exception):
            self._playing.cancel()
        await asyncio.gather(self._playing, return_exceptions=kind is not None)
        await self._client.aclose()

    async def until_running(self) -> None:
        """Until as many streams as are to be hit are in the midst of their tokens."""
        await until(
            lambda: len(self.running()) >= self._streams, _RUNNING_S, "enough running streams"
        )

    async def until_served(self, requests: int, within_s: float) -> None:
        """Until so many requests that were sent from now on have ended."""
        since = self.now

        def served() -> bool:
            fresh = [r for r in self.records if (r.sent_s or 0.0) > since and r.end_s is not None]
            return len(fresh) >= requests

        await until(served, within_s, f"{requests} requests served")

    def running(self) -> list[RequestRecord]:
        """Streams in the midst of their tokens that are read as they come."""
        return [
            r
            for r in self.records
            if r.end_s is None and r.kind not in UNHURRIED and len(r.gaps_s) >= _HEARD
        ]

    def _arrivals(self) -> Iterator[float]:
        yield from [0.0] * self._streams
        for due in poisson(self._rate, self._seed):
            if self._stopped:
                return
            yield due

    def _call(self, number: int) -> Call:
        return self._golden.calls[self._case(number)]

    def _case(self, number: int) -> int:
        return self._order[number % len(self._order)]

    def _judge(self, record: RequestRecord, said: Transcript) -> None:
        whole = record.succeeded and not record.left
        verdict = compare(self._golden.answers[self._case(record.number)], said, whole)
        self.judged.append(Judged(record, verdict))


def silences(records: list[RequestRecord], at: float) -> list[float]:
    """How long each stream that ran at a time was silent from then on, in seconds.

    From the fault to the end of the longest silence that was there or began within half a second:
    tokens that were on their way when something died still come.
    """
    found = []
    for record in records:
        if record.first_s is None or record.kind in UNHURRIED:
            continue
        heard, longest, silence = record.first_s, 0.0, 0.0
        if heard > at or (record.last_s or 0.0) < at:
            continue
        for gap in record.gaps_s:
            begun, heard = heard, heard + gap
            quiet = heard - max(begun, at)
            if begun <= at + _AFTER and quiet > longest:
                longest, silence = quiet, heard - at
        if longest:
            found.append(silence)
    return found


def first_tokens(records: list[RequestRecord], since: float, before: float) -> list[float]:
    """Seconds from sending to first text, of requests sent in an interval."""
    return [
        r.first_s - r.sent_s
        for r in records
        if r.sent_s is not None and r.first_s is not None and since <= r.sent_s < before
    ]

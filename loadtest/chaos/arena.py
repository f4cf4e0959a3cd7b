"""One scenario at work: a server, its load, and rounds of one fault each."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from loadtest.chaos.baseline import Holdings, holdings, settled
from loadtest.chaos.census import Census
from loadtest.chaos.faults import Fault
from loadtest.chaos.golden import Golden
from loadtest.chaos.load import Load
from loadtest.chaos.outcome import Outcome
from loadtest.chaos.server import Server
from loadtest.chaos.waiting import until
from loadtest.request import RequestRecord

RECOVERED_S = 300.0
SETTLED_S = 120.0
_SERVED_S = 300.0


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault that has struck. Times are the load's own.

    Attributes:
        records: all requests of the round.
        at: when it struck.
        recovered: when the server was whole again.
    """

    records: list[RequestRecord]
    at: float
    recovered: float


@dataclass
class Arena:
    """What a scenario works with.

    Attributes:
        count: how many faults it is to bring about.
        share: of the server's tokens in a second that the load asks for.
        served: requests from their sending to their end, after a recovery.
        rng: for what is drawn while it runs.
    """

    server: Server
    client: httpx.AsyncClient
    census: Census
    golden: Golden
    outcome: Outcome
    count: int
    seed: int
    share: float
    served: int
    _before: Holdings | None = None
    _rounds: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}:{self.outcome.scenario}")

    @property
    def rate(self) -> float:
        """Requests in a second."""
        return self.share * self.golden.tokens_per_second / self.golden.mean_tokens

    async def remember(self) -> None:
        """What the idle server holds now is what it has to come back to."""
        self._before = await holdings(self.server, self.client, self.census)

    @asynccontextmanager
    async def load(self, fault: Fault | None = None, streams: int = 1) -> AsyncIterator[Load]:
        """A load for the body; its answers are in the outcome afterwards, and so is what the
        server did not give back when all was over."""
        self._rounds += 1
        name = "no fault" if fault is None else fault.name
        self.outcome.faults += [name] if fault is not None else []
        seed = self.seed + self._rounds
        load = Load(self.server.url, self.golden, self.rate, seed, streams)
        try:
            async with load:
                yield load
        finally:
            self.outcome.take(load.judged, name, fault is not None and fault.excuses)
        await self.settle(name)

    async def settle(self, fault: str) -> None:
        """Waits until the server holds what it held; what it does not give back is a finding."""
        if self._before is None:
            return
        left = await settled(self._before, self.server, self.client, self.census, SETTLED_S)
        self.outcome.kept += [f"{fault}: {what}" for what in left]

    async def blow(self, fault: Fault, streams: int = 1, least_s: float = 0.0) -> Blow:
        """One round: a fault under load.

        Args:
            streams: in the midst of their tokens when it strikes.
            least_s: how long the load lasts at least.

        Raises:
            ChaosError: it could not strike, or the server did not recover.
        """
        async with self.load(fault, streams) as load:
            await load.until_running()
            at = load.now
            await fault.strike(self.server)
            await until(
                lambda: fault.recovered(self.server, self.client),
                RECOVERED_S,
                f"recovery from: {fault.name}",
            )
            recovered = load.now
            about = f"{self.outcome.scenario}: {fault.name}: whole after {recovered - at:.1f} s"
            print(about, flush=True)
            await load.until_served(self.served, _SERVED_S)
            await asyncio.sleep(max(0.0, least_s - load.now))
        return Blow(load.records, at, recovered)


@asynccontextmanager
async def timed(outcome: Outcome) -> AsyncIterator[None]:
    """Adds how long the body took to the outcome."""
    started = time.monotonic()
    try:
        yield
    finally:
        outcome.seconds += time.monotonic() - started

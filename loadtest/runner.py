"""Open-loop load: requests leave when they are due, however slow the answers are.

Arrivals are a Poisson process drawn before the run. A client that falls behind its own schedule
would flatter the server, so the lag is measured and a run with too much of it says so.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.report import LoadReport, summarize
from loadtest.request import TO_THE_END, Clock, Reading, RequestRecord, stream_request
from loadtest.transcript import Transcript
from loadtest.workload import Endpoint, Workload

MAX_REQUESTS = 100_000
MAX_IN_FLIGHT = 4096
CONNECT_TIMEOUT_S = 10.0
_PATHS: dict[Endpoint, str] = {"chat": "chat/completions", "completions": "completions"}

Progress = Callable[[int, int, int], None]  # requests sent, ended, in all


class LoadError(Exception):
    """The run cannot start; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send where.

    Args:
        url: the server, with or without a final `/v1`.
        model: its name there; None takes the first one that the server lists.
        rate: mean arrivals in a second.
        duration_s: arrivals stop after this time; either this or `requests` is given.
        requests: arrivals stop after so many.
        max_tokens: bound of every answer.
        fim_share: how many of the completions are fill-in-the-middle, 0 to 1.
        timeout_s: a request that takes longer, from its sending, has failed.
    """

    url: str
    model: str | None = None
    rate: float = 1.0
    duration_s: float | None = None
    requests: int | None = None
    max_tokens: int = 64
    endpoint: Endpoint = "completions"
    seed: int = 0
    fim_share: float = 0.0
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if (self.duration_s is None) == (self.requests is None):
            raise LoadError("give either a duration or a number of requests")
        if not self.url.startswith(("http://", "https://")):
            raise LoadError(f"{self.url!r}: a URL starts with http:// or https://")
        if self.endpoint not in _PATHS:
            raise LoadError(f"{self.endpoint!r}: choose {' or '.join(_PATHS)}")
        amounts = (self.rate, self.duration_s, self.requests, self.max_tokens, self.timeout_s)
        if any(amount is not None and not 0 < amount < float("inf") for amount in amounts):
            raise LoadError("rate, duration, requests, tokens and timeout must be positive")
        if not 0 <= self.fim_share <= 1:
            raise LoadError("the fill-in-the-middle share lies between 0 and 1")
        expected = self.requests or self.rate * (self.duration_s or 0.0)
        if expected > MAX_REQUESTS:
            raise LoadError(f"{expected:.0f} requests are more than {MAX_REQUESTS}")

    @property
    def base_url(self) -> str:
        """With `/v1`, without a final slash."""
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    def arrivals(self) -> list[float]:
        """When requests are due, in seconds from the start; the same for the same seed."""
        due = itertools.islice(poisson(self.rate, self.seed), self.requests or MAX_REQUESTS)
        end = self.duration_s or float("inf")
        return list(itertools.takewhile(lambda at: at < end, due))


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrivals without end, `rate` in a second; seconds from the start."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it goes out, and how its answer is read.

    Attributes:
        kind: what reports group it by.
        path: below `/v1`.
    """

    kind: str
    path: str
    body: dict[str, Any]
    reading: Reading = TO_THE_END


def run_load(plan: LoadPlan, progress: Progress | None = None) -> LoadReport:
    """Runs the plan to its end, answers included. Failed requests are part of the report.

    Raises:
        LoadError: the model was left open and the server does not tell one.
        WorkloadError: there are no sources to make prompts of.
    """
    return asyncio.run(_run(plan, progress))


async def _run(plan: LoadPlan, progress: Progress | None) -> LoadReport:
    headers = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(plan.timeout_s, connect=min(CONNECT_TIMEOUT_S, plan.timeout_s)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IN_FLIGHT),
        trust_env=False,  # a proxy on the way would be measured along
    ) as client:
        model = plan.model or await _first_model(client, plan.base_url)
        call = _calls(plan, model)
        call(0)  # reads the sources before the clock starts
        loop = OpenLoop(client, plan.base_url, call, plan.timeout_s)
        due = plan.arrivals()
        await loop.play(due, progress, len(due))
    offered_s = plan.duration_s or (due[-1] if due else 0.0)
    return summarize(_config(plan, model), loop.records, offered_s)


def _calls(plan: LoadPlan, model: str) -> Callable[[int], Call]:
    """The plan's request with a number."""
    workload = Workload(plan.seed, plan.endpoint, plan.fim_share)

    def call(number: int) -> Call:
        prompt = workload.prompt(number)
        body = prompt.body() | {
            "model": model,
            "max_tokens": plan.max_tokens,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Call(prompt.kind, _PATHS[plan.endpoint], body)

    return call


async def _first_model(client: httpx.AsyncClient, base_url: str) -> str:
    try:
        response = await client.get(f"{base_url}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise LoadError(f"{base_url}/models tells no model: {error}") from error


class OpenLoop:
    """Requests due, on their way and ended.

    Args:
        base_url: with `/v1`.
        call: the request with a number.
        timeout_s: a request that takes longer, from its sending, has failed.
        ended: told of each request when it is over, with what was said.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        base_url: str,
        call: Callable[[int], Call],
        timeout_s: float,
        ended: Callable[[RequestRecord, Transcript], None] | None = None,
    ) -> None:
        self.records: list[RequestRecord] = []
        self.clock = Clock()
        self._client = client
        self._base_url = base_url
        self._call = call
        self._timeout_s = timeout_s
        self._ended = ended
        self._in_flight: set[asyncio.Task[None]] = set()

    async def play(
        self, arrivals: Iterable[float], progress: Progress | None = None, total: int = 0
    ) -> None:
        """Sends a request at each arrival (seconds from now), and returns when all have ended."""
        self.clock = Clock()
        try:
            for due in arrivals:
                await asyncio.sleep(max(0.0, due - self.clock()))
                self._launch(len(self.records), due)
                self._tell(progress, total)
            while self._in_flight:
                await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
                self._tell(progress, len(self.records))
        finally:
            for task in self._in_flight:
                task.cancel()

    def _tell(self, progress: Progress | None, total: int) -> None:
        sent = len(self.records)
        if progress is not None:
            progress(sent, sent - len(self._in_flight), total)

    def _launch(self, number: int, due: float) -> None:
        call = self._call(number)
        record = RequestRecord(number, call.kind, due)
        self.records.append(record)
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            # waiting for room would turn the open loop into a closed one
            record.fail("client", f"{MAX_IN_FLIGHT} requests are in flight already")
            return
        task = asyncio.create_task(self._send(call, record))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _send(self, call: Call, record: RequestRecord) -> None:
        said = Transcript()
        try:
            async with asyncio.timeout(self._timeout_s):
                url = f"{self._base_url}/{call.path}"
                said = await stream_request(
                    self._client, url, call.body, record, self.clock, call.reading
                )
        except TimeoutError:
            record.fail("timeout", f"no end within {self._timeout_s:g} s")
        if self._ended is not None:
            self._ended(record, said)


def _config(plan: LoadPlan, model: str) -> dict[str, object]:
    """The plan as the report tells it: all but the key."""
    return {
        "url": plan.base_url,
        "model": model,
        "endpoint": plan.endpoint,
        "rate": plan.rate,
        "duration_s": plan.duration_s,
        "requests": plan.requests,
        "max_tokens": plan.max_tokens,
        "timeout_s": plan.timeout_s,
        "seed": plan.seed,
    }

"""Open-loop load: requests leave when they are due, however slow the answers are.

Arrivals are a Poisson process drawn before the run. A client that falls behind its own schedule
would flatter the server, so the lag is measured and a run with too much of it says so.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from loadtest.report import LoadReport, summarize
from loadtest.request import Clock, RequestRecord, stream_request
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
        rng = random.Random(self.seed)
        due: list[float] = []
        at = rng.expovariate(self.rate)
        while len(due) < (self.requests or MAX_REQUESTS) and at < (self.duration_s or float("inf")):
            due.append(at)
            at += rng.expovariate(self.rate)
        return due


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
        run = _Run(plan, model, client)
        await run.play(progress)
    return summarize(_config(plan, model), run.records, run.offered_s)


async def _first_model(client: httpx.AsyncClient, base_url: str) -> str:
    try:
        response = await client.get(f"{base_url}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise LoadError(f"{base_url}/models tells no model: {error}") from error


class _Run:
    """One run's requests, due, on their way and ended."""

    def __init__(self, plan: LoadPlan, model: str, client: httpx.AsyncClient) -> None:
        self.records: list[RequestRecord] = []
        self._plan = plan
        self._model = model
        self._client = client
        self._workload = Workload(plan.seed, plan.endpoint, plan.fim_share)
        self._url = f"{plan.base_url}/{_PATHS[plan.endpoint]}"
        self._due = plan.arrivals()
        self._in_flight: set[asyncio.Task[None]] = set()

    @property
    def offered_s(self) -> float:
        """How long the arrivals take."""
        return self._plan.duration_s or (self._due[-1] if self._due else 0.0)

    async def play(self, progress: Progress | None) -> None:
        self._workload.prompt(0)  # reads the sources before the clock starts
        clock = Clock()
        for number, due in enumerate(self._due):
            await asyncio.sleep(max(0.0, due - clock()))
            self._launch(number, due, clock)
            if progress is not None:
                sent = len(self.records)
                progress(sent, sent - len(self._in_flight), len(self._due))
        while self._in_flight:
            await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            if progress is not None:
                sent = len(self.records)
                progress(sent, sent - len(self._in_flight), sent)

    def _launch(self, number: int, due: float, clock: Clock) -> None:
        prompt = self._workload.prompt(number)
        record = RequestRecord(number, prompt.kind, due)
        self.records.append(record)
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            # waiting for room would turn the open loop into a closed one
            record.fail("client", f"{MAX_IN_FLIGHT} requests are in flight already")
            return
        body = prompt.body() | {
            "model": self._model,
            "max_tokens": self._plan.max_tokens,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        task = asyncio.create_task(self._send(body, record, clock))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _send(self, body: dict[str, object], record: RequestRecord, clock: Clock) -> None:
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await stream_request(self._client, self._url, body, record, clock)
        except TimeoutError:
            record.fail("timeout", f"no end within {self._plan.timeout_s:g} s")
            record.end_s = clock()


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

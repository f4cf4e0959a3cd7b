"""Every metric, defined once next to its help text, by the kind of process that has it.

A process has one registry and one of these classes (the ranks' is in rank_metrics.py); the
methods are its events. Each label has a bounded set of values, and children with known labels
are bound when the process starts: an update costs an addition, and a rate() has a zero to start
from.
"""

import asyncio
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from serving.telemetry.counter import LoopCounter
from serving.telemetry.histogram import LoopHistogram

_MS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075)
_TENTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_SECONDS = (1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)
_MINUTES = (120.0, 300.0, 600.0, 1800.0)
STEP_SECONDS_BUCKETS = (*_MS, *_TENTHS, 2.0, 5.0, 10.0, 30.0)
ITL_BUCKETS = (*_MS[2:], *_TENTHS, 2.0, 5.0, 10.0)
TTFT_BUCKETS = (*_MS[2:], *_TENTHS, *_SECONDS, *_MINUTES[:2])
QUEUE_BUCKETS = (0.0005, *_MS, *_TENTHS, *_SECONDS, *_MINUTES[:2])
E2E_BUCKETS = (*_MS[4:], *_TENTHS, *_SECONDS, *_MINUTES)
REPAIR_SECONDS_BUCKETS = (0.5, 1.0, *_SECONDS[1:], *_MINUTES[:3])
STEP_TOKENS_BUCKETS = tuple(float(2**power) for power in range(14))

Endpoint = Literal["chat", "completions", "responses", "messages", "other"]
Phase = Literal["queued", "prefill", "decode"]

_ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
_PHASES: tuple[Phase, ...] = ("queued", "prefill", "decode")
_REFUSALS = ("full", "deadline", "too_long")
_LOSSES = ("lost", "silent", "failed", "repair", "moved")


def new_registry() -> CollectorRegistry:
    """A process's registry, with its CPU time, memory and open files already in it."""
    disable_created_metrics()  # they would double the number of series
    registry = CollectorRegistry()
    ProcessCollector(namespace="expertline", registry=registry)
    return registry


def count_tasks(registry: CollectorRegistry, loop: asyncio.AbstractEventLoop) -> None:
    """Adds how many tasks the process's event loop has: one that only grows is a leak."""
    gauge = Gauge("expertline_asyncio_tasks", "Tasks of the event loop.", registry=registry)
    gauge.set_function(lambda: len(asyncio.all_tasks(loop)))


class IngressMetrics:
    """What clients experience."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "expertline_requests_total",
            "Requests answered, by endpoint and HTTP status code.",
            ["endpoint", "code"],
            registry=registry,
        )
        for endpoint in _ENDPOINTS:
            self._requests.labels(endpoint, "200")
        self._ttft = Histogram(
            "expertline_request_ttft_seconds",
            "From a request's arrival to its first token.",
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self._itl = LoopHistogram(
            "expertline_request_itl_seconds",
            "Between two tokens of one request, as they reach the ingress.",
            ITL_BUCKETS,
            registry,
        )
        self._e2e = Histogram(
            "expertline_request_e2e_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=E2E_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "expertline_request_queue_seconds",
            "Waiting for a lease.",
            buckets=QUEUE_BUCKETS,
            registry=registry,
        )
        self._tokens = LoopCounter(
            "expertline_tokens_total",
            "Tokens: of prompts, of these found in the prefix cache, and generated.",
            "kind",
            ("prompt", "cached", "generated"),
            registry,
        ).counts
        self._streams = Gauge(
            "expertline_streams_open",
            "Generations that an engine works on for this ingress.",
            registry=registry,
        )
        disconnects = Counter(
            "expertline_disconnects_total",
            "Clients that went away before their answer was complete, by how far it had come.",
            ["phase"],
            registry=registry,
        )
        self._disconnects = {phase: disconnects.labels(phase) for phase in _PHASES}
        resumed = Counter(
            "expertline_resumed_total",
            "Generations that went on with another engine, by what became of the one before.",
            ["reason"],
            registry=registry,
        )
        self._resumed = {reason: resumed.labels(reason) for reason in _LOSSES}
        self._given_up = Counter(
            "expertline_given_up_total",
            "Generations that failed because no engine could go on with them.",
            registry=registry,
        )

    def leased(self, queue_s: float) -> None:
        """A generation has its lease after waiting `queue_s`, and a stream opens."""
        self._queue.observe(queue_s)
        self._streams.inc()

    def released(self) -> None:
        """A generation has ended, one way or another."""
        self._streams.dec()

    def first_token(self, since_arrival_s: float) -> None:
        self._ttft.observe(since_arrival_s)
        self._tokens["generated"] += 1

    def next_tokens(self, count: int, since_last_s: float) -> None:
        """So many more tokens of a request have come at once, so long after the last ones."""
        self._itl.observe(since_last_s / count, count)
        self._tokens["generated"] += count

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt of `tokens` tokens, of which `cached` were in the prefix cache."""
        self._tokens["prompt"] += tokens
        self._tokens["cached"] += cached

    def answered(self, endpoint: Endpoint, code: int, seconds: float) -> None:
        """A request is over; `code` is the HTTP status that the client saw."""
        self._requests.labels(endpoint, str(code)).inc()
        self._e2e.observe(seconds)

    def disconnected(self, phase: Phase) -> None:
        self._disconnects[phase].inc()

    def resumed(self, reason: str) -> None:
        """A generation goes on with another engine: its own was "lost" (the stream ended),
        "silent" or long under "repair", or "failed" the call; or it "moved" it."""
        self._resumed[reason].inc()

    def given_up(self) -> None:
        """A generation has failed for want of an engine that could go on with it."""
        self._given_up.inc()


class RouterMetrics:
    """The fleet as the router sees it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        leases = Counter(
            "expertline_leases_total",
            "Requests for a lease, by what came of them.",
            ["outcome"],
            registry=registry,
        )
        self._granted = leases.labels("granted")
        self._refused = {outcome: leases.labels(outcome) for outcome in _REFUSALS}
        self._queue_requests = Gauge(
            "expertline_queue_requests", "Requests that wait for a lease.", registry=registry
        )
        self._queue_seconds = Histogram(
            "expertline_queue_seconds",
            "In the router's queue, of requests that got a lease.",
            buckets=QUEUE_BUCKETS,
            registry=registry,
        )
        engines = Gauge(
            "expertline_fleet_engines", "Engines, by state.", ["state"], registry=registry
        )
        self._ready = engines.labels("ready")
        self._loading = engines.labels("loading")
        self._reserved = Gauge(
            "expertline_reserved_tokens", "Cache tokens that leases reserve.", registry=registry
        )

    def granted(self, queue_s: float) -> None:
        """A request has its lease after `queue_s` in the queue."""
        self._granted.inc()
        self._queue_seconds.observe(queue_s)

    def refused(self, outcome: str) -> None:
        """A request got no lease: "full", "deadline" or "too_long"."""
        self._refused[outcome].inc()

    def state(self, queued: int, reserved_tokens: int, ready: int, loading: int) -> None:
        """How things stand now."""
        self._queue_requests.set(queued)
        self._reserved.set(reserved_tokens)
        self._ready.set(ready)
        self._loading.set(loading)


class EngineMetrics:
    """One replica: its queue, its cache pages, its steps."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._running = Gauge(
            "expertline_requests_running", "Requests that have cache pages.", registry=registry
        )
        self._waiting = Gauge(
            "expertline_requests_waiting", "Requests that wait for pages.", registry=registry
        )
        self._in_flight = Gauge(
            "expertline_steps_in_flight", "Steps sent and not yet returned.", registry=registry
        )
        self._pages = Gauge(
            "expertline_pages",
            "Cache pages of one column of ranks: held by sequences, remembered by content, free.",
            ["column", "state"],
            registry=registry,
        )
        self._queried = Counter(
            "expertline_prefix_query_tokens_total",
            "Prompt tokens looked up in the prefix cache.",
            registry=registry,
        )
        self._hit = Counter(
            "expertline_prefix_hit_tokens_total",
            "Prompt tokens found in the prefix cache.",
            registry=registry,
        )
        self._preemptions = Counter(
            "expertline_preemptions_total",
            "Sequences that lost their pages and start over.",
            registry=registry,
        )
        self._step_seconds = Histogram(
            "expertline_step_seconds",
            "From sending a step's plan to its last result.",
            buckets=STEP_SECONDS_BUCKETS,
            registry=registry,
        )
        self._step_tokens = Histogram(
            "expertline_step_tokens",
            "Token rows of a step, all columns.",
            buckets=STEP_TOKENS_BUCKETS,
            registry=registry,
        )
        self._repair_seconds = Histogram(
            "expertline_gang_repair_seconds",
            "From the break of the ranks' gang until steps could run again; its count is repairs.",
            buckets=REPAIR_SECONDS_BUCKETS,
            registry=registry,
        )

    def repaired(self, seconds: float) -> None:
        """The gang lost a rank, and is whole again after so long."""
        self._repair_seconds.observe(seconds)

    def step(self, seconds: float, tokens: int) -> None:
        """A step has returned."""
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(tokens)

    def state(self, running: int, waiting: int, steps_in_flight: int) -> None:
        """How things stand now."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._in_flight.set(steps_in_flight)

    def pages(self, column: int, held: int, remembered: int, free: int) -> None:
        """How the pages of one column are used now."""
        for state, count in (("held", held), ("remembered", remembered), ("free", free)):
            self._pages.labels(str(column), state).set(count)

    def prefix(self, queried_tokens: int, hit_tokens: int) -> None:
        """A prompt was looked up in the prefix cache."""
        self._queried.inc(queried_tokens)
        self._hit.inc(hit_tokens)

    def preempted(self, sequences: int = 1) -> None:
        self._preemptions.inc(sequences)

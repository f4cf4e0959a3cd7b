"""`python -m loadtest.control`: what the control plane costs, without any model.

- *lease*: CPU time of one lease at the router: its request decoded, queued, matched with the
  prefix index and granted, the grant encoded; and its release, decoded and booked.
- *plan*: the scheduler's plan of a step for many decoding sequences, and its taking the result.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench import machine
from loadtest.report import Distribution
from model.sampling_params import SamplingParams
from serving.engine.pages import PAGE_TOKENS
from serving.engine.plan import RankResult, Sample, StepPlan, StepResult
from serving.engine.request import Request
from serving.engine.scheduler import EngineLimits, Scheduler
from serving.fleet import ROUTER_CODEC, EngineHello, LeaseGrant, LeaseRelease, LeaseRequest
from serving.router.fair_queue import FairQueue, Waiting
from serving.router.leases import LeaseBook
from serving.router.prefix_index import PrefixIndex

_HEADER = 4  # a frame's length stands before what `Codec.decode` takes
_PROMPT_PAGES = 32
_SHARED_PAGES = 16  # of a prompt: what it has in common with others of its prefix
_ENGINE_TOKENS = 10_000_000  # never full: what is measured is a grant


class Leases:
    """A router's books over a fleet whose prefix index is full."""

    def __init__(self, engines: int, prefixes: int, seed: int = 0) -> None:
        self._numbers = random.Random(seed)
        self._prefixes = [self._pages(_SHARED_PAGES) for _ in range(prefixes)]
        self._index = PrefixIndex(prefixes * _SHARED_PAGES)
        self._book = LeaseBook(self._index, expected_output_tokens=512)
        self._queue = FairQueue(limit=1000)
        names = [f"engine-{number}" for number in range(engines)]
        for name in names:
            self._book.join(
                EngineHello(name, "10.0.0.1", 9000, "m", _ENGINE_TOKENS, _ENGINE_TOKENS, [])
            )
        for pages in self._prefixes:
            self._index.record(pages, self._numbers.choice(names))

    def frame(self, number: int) -> bytes:
        """A request of one of the prefixes and something new after it."""
        fresh = self._pages(_PROMPT_PAGES - _SHARED_PAGES)
        pages = self._numbers.choice(self._prefixes) + fresh
        tenant = f"tenant-{number % 20}"
        request = LeaseRequest(
            f"r{number}", tenant, 0, _PROMPT_PAGES * PAGE_TOKENS, 512, pages, 30.0
        )
        return ROUTER_CODEC.frame(request)[_HEADER:]

    def grant(self, frame: bytes) -> None:
        """All that a request makes the router do, until its grant could be sent."""
        request: LeaseRequest = ROUTER_CODEC.decode(frame)
        self._queue.push(Waiting(request, "ingress", 0.0, 30.0))
        head = self._queue.head()
        assert head is not None
        lease = self._book.grant(head.request, head.ingress_id)
        assert lease is not None, "the fleet is full"
        self._queue.take(head)
        ROUTER_CODEC.frame(LeaseGrant(head.request.request_id, lease.engine_id, lease.tokens))

    def release(self, frame: bytes) -> None:
        release: LeaseRelease = ROUTER_CODEC.decode(frame)
        self._book.release(release.request_id)

    def _pages(self, count: int) -> list[bytes]:
        return [self._numbers.randbytes(16) for _ in range(count)]


def measure_leases(engines: int, prefixes: int, count: int, held: int = 1000) -> Distribution:
    """CPU µs of each of `count` leases and its release, with `held` leases at any time."""
    leases = Leases(engines, prefixes)
    for number in range(held):
        leases.grant(leases.frame(number))
    spent = []
    for number in range(held, held + count):
        asked = leases.frame(number)
        ended = ROUTER_CODEC.frame(LeaseRelease(f"r{number - held}"))[_HEADER:]
        spent.append(1e6 * _cpu(lambda a=asked: leases.grant(a)))  # type: ignore[misc]
        spent[-1] += 1e6 * _cpu(lambda e=ended: leases.release(e))  # type: ignore[misc]
    return Distribution.of(spent)


def measure_plans(sequences: int, steps: int) -> tuple[Distribution, Distribution]:
    """Milliseconds of a plan for so many decoding sequences, and of taking its result."""
    pages = sequences * (-(-(steps + 80) // PAGE_TOKENS) + 1) + 1
    scheduler = Scheduler(EngineLimits(1, 1, pages, 8192, sequences, 16384))
    for number in range(sequences):
        prompt = [number % 4000] * 64
        scheduler.add(Request(f"r{number}", prompt, steps + 8, SamplingParams()))
    planned, taken = [], []
    for step in range(steps):
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned.append(1e3 * (time.perf_counter() - started))
        assert plan is not None
        result = _result(plan, step)
        started = time.perf_counter()
        scheduler.complete(result)
        taken.append(1e3 * (time.perf_counter() - started))
        if len(result.samples) < sequences:  # prompts are still being read
            planned.pop(), taken.pop()
    return Distribution.of(planned), Distribution.of(taken)


def _result(plan: StepPlan, step: int) -> StepResult:
    """What a gang would say: some token for every sequence that is to get one."""
    samples = [
        Sample(piece.id, 100 + step % 3000)
        for column in plan.columns
        for piece in column.slices
        if piece.sample
    ]
    return StepResult(plan.step, [RankResult(plan.step, 0, 0, samples=samples)])


def _cpu(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    """The command: a table, or with --json everything."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.control", description=__doc__)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=10_000)
    parser.add_argument("--leases", type=int, default=10_000)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    planned, taken = measure_plans(options.sequences, options.steps)
    found = {
        "lease_cpu_us": measure_leases(options.engines, options.prefixes, options.leases),
        "plan_ms": planned,
        "complete_ms": taken,
    }
    if options.json:
        report: dict[str, Any] = {name: asdict(spread) for name, spread in found.items()}
        about = {"command": f"python -m loadtest.control {' '.join(sys.argv[1:])}".strip()}
        print(json.dumps({**about, "machine": machine(), **report}, indent=2))
        return
    table = Table("", "count", "p50", "p99", "max")
    for name, spread in found.items():
        figures = (f"{value:.3f}" for value in (spread.p50, spread.p99, spread.max))
        table.add_row(name, str(spread.count), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()

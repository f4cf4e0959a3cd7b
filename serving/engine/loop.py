"""The step loop: plan, run, take the result, hand out tokens.

It keeps as many steps in flight as the gang has stages, sleeps when there is nothing to do, and
wakes when a request comes or a step returns. Time comes from the clock that it is given.

A gang that breaks is repaired: what was handed out by then stays, the steps in flight are
forgotten, and every sequence goes on from the tokens that it has.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import Finish, FinishReason, Output, Request
from serving.engine.scheduler import Scheduler

Emit = Callable[[Sequence[Output]], None]


class GangFailure(Exception):
    """The gang cannot run steps any more; the message says why."""


class GangBroken(Exception):
    """The steps in flight are lost, and none will run before a repair; the message says why."""


@dataclass(frozen=True, slots=True)
class Repair:
    """How a gang came to be whole again."""

    generation: int  # of its groups: the first is 0
    cells: list[str]  # whose ranks were replaced
    empty_columns: list[int]  # these have a rank whose cache is empty


class Gang(Protocol):
    """What runs the steps."""

    def submit(self, plan: StepPlan) -> None:
        """Starts a step; returns at once."""
        ...

    async def result(self) -> StepResult:
        """The next finished step, in the order of submission; waits while there is none.

        Cancelling the wait loses nothing.

        Raises:
            GangBroken: no more steps will finish before a repair.
            GangFailure: no more steps will finish.
        """
        ...

    async def repair(self) -> Repair:
        """Makes a broken gang whole; its ranks then know of no sequence.

        Raises:
            GangFailure: it cannot be repaired, or not in time, or was too often.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step went through the engine, by its clock."""

    begun: float  # its planning
    submitted: float
    finished: float

    @property
    def seconds(self) -> float:
        """From the ranks' getting it to its result."""
        return self.finished - self.submitted


class EngineObserver(Protocol):
    """Is told of every finished step, and of every repair."""

    def step_finished(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None: ...

    def gang_repaired(self, repair: Repair, seconds: float, sequences: int) -> None:
        """After so many seconds; so many sequences start over from the tokens they have."""
        ...


class EngineLoop:
    """Runs a scheduler over a gang.

    Args:
        emit: takes all that one step gave, at once.
        clock: monotonic seconds.
        repairing: called when a repair begins (with True), and when the gang is whole again.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        gang: Gang,
        emit: Emit,
        clock: Callable[[], float],
        observer: EngineObserver | None = None,
        repairing: Callable[[bool], None] = lambda begins: None,
    ) -> None:
        self._scheduler = scheduler
        self._gang = gang
        self._emit = emit
        self._clock = clock
        self._observer = observer
        self._tell_repairing = repairing
        self._news = asyncio.Event()
        self._in_flight: deque[tuple[StepPlan, float, float]] = deque()
        self._requests: set[str] = set()
        self._failure: GangFailure | None = None
        self._repairing = False
        self._progressed = clock()

    @property
    def repairing(self) -> bool:
        """Whether the gang is broken and being made whole."""
        return self._repairing

    @property
    def stalled_s(self) -> float:
        """How long nothing has come of the work that there is; 0 without any."""
        busy = self._repairing or not self._scheduler.idle
        return self._clock() - self._progressed if busy else 0.0

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            RequestError: it can never be served here.
            GangFailure: the loop has ended.
        """
        if self._failure is not None:
            raise GangFailure("the gang is lost") from self._failure
        if self._scheduler.idle:
            self._progressed = self._clock()
        self._scheduler.add(request)
        self._requests.add(request.id)
        self._news.set()

    def cancel(self, request_id: str) -> None:
        """Ends a request at once; nothing more is emitted for it."""
        self._requests.discard(request_id)
        self._scheduler.cancel(request_id)
        self._news.set()

    async def run(self) -> None:
        """Runs until cancelled.

        Raises:
            GangFailure: the gang is lost, or the engine's own books are; every running request
                was told first that it may go on elsewhere.
        """
        try:
            while True:
                self._launch()
                if not self._in_flight:
                    assert self._scheduler.idle, "requests wait, but none can be scheduled"
                    self._scheduler.check_integrity()  # the moment to see a leak
                try:
                    await self._next_event()
                except GangBroken:
                    await self._repair()
        except GangFailure as failure:
            self._give_up(failure)
            raise
        except Exception as error:  # an engine that has lost count could mix up its requests
            broken = GangFailure(f"the step loop failed: {type(error).__name__}: {error}")
            self._give_up(broken)
            raise broken from error

    def _give_up(self, failure: GangFailure) -> None:
        self._failure = failure
        lost = [Finish(i, FinishReason.MOVED, str(failure)) for i in sorted(self._requests)]
        self._requests.clear()
        self._emit(lost)

    async def _repair(self) -> None:
        """Plans nothing until the gang is whole; requests may come and go meanwhile."""
        started = self._progressed = self._clock()
        self._in_flight.clear()
        self._repairing = True
        self._tell_repairing(True)
        repair = await self._gang.repair()
        sequences = self._scheduler.restart(repair.empty_columns)
        self._progressed = self._clock()
        self._repairing = False
        self._tell_repairing(False)
        if self._observer is not None:
            self._observer.gang_repaired(repair, self._progressed - started, sequences)

    def _launch(self) -> None:
        while len(self._in_flight) < self._scheduler.limits.stages:
            begun = self._clock()
            plan = self._scheduler.schedule()
            if plan is None:
                return
            self._in_flight.append((plan, begun, self._clock()))
            self._gang.submit(plan)

    async def _next_event(self) -> None:
        """Takes the next result, or returns early when there may be room for a new step.

        Waits for the gang even with no step in flight, so as to hear of its end.
        """
        if len(self._in_flight) == self._scheduler.limits.stages:
            self._finish(await self._gang.result())
            return
        self._news.clear()
        result = asyncio.ensure_future(self._gang.result())
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait((result, news), return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
            if not result.done():
                result.cancel()
        if result.done() and not result.cancelled():
            self._finish(result.result())

    def _finish(self, result: StepResult) -> None:
        plan, begun, submitted = self._in_flight.popleft()
        assert plan.step == result.step, "steps come back in order"
        self._progressed = self._clock()
        outputs = self._scheduler.complete(result)
        for output in outputs:
            if output.ends:
                self._requests.discard(output.request_id)
        if outputs:
            self._emit(outputs)
        if self._observer is not None:
            times = StepTimes(begun, submitted, self._progressed)
            self._observer.step_finished(plan, result, times)

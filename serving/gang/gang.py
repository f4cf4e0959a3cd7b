"""The engine's side of a gang: start it, feed it steps, collect results, see it break, repair it.

A break is the loss of a rank, a group that fails, or a step that does not come back; until the
repair, no step is run.
"""

import asyncio
from collections import deque

from serving.engine.loop import GangBroken, GangFailure, Repair
from serving.engine.plan import RankResult, StepPlan, StepResult
from serving.gang.members import GangStartError, Members, Progress
from serving.gang.messages import GANG_CODEC, RankSpec
from serving.gang.repair import Forming, GangBounds, Launcher
from serving.wire import WireError

_LOOKS = 8  # of the watchdog, in the time that a step may take


class Gang:
    """A running group of `stages` × `ranks` rank processes; implements the loop's `Gang`."""

    def __init__(
        self, launcher: Launcher, secret: bytes, stages: int, ranks: int, bounds: GangBounds
    ) -> None:
        self._launcher = launcher
        self._secret = secret
        self._size = stages * ranks
        self._bounds = bounds
        self._members = Members(secret, stages, ranks, self._collect)
        self._forming: Forming | None = None
        self._partial: dict[int, list[RankResult]] = {}
        self._results: deque[StepResult] = deque()
        self._submitted = 0
        self._finished = 0
        self._watches: list[asyncio.Task[None]] = []

    async def listen(self, host: str) -> int:
        """Opens the port that ranks connect to; its number goes into their specs."""
        return await self._members.listen(host)

    async def start(
        self, specs: list[RankSpec], timeout_s: float, progress: Progress | None = None
    ) -> None:
        """Launches the ranks and waits until all have loaded.

        Args:
            progress: called with (bytes read, bytes to read) of the whole gang.

        Raises:
            GangStartError: a rank failed or did not get ready in time; the gang is stopped.
        """
        self._members.progress = progress or self._members.progress
        by_cell = {(spec.stage, spec.rank): spec for spec in specs}
        self._forming = Forming(self._members, self._launcher, self._secret, self._bounds, by_cell)
        self._watches.append(asyncio.create_task(self._watch_launcher(), name="gang-watch"))
        try:
            async with asyncio.timeout(timeout_s):
                await self._forming.start()
        except TimeoutError as error:
            raise GangStartError(f"ranks were not ready after {timeout_s:g} s") from error
        finally:
            if not self._members.started:
                await self.stop()
        self._watches.append(asyncio.create_task(self._watch_steps(), name="gang-watchdog"))

    @property
    def metrics_addresses(self) -> list[str]:
        """Where each rank's own metrics are served."""
        here = self._members.here
        return [here[cell].hello.metrics_address for cell in sorted(here)]

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to every rank: one encoding per column, the same bytes to its stages."""
        if self._members.torn is not None:
            return  # `result` tells
        self._submitted += 1
        frames = [GANG_CODEC.frame(column) for column in plan.columns]
        for (_, column), rank in self._members.here.items():
            try:
                rank.channel.send_frame(frames[column])
            except WireError:
                return  # this connection's reader has seen the end as well

    async def result(self) -> StepResult:
        """The next finished step; steps that finished before a break come first.

        Raises:
            GangBroken: no more will finish before a repair.
            GangFailure: the gang is at its end.
        """
        members = self._members
        await members.until(lambda: bool(self._results) or members.torn is not None)
        if self._results:
            return self._results.popleft()
        raise GangBroken(members.torn)

    async def repair(self) -> Repair:
        """Replaces the ranks that were lost, and forms the groups anew.

        Raises:
            GangFailure: it took too long, or was needed too often.
        """
        assert self._forming is not None, "a gang starts before it breaks"
        self._partial.clear()
        self._results.clear()
        self._submitted = self._finished = 0
        try:
            return await self._forming.repair()
        except GangFailure as failure:
            self._members.fail(failure)
            raise

    async def stop(self) -> None:
        """Ends the ranks; safe to call twice."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._members.close()
        await self._launcher.stop()

    def _collect(self, result: RankResult) -> None:
        parts = self._partial.setdefault(result.step, [])
        parts.append(result)
        if len(parts) == self._size:
            del self._partial[result.step]
            self._finished += 1
            self._results.append(StepResult(result.step, parts))
            self._members.wake()

    async def _watch_launcher(self) -> None:
        while True:
            self._members.lose(*await self._launcher.watch())

    async def _watch_steps(self) -> None:
        """Sees when no step comes back for too long, for nobody may be dead and nothing move.

        Counts its looks and not the time: an engine that stood still itself blames nobody.
        """
        timeout_s, seen, looks = self._bounds.step_timeout_s, -1, 0
        while True:
            await asyncio.sleep(timeout_s / _LOOKS)
            under_way = self._submitted > self._finished and self._members.torn is None
            looks = looks + 1 if under_way and self._finished == seen else 0
            seen = self._finished
            if looks == _LOOKS:
                looks = 0
                self._members.tear(f"no step came back for {timeout_s:g} s")

"""How ranks become a gang, and become one again after some were lost.

Both are the same: gather those who are here, launch those who are missing, let them form their
groups. Ranks that are left keep their weights; a new one loads its cell's. What can happen
meanwhile starts it again: another loss, or a rank that does not answer and has to be replaced.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serving.engine.loop import GangFailure, Repair
from serving.gang.members import Cell, Members, cell_name
from serving.gang.messages import RankSpec

_HOUR_S = 3600.0


class Launcher(Protocol):
    """Starts rank processes somewhere; each calls `run_rank(spec, secret)`."""

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        """Starts a rank for each; what is left of a cell's earlier one is ended first."""
        ...

    async def watch(self) -> tuple[Cell, str]:
        """Waits until a rank has ended by itself; returns which, and one line about it."""
        ...

    async def stop(self) -> None:
        """Ends every rank; returns when they are gone."""
        ...


@dataclass(frozen=True, slots=True)
class GangBounds:
    """How long an engine waits for its gang, and how often it repairs it."""

    step_timeout_s: float
    gather_timeout_s: float  # of a rank that has its weights, from word to answer
    respawn_timeout_s: float  # of a rank that is launched again, until it connects
    repair_timeout_s: float
    repairs_per_hour: int


class RepairBudget:
    """So many attempts in any hour; after that something is wrong that a repair does not mend."""

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_hour = per_hour
        self._clock = clock
        self._spent: deque[float] = deque()

    def spend(self) -> None:
        """Takes one.

        Raises:
            GangFailure: none is left.
        """
        now = self._clock()
        while self._spent and self._spent[0] <= now - _HOUR_S:
            self._spent.popleft()
        if len(self._spent) >= self._per_hour:
            raise GangFailure(f"the gang broke more than {self._per_hour} times in an hour")
        self._spent.append(now)


class Forming:
    """Brings a gang's ranks together.

    Args:
        specs: of every cell.
    """

    def __init__(
        self,
        members: Members,
        launcher: Launcher,
        secret: bytes,
        bounds: GangBounds,
        specs: dict[Cell, RankSpec],
    ) -> None:
        self._members = members
        self._launcher = launcher
        self._secret = secret
        self._bounds = bounds
        self._specs = specs
        self._budget = RepairBudget(bounds.repairs_per_hour)

    async def start(self) -> None:
        """Launches all ranks; returns when they are ready.

        Raises:
            GangFailure: a rank was lost.
        """
        await self._form(math.inf)
        self._members.started = True

    async def repair(self) -> Repair:
        """Makes the gang whole again.

        Raises:
            GangFailure: not in time, or too often.
        """
        timeout_s = self._bounds.repair_timeout_s
        self._budget.spend()
        try:
            async with asyncio.timeout(timeout_s):
                replaced = await self._form(self._bounds.respawn_timeout_s)
        except TimeoutError as error:
            raise GangFailure(f"the gang was not whole again after {timeout_s:g} s") from error
        return Repair(
            self._members.generation,
            [cell_name(cell) for cell in sorted(replaced)],
            sorted({rank for _, rank in replaced}),
        )

    async def _form(self, respawn_timeout_s: float) -> set[Cell]:
        """Goes through generations until one is ready; returns the cells that were launched."""
        members, launched = self._members, set[Cell]()
        while True:
            members.gather()
            await self._assemble(launched, respawn_timeout_s)
            members.form()
            await members.until(lambda: members.torn is not None or members.ready)
            if members.torn is None:
                return launched
            self._budget.spend()

    async def _assemble(self, launched: set[Cell], respawn_timeout_s: float) -> None:
        """Waits until a rank of every cell has gathered, replacing those who are lost."""
        members, clock = self._members, asyncio.get_running_loop().time
        answer_by = clock() + self._bounds.gather_timeout_s
        connect_by: dict[Cell, float] = {}
        while not members.gathered:
            if missing := members.missing:
                if launched.intersection(missing):
                    self._budget.spend()
                members.launched.update(missing)
                launched.update(missing)
                await self._launcher.launch([self._specs[cell] for cell in missing], self._secret)
                connect_by |= dict.fromkeys(missing, clock() + respawn_timeout_s)
            late = min((by for c, by in connect_by.items() if c not in members.here), default=None)
            until = min(late or math.inf, answer_by if members.silent else math.inf)
            try:
                async with asyncio.timeout_at(until if until < math.inf else None):
                    await members.until(lambda: members.gathered or bool(members.missing))
            except TimeoutError:
                if late is not None and clock() >= late:
                    cells = [c for c, by in connect_by.items() if c not in members.here]
                    raise GangFailure(
                        f"rank {cell_name(cells[0])} did not come back in {respawn_timeout_s:g} s"
                    ) from None
                for cell in members.silent:
                    members.lose(cell, f"rank {cell_name(cell)} does not answer")

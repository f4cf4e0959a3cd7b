"""Scenario after scenario, each on a server that is new or still as good as new."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx

from loadtest.chaos.arena import Arena, timed
from loadtest.chaos.census import Census, census
from loadtest.chaos.golden import Golden, record
from loadtest.chaos.node_server import running_on_nodes
from loadtest.chaos.outcome import Outcome
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import MODEL, Layout, Server, running
from loadtest.chaos.waiting import ChaosError
from loadtest.chaos.workload import cases
from loadtest.transcript import Transcript

Report = Callable[[dict[str, Outcome]], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything.

    Attributes:
        cases: different requests; the load goes through them again and again.
        quick: few faults of each scenario.
        served: requests of a round that are sent after the recovery.
        results: name of the files that results are written to.
    """

    seed: int
    quick: bool
    cases: int
    served: int
    results: str

    def faults(self, scenario: Scenario) -> int:
        return scenario.quick_faults if self.quick else scenario.faults


@dataclass(frozen=True)
class _Stage:
    """A running server, and what it answers undisturbed."""

    server: Server
    client: httpx.AsyncClient
    census: Census
    golden: Golden


@dataclass
class Suite:
    """Runs scenarios; `report` is told after each of them."""

    plan: Plan
    report: Report
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _alone: list[Transcript] | None = None

    async def run(self, scenarios: Sequence[Scenario]) -> None:
        """All of them, those of one layout on one server as long as it is unhurt."""
        waiting = list(scenarios)
        while waiting:
            layout = waiting[0].laid_out(self.plan.quick)
            group = [s for s in waiting if s.laid_out(self.plan.quick) == layout]
            done = await self._group(layout, group)
            waiting = [scenario for scenario in waiting if scenario not in done]

    async def _group(self, layout: Layout, group: Sequence[Scenario]) -> list[Scenario]:
        """Those of a group that one server lasted for; at least the first."""
        done: list[Scenario] = []
        async with AsyncExitStack() as stack:
            stage: _Stage | None = None
            for scenario in group:
                outcome = Outcome(scenario.name, str(layout))
                self.outcomes[scenario.name] = outcome
                done.append(scenario)
                outcome.skipped = scenario.refusal()
                if outcome.skipped is None:
                    async with timed(outcome):
                        try:
                            if stage is None:
                                stage = await stack.enter_async_context(self._stage(layout))
                            await self._play(scenario, stage, outcome)
                        except ChaosError as error:
                            outcome.broken = str(error)
                        except Exception as error:  # of the suite itself: the others still run
                            outcome.broken = f"{type(error).__name__}: {error}"
                self.report(self.outcomes)
                if outcome.broken or outcome.kept:
                    break
        return done

    @asynccontextmanager
    async def _stage(self, layout: Layout) -> AsyncIterator[_Stage]:
        start = running_on_nodes if layout.nodes else running
        async with start(layout) as server, census(server) as counted:
            calls = cases(self.plan.seed, MODEL, self.plan.cases)
            golden = await record(server.url, calls, self._alone)
            self._alone = golden.alone
            async with httpx.AsyncClient(trust_env=False) as client:
                yield _Stage(server, client, counted, golden)

    async def _play(self, scenario: Scenario, stage: _Stage, outcome: Outcome) -> None:
        golden = stage.golden
        outcome.notes |= {
            "tokens per second": round(golden.tokens_per_second, 1),
            "unsteady cases left out": golden.unsteady,
        }
        arena = Arena(
            stage.server,
            stage.client,
            stage.census,
            golden,
            outcome,
            self.plan.faults(scenario),
            self.plan.seed,
            scenario.share,
            self.plan.served,
        )
        outcome.notes["requests per second"] = round(arena.rate, 2)
        await arena.remember()
        await scenario.play(arena)

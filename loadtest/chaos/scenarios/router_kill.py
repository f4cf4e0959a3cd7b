"""The router dies: nothing fails, and little is delayed."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.faults import Kill
from loadtest.chaos.load import first_tokens
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import Layout
from loadtest.report import Distribution

FAILED = "router kill, requests failed"
EXTRA = "router kill, extra time to first token, p99 ms"


class RouterKill(Scenario):
    """Time to first token of what is sent while there is no router, beside what is sent before
    its death and after its return, in the same rounds."""

    name = "router-kill"
    layout = Layout(stages=2, ranks=2)
    quick_layout = Layout(engines=2)  # that of other quick ones
    share = 0.3

    async def play(self, arena: Arena) -> None:
        undisturbed: list[float] = []
        disturbed: list[list[float]] = []
        for _ in range(arena.count):
            blow = await arena.blow(Kill(arena.rng, "router"))
            undisturbed += first_tokens(blow.records, 0.0, blow.at)
            undisturbed += first_tokens(blow.records, blow.recovered, float("inf"))
            disturbed.append(first_tokens(blow.records, blow.at, blow.recovered))
            failed = sum(record.error is not None for record in blow.records)
            arena.outcome.measured(FAILED, failed)
        usual = Distribution.of(undisturbed).p99
        for some in disturbed:
            if some:
                arena.outcome.measured(EXTRA, 1000 * max(0.0, Distribution.of(some).p99 - usual))

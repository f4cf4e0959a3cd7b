"""A changed configuration under load: every replica is replaced and nobody notices."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.operations import Redeployment
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import Layout

SECONDS = "rolling update, s until all is replaced"


class RollingUpdate(Scenario):
    """Two engines, so that one serves while the other is replaced."""

    name = "rolling-update"
    layout = Layout(stages=2, ranks=2, engines=2)
    quick_layout = Layout(engines=2)
    share = 0.3
    faults = 2
    quick_faults = 1

    async def play(self, arena: Arena) -> None:
        for _ in range(arena.count):
            blow = await arena.blow(Redeployment(arena.rng))
            arena.outcome.measured(SECONDS, blow.recovered - blow.at)

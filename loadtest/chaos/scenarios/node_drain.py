"""A node is drained under load and taken away: nobody notices."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.node_faults import DrainNode
from loadtest.chaos.scenario import NodeScenario
from loadtest.chaos.server import Layout

SECONDS = "node drain, s until whole again"


class NodeDrain(NodeScenario):
    """Two engines of two stages over three nodes."""

    name = "node-drain"
    layout = Layout(stages=2, engines=2, ingresses=2, nodes=True)
    share = 0.2
    faults = 2
    quick_faults = 1

    async def play(self, arena: Arena) -> None:
        for _ in range(arena.count):
            blow = await arena.blow(DrainNode(arena.rng))
            arena.outcome.measured(SECONDS, blow.recovered - blow.at)

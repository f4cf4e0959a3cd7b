"""A node is lost under load: cut off, without raylet, without power."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.load import silences
from loadtest.chaos.node_faults import KillRaylet, PowerOff, Unplug
from loadtest.chaos.scenario import NodeScenario
from loadtest.chaos.schedule import draw
from loadtest.chaos.server import Layout

PAUSE = "node loss, pause s"


class NodeLoss(NodeScenario):
    """Two engines of two stages over three nodes, any of which may be hit by each loss."""

    name = "node-loss"
    layout = Layout(stages=2, engines=2, ingresses=2, nodes=True)
    share = 0.2
    faults = 3
    quick_faults = 1

    async def play(self, arena: Arena) -> None:
        losses = [KillRaylet(arena.rng), PowerOff(arena.rng), Unplug(arena.rng)]
        for loss in draw(losses, arena.count, arena.seed):
            blow = await arena.blow(loss)
            pauses = silences(blow.records, blow.at)
            if pauses:
                arena.outcome.measured(PAUSE, max(pauses))

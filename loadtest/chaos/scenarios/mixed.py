"""Everything, in an order drawn from the seed."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.faults import Fault, Freeze, FullDisk, Hoarder, Kill, Wedge
from loadtest.chaos.operations import Drain, Redeployment
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.schedule import draw
from loadtest.chaos.server import Layout

RECOVERY = "mixed, s until whole again"


class Mixed(Scenario):
    """Two engines of two stages, two ingresses: whatever dies, there is another."""

    name = "mixed"
    layout = Layout(stages=2, engines=2, ingresses=2)
    share = 0.3
    faults = 13

    async def play(self, arena: Arena) -> None:
        possible = []
        for fault in kinds(arena):
            if (refusal := fault.refusal(arena.server)) is None:
                possible.append(fault)
            else:
                arena.outcome.notes[f"left out: {fault.name}"] = refusal
        for fault in draw(possible, arena.count, arena.seed):
            blow = await arena.blow(fault)
            arena.outcome.measured(RECOVERY, blow.recovered - blow.at)


def kinds(arena: Arena) -> list[Fault]:
    """Every fault that one machine allows."""
    rng = arena.rng
    killed = [Kill(rng, role) for role in ("rank", "engine", "router", "ingress", "controller")]
    frozen = [Freeze(rng, role) for role in ("rank", "engine", "router")]
    others = [Wedge(rng), FullDisk(rng), Hoarder(rng), Redeployment(rng), Drain(rng)]
    return [*killed, *frozen, *others]

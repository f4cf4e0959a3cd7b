"""An engine replica dies; its streams go on at the other one."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.faults import Kill
from loadtest.chaos.load import silences
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import Layout

PAUSE = "engine kill, pause s"
_STREAMS = 3  # so that some are on the one that dies


class EngineKill(Scenario):
    """Two replicas, one of which is killed again and again."""

    name = "engine-kill"
    layout = Layout(stages=2, ranks=2, engines=2)
    quick_layout = Layout(engines=2)
    share = 0.3

    async def play(self, arena: Arena) -> None:
        for _ in range(arena.count):
            blow = await arena.blow(Kill(arena.rng, "engine"), _STREAMS)
            pauses = silences(blow.records, blow.at)
            if pauses:
                arena.outcome.measured(PAUSE, max(pauses))

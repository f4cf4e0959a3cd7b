"""A rank dies under its running streams: repaired within its gang, beside a whole restart."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.faults import Kill
from loadtest.chaos.load import silences
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import Layout

PAUSE = "rank kill, pause s"
RESTART = "replica restart, pause s"
_ROUNDS_OF_A_RESTART = 3


class RankKill(Scenario):
    """One replica, so that nobody can take over. Every third round the engine itself is killed,
    which is what a repair is to be faster than."""

    name = "rank-kill"
    layout = Layout(stages=2, ranks=2)

    async def play(self, arena: Arena) -> None:
        for number in range(arena.count):
            blow = await arena.blow(Kill(arena.rng, "rank"))
            for pause in _longest(silences(blow.records, blow.at)):
                arena.outcome.measured(PAUSE, pause)
            if number % _ROUNDS_OF_A_RESTART == 0:
                blow = await arena.blow(Kill(arena.rng, "engine"))
                for pause in _longest(silences(blow.records, blow.at)):
                    arena.outcome.measured(RESTART, pause)


def _longest(pauses: list[float]) -> list[float]:
    """Of all streams that ran, the one that waited longest; none if none went on."""
    return [max(pauses)] if pauses else []

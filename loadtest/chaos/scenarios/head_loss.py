"""The head dies and comes back while clients are served; afterwards the cluster heals as before."""

from loadtest.chaos.arena import Arena
from loadtest.chaos.faults import Kill
from loadtest.chaos.load import silences
from loadtest.chaos.node_faults import HeadLoss as Loss
from loadtest.chaos.redis_store import why_no_redis
from loadtest.chaos.scenario import NodeScenario
from loadtest.chaos.server import Layout

PAUSE = "head loss, pause s"
_LOAD_S = 60.0


class HeadLoss(NodeScenario):
    """GCS keeps what it knows in a Redis. After each loss an engine is killed: only a control
    plane that works replaces it."""

    name = "head-loss"
    layout = Layout(stages=2, engines=2, ingresses=2, nodes=True, redis=True)
    share = 0.2
    faults = 2
    quick_faults = 1

    def refusal(self) -> str | None:
        return super().refusal() or why_no_redis()

    async def play(self, arena: Arena) -> None:
        for _ in range(arena.count):
            blow = await arena.blow(Loss(arena.rng), least_s=_LOAD_S)
            pauses = silences(blow.records, blow.at)
            if pauses:
                arena.outcome.measured(PAUSE, max(pauses))
            await arena.blow(Kill(arena.rng, "engine"))

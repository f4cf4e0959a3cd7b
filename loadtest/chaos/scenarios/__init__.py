"""Every scenario of the suite, in the order in which they are run."""

from collections.abc import Sequence

from loadtest.chaos.scenario import Scenario
from loadtest.chaos.scenarios.disconnect import Disconnect
from loadtest.chaos.scenarios.engine_kill import EngineKill
from loadtest.chaos.scenarios.head_loss import HeadLoss
from loadtest.chaos.scenarios.mixed import Mixed
from loadtest.chaos.scenarios.node_drain import NodeDrain
from loadtest.chaos.scenarios.node_loss import NodeLoss
from loadtest.chaos.scenarios.rank_kill import RankKill
from loadtest.chaos.scenarios.rolling_update import RollingUpdate
from loadtest.chaos.scenarios.router_kill import RouterKill

SCENARIOS: Sequence[Scenario] = (
    Disconnect(),
    RouterKill(),
    RankKill(),
    EngineKill(),
    RollingUpdate(),
    Mixed(),
    NodeDrain(),
    NodeLoss(),
    HeadLoss(),
)

"""How an engine leaves: nothing new, what runs is finished or handed over, and then it is gone.

Three things can make it leave. Serve stops the replica (an update, a scale-down, the end): then
Serve ends the process once no call is open. Somebody asks it to: then it ends by itself, and
Serve starts another. A node of its gang is about to go: if it is the engine's own, Serve starts
another engine first and then stops this one; of any other Serve knows nothing, and the engine
leaves by itself. Until it has to stop, an engine on such a node is the router's last resort.

Plain arithmetic on facts and a clock that are given; `serving.node` finds the facts out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from serving.fleet import Condition

NODE_MARGIN_S = 5.0  # before a node's deadline, everything has been handed over


class Streams(Protocol):
    """What a departure does to the engine's requests; `serving.token_streams` does it."""

    condition: Condition

    @property
    def requests(self) -> list[str]: ...

    def move(self, request_ids: list[str], reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of this engine's surroundings."""

    stopping: bool = False  # Serve has told the replica to stop
    own_node: str = ""
    gang_nodes: frozenset[str] = frozenset()
    draining: Mapping[str, float] | None = None  # node → seconds that it has left


@dataclass(frozen=True, slots=True)
class _Notice:
    """A reason to leave."""

    by: float  # when what still runs is handed over
    stopping: bool  # nothing new from now on; else only as a last resort
    leaves: bool  # nobody but the engine ends the engine


class Departure:
    """Of one engine.

    Args:
        budget_s: what running requests get to finish here.
        clock: monotonic seconds.
    """

    def __init__(self, streams: Streams, budget_s: float, clock: Callable[[], float]) -> None:
        self._streams = streams
        self._budget_s = budget_s
        self._clock = clock
        self._notices: dict[str, _Notice] = {}

    @property
    def reason(self) -> str:
        """Why it leaves; empty while it does not."""
        return ", ".join(self._notices)

    def ask(self) -> None:
        """Somebody wants it to leave."""
        self._notice("asked", self._budget_s, stopping=True, leaves=True)

    def advance(self, facts: Facts) -> bool:
        """Does what is due by now; whether the engine has nothing left and must end itself."""
        if facts.stopping:
            self._notice("stopped", self._budget_s, stopping=True, leaves=False)
        self._heed_nodes(facts)
        if not self._notices:
            if self._streams.condition in (Condition.DRAINING, Condition.STOPPING):
                self._streams.condition = Condition.SERVING  # the node stays after all
            return False
        notices = self._notices.values()
        late = self._clock() >= min(notice.by for notice in notices)
        leaves = any(notice.leaves for notice in notices)
        requests = self._streams.requests
        stopping = late or any(notice.stopping for notice in notices) or (leaves and not requests)
        condition = Condition.STOPPING if stopping else Condition.DRAINING
        if self._streams.condition is not condition:
            self._streams.condition = condition
        if late and requests:
            self._streams.move(requests, "drain")
        return leaves and stopping and not requests

    def _heed_nodes(self, facts: Facts) -> None:
        left = {n: s for n, s in (facts.draining or {}).items() if n in facts.gang_nodes}
        if facts.draining is not None and not left:
            self._notices.pop("node", None)
        if not left:
            return
        within_s = min(left.values()) - NODE_MARGIN_S
        leaves = facts.own_node not in left
        if leaves:
            within_s = min(within_s, self._budget_s)
        self._notice("node", within_s, stopping=False, leaves=leaves)

    def _notice(self, reason: str, within_s: float, stopping: bool, leaves: bool) -> None:
        """Takes note of a reason; one that is known already gives no more time than before."""
        by = self._clock() + within_s
        if reason in self._notices:
            by = min(by, self._notices[reason].by)
        self._notices[reason] = _Notice(by, stopping, leaves)

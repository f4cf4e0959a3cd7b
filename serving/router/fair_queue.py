"""Requests that wait for an engine: by priority, then in turn among tenants, bounded."""

from collections import OrderedDict, deque
from dataclasses import dataclass

from serving.fleet import LeaseRequest


@dataclass(slots=True)
class Waiting:
    """A request in the queue."""

    request: LeaseRequest
    ingress_id: str
    since: float
    deadline: float
    gone: bool = False  # answered or cancelled; skipped when its turn comes


class FairQueue:
    """First the lowest priority number; among equals, one request of each tenant in turn."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tenants: dict[int, OrderedDict[str, deque[Waiting]]] = {}
        self._by_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def full(self) -> bool:
        return len(self._by_id) >= self._limit

    def push(self, waiting: Waiting) -> None:
        tenants = self._tenants.setdefault(waiting.request.priority, OrderedDict())
        tenants.setdefault(waiting.request.tenant, deque()).append(waiting)
        self._by_id[waiting.request.request_id] = waiting

    def head(self) -> Waiting | None:
        """Whose turn it is; stays in the queue until `take`."""
        for priority in sorted(self._tenants):
            tenants = self._tenants[priority]
            while tenants:
                tenant, queue = next(iter(tenants.items()))
                while queue and queue[0].gone:
                    queue.popleft()
                if queue:
                    return queue[0]
                del tenants[tenant]
            del self._tenants[priority]
        return None

    def take(self, waiting: Waiting) -> None:
        """Removes the head and gives the next turn to another tenant."""
        tenants = self._tenants[waiting.request.priority]
        tenants[waiting.request.tenant].popleft()
        tenants.move_to_end(waiting.request.tenant)
        del self._by_id[waiting.request.request_id]

    def drop(self, request_id: str) -> Waiting | None:
        """Removes a request wherever it stands; None if it is not here."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            waiting.gone = True
        return waiting

    def expired(self, now: float) -> list[Waiting]:
        """Those whose deadline has passed, removed."""
        late = [waiting for waiting in self._by_id.values() if waiting.deadline <= now]
        for waiting in late:
            self.drop(waiting.request.request_id)
        return late

    def of_ingress(self, ingress_id: str) -> list[str]:
        return [key for key, value in self._by_id.items() if value.ingress_id == ingress_id]

    def next_deadline(self) -> float | None:
        return min((waiting.deadline for waiting in self._by_id.values()), default=None)

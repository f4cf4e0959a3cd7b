"""Requests that wait for an engine: by priority, then in turn among tenants, bounded.

Before them all go those that an engine began and another must finish: somebody reads them.
"""

from collections import OrderedDict
from dataclasses import dataclass

from serving.fleet import LeaseRequest


@dataclass(slots=True)
class Waiting:
    """A request in the queue."""

    request: LeaseRequest
    ingress_id: str
    since: float
    deadline: float

    @property
    def line(self) -> tuple[bool, int]:
        """Which line it stands in; the lowest is served first."""
        return not self.request.continued, self.request.priority


class FairQueue:
    """First the lowest priority number; among equals, one request of each tenant in turn."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # line → tenant, whose turn it is first → request id, oldest first
        self._lines: dict[tuple[bool, int], OrderedDict[str, OrderedDict[str, Waiting]]] = {}
        self._by_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def overfull(self) -> bool:
        """Whether the last one to come must be refused."""
        return len(self._by_id) > self._limit

    def push(self, waiting: Waiting) -> None:
        """Takes the last place of its tenant; gives up the one that the same request had."""
        request = waiting.request
        self.drop(request.request_id)
        tenants = self._lines.setdefault(waiting.line, OrderedDict())
        tenants.setdefault(request.tenant, OrderedDict())[request.request_id] = waiting
        self._by_id[request.request_id] = waiting

    def head(self) -> Waiting | None:
        """Whose turn it is; stays in the queue until `take`."""
        if not self._lines:
            return None
        first_tenant = next(iter(self._lines[min(self._lines)].values()))
        return next(iter(first_tenant.values()))

    def take(self, waiting: Waiting) -> None:
        """Removes the head and gives the next turn to another tenant."""
        self.drop(waiting.request.request_id)
        tenants = self._lines.get(waiting.line, OrderedDict())
        if waiting.request.tenant in tenants:
            tenants.move_to_end(waiting.request.tenant)

    def drop(self, request_id: str) -> Waiting | None:
        """Removes a request wherever it stands; None if it is not here."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        line, tenant = waiting.line, waiting.request.tenant
        tenants = self._lines[line]
        del tenants[tenant][request_id]
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del self._lines[line]
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

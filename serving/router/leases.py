"""Who may run where: reservations of cache tokens on each engine, and the choice among engines.

Pure bookkeeping: no sockets, no clock, no tensors. A lease reserves what its request is
expected to need at most; an engine that is asked for more than it has preempts, so a wrong
guess costs time and not an answer.
"""

from dataclasses import dataclass, field

from serving.engine.pages import PAGE_TOKENS
from serving.engine.request import EngineStats
from serving.fleet import EngineHello, LeaseRequest
from serving.router.prefix_index import PrefixIndex


class NeverFits(Exception):
    """No engine of the fleet could ever hold the request; the message says why."""


@dataclass(slots=True)
class Lease:
    """One request's claim on one engine."""

    engine_id: str
    ingress_id: str
    tokens: int


@dataclass(slots=True)
class EngineView:
    """An engine as the router sees it."""

    hello: EngineHello
    stats: EngineStats | None = None
    reserved_tokens: int = 0


@dataclass(slots=True)
class LeaseBook:
    """All engines, all leases, and the rule that matches them.

    An engine's cost for a request is the tokens of work in front of it: what is reserved there
    already, plus the part of the prompt that it has not cached. The cheapest engine with room
    wins, so affinity to a prefix yields once the other engines are emptier by more than it saves.
    """

    index: PrefixIndex
    expected_output_tokens: int
    engines: dict[str, EngineView] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)

    def join(self, hello: EngineHello) -> EngineView:
        """An engine is here; if it was before, it has connected anew and keeps its leases."""
        known = self.engines.get(hello.engine_id)
        view = EngineView(hello, reserved_tokens=known.reserved_tokens if known else 0)
        self.engines[hello.engine_id] = view
        return view

    def leave(self, view: EngineView) -> None:
        """The engine is gone, unless it has connected anew; leases on it are void."""
        engine_id = view.hello.engine_id
        if self.engines.get(engine_id) is not view:
            return
        del self.engines[engine_id]
        self.index.forget(engine_id)
        for request_id in [k for k, v in self.leases.items() if v.engine_id == engine_id]:
            del self.leases[request_id]

    def grant(self, request: LeaseRequest, ingress_id: str) -> Lease | None:
        """Reserves room on the best engine; None when none has room now.

        Raises:
            NeverFits: longer than any engine of the fleet can hold.
        """
        total = request.prompt_tokens + request.max_tokens
        longest = max((v.hello.max_request_tokens for v in self.engines.values()), default=total)
        if total > longest:
            raise NeverFits(f"prompt and output of {total} tokens exceed the limit of {longest}")
        self.release(request.request_id)  # asked for twice, held once
        need = request.prompt_tokens + min(request.max_tokens, self.expected_output_tokens)
        engine = self._cheapest(request, need, total)
        if engine is None:
            return None
        lease = Lease(engine.hello.engine_id, ingress_id, need)
        engine.reserved_tokens += need
        self.leases[request.request_id] = lease
        self.index.record(request.page_hashes, lease.engine_id)
        return lease

    def release(self, request_id: str) -> None:
        lease = self.leases.pop(request_id, None)
        if lease is not None and lease.engine_id in self.engines:
            self.engines[lease.engine_id].reserved_tokens -= lease.tokens

    def release_ingress(self, ingress_id: str) -> None:
        """An ingress is gone, and all its requests with it."""
        for request_id in [k for k, v in self.leases.items() if v.ingress_id == ingress_id]:
            self.release(request_id)

    def _cheapest(self, request: LeaseRequest, need: int, total: int) -> EngineView | None:
        hits = self.index.hits(request.page_hashes)
        best: tuple[int, EngineView] | None = None
        for engine_id, engine in self.engines.items():
            reserved, capacity = engine.reserved_tokens, engine.hello.total_tokens
            if total > engine.hello.max_request_tokens:
                continue
            if reserved and reserved + need > capacity:
                continue
            cost = reserved - hits.get(engine_id, 0) * PAGE_TOKENS
            if best is None or cost < best[0]:
                best = (cost, engine)
        return best[1] if best else None

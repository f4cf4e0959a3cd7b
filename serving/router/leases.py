"""Who may run where: reservations of cache tokens on each engine, and the choice among engines.

Pure bookkeeping: no sockets, no clock, no tensors. A lease reserves what its request is
expected to need at most; an engine that is asked for more than it has preempts, so a wrong
guess costs time and not an answer.
"""

from dataclasses import dataclass, field

from serving.engine.pages import PAGE_TOKENS
from serving.engine.request import EngineStats
from serving.fleet import Condition, EngineHello, LeaseRequest
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
    condition: Condition = Condition.SERVING
    missed: int = 0  # beats of the router since it was last heard
    silent: bool = False  # for so long that it may be gone
    reserved_tokens: int = 0

    @property
    def serving(self) -> bool:
        return self.condition is Condition.SERVING and not self.silent


@dataclass(slots=True)
class LeaseBook:
    """All engines, all leases, and the rule that matches them.

    Engines that serve come first; with none, one that drains is better than none at all, and one
    that is under repair is waited for.

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
        held = (x.tokens for x in self.leases.values() if x.engine_id == hello.engine_id)
        view = self.engines[hello.engine_id] = EngineView(hello, reserved_tokens=sum(held))
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
        engines = self._candidates(total)
        others = [engine for engine in engines if engine.hello.engine_id != request.avoid]
        engine = self._cheapest(request, others) or self._cheapest(request, engines)
        return None if engine is None else self.hold(request, ingress_id, engine.hello.engine_id)

    def hold(self, request: LeaseRequest, ingress_id: str, engine_id: str) -> Lease:
        """Reserves what the request needs on an engine, which may be yet to come."""
        self.release(request.request_id)
        lease = Lease(engine_id, ingress_id, self._need(request))
        if engine_id in self.engines:
            self.engines[engine_id].reserved_tokens += lease.tokens
        self.leases[request.request_id] = lease
        self.index.record(request.page_hashes, engine_id)
        return lease

    def release(self, request_id: str) -> None:
        lease = self.leases.pop(request_id, None)
        if lease is not None and lease.engine_id in self.engines:
            self.engines[lease.engine_id].reserved_tokens -= lease.tokens

    def release_ingress(self, ingress_id: str) -> None:
        """An ingress is gone, and all its requests with it."""
        for request_id in [k for k, v in self.leases.items() if v.ingress_id == ingress_id]:
            self.release(request_id)

    def _need(self, request: LeaseRequest) -> int:
        return request.prompt_tokens + min(request.max_tokens, self.expected_output_tokens)

    def _candidates(self, total: int) -> list[EngineView]:
        """Engines that can hold so many tokens and serve; with none, see the class."""
        fitting = [e for e in self.engines.values() if total <= e.hello.max_request_tokens]
        serving = [engine for engine in fitting if engine.serving]
        if serving or any(engine.condition is Condition.REPAIRING for engine in fitting):
            return serving
        return [e for e in fitting if e.condition is Condition.DRAINING and not e.silent]

    def _cheapest(self, request: LeaseRequest, engines: list[EngineView]) -> EngineView | None:
        hits, need = self.index.hits(request.page_hashes), self._need(request)
        best: tuple[int, EngineView] | None = None
        for engine in engines:
            reserved, capacity = engine.reserved_tokens, engine.hello.total_tokens
            if reserved and reserved + need > capacity:
                continue
            cost = reserved - hits.get(engine.hello.engine_id, 0) * PAGE_TOKENS
            if best is None or cost < best[0]:
                best = (cost, engine)
        return best[1] if best else None

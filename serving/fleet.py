"""What ingresses, router and engines tell each other over `wire`.

    engine  → router    EngineHello once, then EngineReport when its load changes, and as a beat
    ingress → router    IngressHello, LeaseRequest, LeaseHeld, LeaseRelease
    router  → ingress   Fleet when it changes, LeaseGrant or LeaseRefusal per request
    router  → all       RouterBeat
    ingress → engine    StreamHello, Cancel
    engine  → ingress   TokenFrame: all that one step produced for this ingress; EngineBeat

A process that is stopped, or whose network is gone, closes no connection. So each side that
others wait for says something every BEAT_S; who hears nothing for long looks elsewhere.
The request itself travels in a Serve call (`GenerateCall`), which stays open until it ends.
"""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from model.sampling_params import SamplingParams
from serving.engine.request import EngineStats, Finish, PromptScores, Request, TokenOutput
from serving.wire import Codec


@dataclass(slots=True)
class EngineHello:
    """Who an engine is and what never changes about it."""

    engine_id: str  # the Serve replica's unique id
    host: str
    port: int  # where ingresses fetch their tokens
    model: str
    total_tokens: int  # of cache, all columns
    max_request_tokens: int  # longest prompt + output it can ever hold
    metrics_addresses: list[str]  # its own and its ranks'


BEAT_S = 0.5  # the longest silence of a process that is well


class Condition(StrEnum):
    """What an engine is about."""

    SERVING = "serving"
    REPAIRING = "repairing"  # its gang is being made whole; what it has waits, and goes on
    DRAINING = "draining"  # finishes or hands over what it has
    STOPPING = "stopping"  # takes nothing any more


@dataclass(slots=True)
class EngineReport:
    """An engine's load now, and what it is about."""

    stats: EngineStats
    condition: Condition = Condition.SERVING


@dataclass(slots=True)
class EngineLoading:
    """An engine that is not there yet: how far its ranks have read their weights."""

    engine_id: str
    bytes_done: int
    bytes_total: int


@dataclass(slots=True)
class IngressHello:
    """Who an ingress is, and where its metrics are."""

    ingress_id: str
    metrics_address: str


@dataclass(slots=True)
class Fleet:
    """Every engine that can be leased, and every process that has metrics."""

    engines: list[EngineHello]
    metrics_addresses: list[str]


@dataclass(slots=True)
class LeaseRequest:
    """One generation that wants an engine. Page hashes stand for the prompt: no text here."""

    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    page_hashes: list[bytes]
    deadline_s: float  # how long the client is willing to queue
    avoid: str = ""  # an engine that has just failed or sent away this very generation
    continued: bool = False  # it was admitted before, and is never turned away for a full queue


@dataclass(slots=True)
class LeaseGrant:
    """The router's word: this request on that engine, so many tokens reserved."""

    request_id: str
    engine_id: str
    reserved_tokens: int


@dataclass(slots=True)
class LeaseHeld:
    """Told to a new router: this request runs on that engine already."""

    request: LeaseRequest
    engine_id: str


@dataclass(slots=True)
class LeaseRefusal:
    """No engine for this request now: an HTTP status, and when to try again."""

    request_id: str
    status: int
    message: str
    retry_after_s: float


@dataclass(slots=True)
class LeaseRelease:
    """The request has ended, one way or another."""

    request_id: str


@dataclass(slots=True)
class RouterBeat:
    """The router is there."""


@dataclass(slots=True)
class StreamHello:
    """An ingress opens its token stream to an engine."""

    ingress_id: str


@dataclass(slots=True)
class Cancel:
    """Nobody waits for this request any more."""

    request_id: str


@dataclass(slots=True)
class EngineBeat:
    """The engine is there, and about this."""

    condition: Condition


@dataclass(slots=True)
class TokenFrame:
    """What one step gave one ingress."""

    tokens: list[TokenOutput] = field(default_factory=list)
    ended: list[Finish] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)


ROUTER_CODEC = Codec(
    EngineHello,
    EngineReport,
    EngineLoading,
    IngressHello,
    LeaseRequest,
    LeaseRelease,
    Fleet,
    LeaseGrant,
    LeaseRefusal,
    LeaseHeld,
    RouterBeat,
)
STREAM_CODEC = Codec(StreamHello, Cancel, TokenFrame, EngineBeat)


@dataclass(slots=True)
class GenerateCall:
    """A request as it travels through Serve: token ids packed, four bytes each."""

    ingress_id: str
    request_id: str
    prompt: bytes
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: list[int]
    tenant: str
    priority: int
    cache_salt: str
    generated: int = 0

    @classmethod
    def of(cls, ingress_id: str, request: Request) -> "GenerateCall":
        return cls(
            ingress_id=ingress_id,
            request_id=request.id,
            prompt=array("I", request.prompt).tobytes(),
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            stop_token_ids=sorted(request.stop_token_ids),
            tenant=request.tenant,
            priority=request.priority,
            cache_salt=request.cache_salt,
            generated=request.generated,
        )

    def request(self) -> Request:
        return Request(
            id=self.request_id,
            prompt=array("I", self.prompt).tolist(),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_token_ids=frozenset(self.stop_token_ids),
            tenant=self.tenant,
            priority=self.priority,
            cache_salt=self.cache_salt,
            generated=self.generated,
        )

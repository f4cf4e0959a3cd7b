"""What a rank and its engine tell each other, besides plans and results."""

from dataclasses import dataclass

from serving.engine.plan import RankPlan, RankResult
from serving.wire import Codec


@dataclass(slots=True)
class RankSpec:
    """All that a rank must know to become its cell; handed to it when it is launched."""

    stage: int
    rank: int
    stages: int
    ranks: int
    model_directory: str
    dtype: str
    device: str
    exchange: str
    pages: int  # of its cache, the dummy page included
    threads: int
    engine_host: str
    engine_port: int
    host: str  # this rank's own address, as its peers reach it; "" = find out
    step_timeout_s: float
    start_timeout_s: float
    targets_directory: str
    log_level: str
    quantize: str | None = None
    trace: bool = False
    fabric: str = "auto"  # auto, shared_memory or gloo; on CPUs alone

    @property
    def cell(self) -> str:
        return f"{self.stage}.{self.rank}"


@dataclass(slots=True)
class RankHello:
    """First word of a rank."""

    stage: int
    rank: int
    pid: int
    metrics_address: str


@dataclass(slots=True)
class Gather:
    """A new generation of groups begins: leave those that there are, whatever hangs in them.

    What the engine said before and the rank has not done yet is void, and so are the sequences
    that it knows.
    """

    generation: int


@dataclass(slots=True)
class RankOffer:
    """The rank is free, and this is its contribution to the rendezvous of the fabrics."""

    generation: int
    offers: dict[str, bytes]


@dataclass(slots=True)
class FormGang:
    """All ranks are here: everybody's offers, so that the fabrics can form."""

    generation: int
    offers: dict[str, bytes]


@dataclass(slots=True)
class LoadProgress:
    """How far one rank has read its weights."""

    bytes_done: int
    bytes_total: int


@dataclass(slots=True)
class RankReady:
    """Weights loaded, cache allocated, fabrics formed: plans may come."""

    generation: int


@dataclass(slots=True)
class GroupBroken:
    """A group of the rank's is of no use any more; the rank itself is well and can gather."""

    generation: int
    message: str


@dataclass(slots=True)
class RankFailed:
    """The rank cannot go on; one line says why."""

    message: str
    user_error: bool = False  # the checkpoint or the settings are wrong: a retry is of no use


GANG_CODEC = Codec(
    RankHello,
    Gather,
    RankOffer,
    FormGang,
    LoadProgress,
    RankReady,
    GroupBroken,
    RankFailed,
    RankPlan,
    RankResult,
)

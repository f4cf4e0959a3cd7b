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
    pages: int  # of its cache, the dummy page included; 0: as many as fit
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
    cache_dtype: str = "auto"  # auto (as `dtype`) or fp8
    measure: bool = False  # ask the engine for the number of pages, after telling what would fit
    memory_fraction: float = 0.9
    step_tokens: int = 512
    sequences: int = 256
    longest: int = 0  # tokens of the longest sequence
    graphs: bool = False  # of decode steps
    kernels: str = "auto"  # auto (what is the fastest there), or a kind of `model.ops.choice`
    compile: bool = False  # what is dense

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
class RankMeasured:
    """Weights loaded, and so many cache pages fit beside them and the largest step."""

    pages: int


@dataclass(slots=True)
class CacheSize:
    """All ranks have measured: what each can allocate, the dummy page included."""

    pages: int


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
    RankMeasured,
    CacheSize,
    RankReady,
    GroupBroken,
    RankFailed,
    RankPlan,
    RankResult,
)

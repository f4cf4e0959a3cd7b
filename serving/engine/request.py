"""A request as the engine knows it, and what the engine says back."""

from dataclasses import dataclass, field
from enum import StrEnum

from model.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token, or a stop token id that the client named
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    MOVED = "moved"  # over on this engine; to be continued on another


class RequestError(Exception):
    """A request that this engine can never serve; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: `n` choices of a client are `n` requests.

    One that another engine began brings what it got there along, at the end of `prompt`.
    """

    id: str
    prompt: list[int]
    max_tokens: int  # 0 only scores the prompt, which must be asked for then
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence included, unless ignored
    tenant: str = ""  # salts the prefix cache: tenants never see each other's pages
    priority: int = 0  # lower goes first
    cache_salt: str = ""  # keeps the client's own prompts apart from each other, too
    generated: int = 0  # how many of `prompt`, the last ones, are output of an earlier engine

    @property
    def prompt_tokens(self) -> int:
        """Length of the client's own prompt."""
        return len(self.prompt) - self.generated

    @property
    def cache_scope(self) -> str:
        """Whoever has the same one may share cache pages."""
        return f"{self.tenant}\0{self.cache_salt}" if self.cache_salt else self.tenant

    @property
    def scored(self) -> bool:
        """Whether the prompt's log-probabilities are wanted."""
        return self.sampling.prompt_logprobs is not None


@dataclass(slots=True)
class RequestStats:
    """What the engine did for one request; `TokenOutput` aside, all that a client is billed by."""

    prompt_tokens: int  # the client's own
    cached_tokens: int = 0  # of these, found in the prefix cache when first scheduled
    generated_tokens: int = 0  # by this engine
    preemptions: int = 0


@dataclass(slots=True)
class TokenOutput:
    """One new token of one request."""

    request_id: str
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: FinishReason | None = None
    stats: RequestStats | None = None  # with the first token and with the finish

    @property
    def ends(self) -> bool:
        return self.finish is not None


@dataclass(slots=True)
class PromptScores:
    """How likely consecutive prompt tokens were; together they cover all but the first one."""

    request_id: str
    start: int  # position of the first one
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]

    def fill(self, prompt: list[TokenOutput]) -> None:
        """Writes the scores to the prompt's own tokens."""
        places = range(self.start, self.start + len(self.logprobs))
        for place, logprob, top in zip(places, self.logprobs, self.tops, strict=True):
            prompt[place].logprob, prompt[place].top = logprob, top

    @property
    def ends(self) -> bool:
        return False


@dataclass(slots=True)
class Finish:
    """The end of a request, when it comes without a token (cancelled, failed, only scored)."""

    request_id: str
    reason: FinishReason
    message: str = ""
    stats: RequestStats | None = None

    @property
    def ends(self) -> bool:
        return True


Output = TokenOutput | PromptScores | Finish


@dataclass(slots=True)
class ColumnStats:
    """Use of one column's cache pages."""

    held: int
    remembered: int
    free: int


@dataclass(slots=True)
class EngineStats:
    """An engine's load, as the router and the metrics want it."""

    running: int
    waiting: int
    total_pages: int  # of all columns
    columns: list[ColumnStats]
    prefix_query_tokens: int  # counters from here on
    prefix_hit_tokens: int
    preemptions: int

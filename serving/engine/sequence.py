"""One generation inside an engine: its tokens, its pages, and how far it has come."""

from dataclasses import dataclass, field

from serving.engine.pages import PAGE_TOKENS
from serving.engine.plan import NewSequence, Slice
from serving.engine.prefix import HashChain
from serving.engine.request import Request, RequestStats


@dataclass(slots=True, eq=False)
class Sequence:
    """`scheduled` chases `known`; `computed` follows `scheduled` as results come back.

    Prefill, chunked prefill, decode, prefix hits, preemption and resumption are the same
    arithmetic: positions `scheduled` … `known` - 1 are still to be given to a step. When none
    are left, the sequence waits for the sample that its last position will give.
    """

    id: int
    request: Request
    arrival: int  # order of arrival, for fairness
    tokens: list[int] = field(init=False)
    chain: HashChain = field(init=False)
    stats: RequestStats = field(init=False)
    column: int = -1  # -1: waiting
    pages: list[int] = field(default_factory=list)
    scheduled: int = 0
    computed: int = 0
    named: int = 0  # leading pages whose content the pool knows by hash
    sent_tokens: int = 0  # of `tokens`, what the column was told
    sent_pages: int = 0  # of `pages`, likewise
    in_flight: int = 0  # steps that have rows of this sequence and have not returned
    scored: int = 1  # the first prompt token whose score was not handed out yet
    epoch: int = 0  # times it left a column: a step of an older epoch says nothing of the cache

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.chain = HashChain(self.request.cache_scope)
        self.stats = RequestStats(prompt_tokens=self.request.prompt_tokens)

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        """How many positions that are still to be given have pages."""
        return len(self.pages) * PAGE_TOKENS - self.scheduled

    @property
    def rank_key(self) -> tuple[int, int]:
        """Who goes first: lower priority number, then earlier arrival."""
        return self.request.priority, self.arrival

    @property
    def prompt_hashes(self) -> list[bytes]:
        """Names of the pages that may be taken from the cache: one token is always computed,
        and all of them where every prompt token's logits are wanted."""
        if self.request.scored:
            return []
        return self.chain.extend(self.tokens)[: (self.known - 1) // PAGE_TOKENS]

    def place(self, column: int, cached_pages: list[int]) -> None:
        """Starts on a column with these leading pages already in its cache."""
        self.column = column
        self.pages = cached_pages
        self.named = len(cached_pages)
        self.scheduled = self.computed = self.named * PAGE_TOKENS
        self.sent_tokens = self.sent_pages = 0

    def introduce(self) -> NewSequence:
        """What its column must know before the first slice."""
        own = self.request.prompt_tokens
        self.sent_tokens = self.known
        return NewSequence(self.id, list(self.tokens), own, self.request.sampling)

    def give(self, count: int) -> Slice:
        """The next `count` positions, for a step; with what the column was not told yet."""
        end, known = self.scheduled + count, len(self.tokens)
        piece = Slice(
            self.id,
            self.scheduled,
            count,
            self.tokens[self.sent_tokens :],
            self.pages[self.sent_pages :],
            sample=end == known and self.request.max_tokens > 0,
            score=self.request.scored and self._scores_until(end),
        )
        self.sent_tokens = known
        self.sent_pages = len(self.pages)
        self.scheduled = end
        self.in_flight += 1
        return piece

    def _scores_until(self, end: int) -> bool:
        """Whether the positions from `scheduled` on say what is not known yet of the prompt."""
        last = min(end, self.request.prompt_tokens - 1)
        return last >= max(self.scored, self.scheduled + 1)

    def displace(self) -> list[int]:
        """Leaves its column; returns the pages that it held there."""
        pages, self.pages = self.pages, []
        self.column = -1
        self.scheduled = self.computed = self.named = 0
        self.epoch += 1
        return pages

"""A scheduler over the fake gang, checked after every move."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from model.sampling_params import SamplingParams
from serving.engine import column, pages, prefix, scheduler, sequence
from serving.engine.request import (
    Finish,
    FinishReason,
    Output,
    PromptScores,
    Request,
    RequestStats,
    TokenOutput,
)
from serving.engine.scheduler import EngineLimits, Scheduler
from tests.engine.fake_gang import POISON, FakeGang, undisturbed, undisturbed_scores

SMALL_PAGE = 4
TENANTS = ("", "acme", "umbrella")


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Inside, a page is 4 tokens, so that short sequences have many."""
    with contextlib.ExitStack() as stack:
        for module in (column, pages, prefix, scheduler, sequence):
            stack.enter_context(patch.object(module, "PAGE_TOKENS", SMALL_PAGE))
        yield


def limits(
    stages: int = 1,
    columns: int = 1,
    pages: int = 65,
    step_tokens: int = 64,
    sequences: int = 16,
    model_len: int = 1000,
    prefix_cache: bool = True,
) -> EngineLimits:
    return EngineLimits(stages, columns, pages, step_tokens, sequences, model_len, prefix_cache)


def request(
    id: str,
    prompt: list[int],
    max_tokens: int = 4,
    stop: frozenset[int] = frozenset(),
    tenant: str = "",
    priority: int = 0,
    poisoned: bool = False,
    scored: bool = False,
) -> Request:
    sampling = SamplingParams(
        seed=TENANTS.index(tenant),
        top_k=POISON if poisoned else 0,
        prompt_logprobs=0 if scored else None,
    )
    return Request(id, prompt, max_tokens, sampling, stop, tenant, priority)


class Simulation:
    """Requests, what they gave, and a gang that runs when it is told to."""

    def __init__(self, limits: EngineLimits) -> None:
        self.scheduler = Scheduler(limits)
        self.gang = FakeGang(limits)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.scores: dict[str, list[float]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.final_stats: dict[str, RequestStats] = {}
        self.live: list[str] = []
        self.cancellations = 0
        self.kills = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.requests[request.id] = request
            self.tokens[request.id] = []
            self.scores[request.id] = []
            self.live.append(request.id)
            self.scheduler.check_integrity()

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)
        if request_id in self.live:
            self.live.remove(request_id)
            self.cancellations += 1
            self.reasons[request_id] = FinishReason.CANCELLED
        self.scheduler.check_integrity()

    def launch(self) -> bool:
        """Schedules a step if the pipeline has room; whether there was one."""
        if self.scheduler.steps_in_flight == self.scheduler.limits.stages:
            return False
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return False
        self.gang.submit(plan)
        return True

    def deliver(self) -> list[Output]:
        """The oldest step comes back."""
        outputs = self.scheduler.complete(self.gang.take_result())
        self.scheduler.check_integrity()
        for output in outputs:
            assert output.request_id in self.live, "news of a request that is over"
            if isinstance(output, TokenOutput):
                self.tokens[output.request_id].append(output.token)
            if isinstance(output, PromptScores):
                assert not self.tokens[output.request_id], "a score after a token"
                assert output.start == 1 + len(self.scores[output.request_id])
                self.scores[output.request_id] += output.logprobs
                continue
            reason = output.reason if isinstance(output, Finish) else output.finish
            first = isinstance(output, TokenOutput) and len(self.tokens[output.request_id]) == 1
            assert (first or reason is not None) == (output.stats is not None)
            if reason is not None and output.stats is not None:
                self.live.remove(output.request_id)
                self.reasons[output.request_id] = reason
                self.final_stats[output.request_id] = output.stats
        return outputs

    def kill(self, dead: set[tuple[int, int]]) -> None:
        """Ranks (stage, column) die and are replaced; every step that has not returned is lost."""
        self.scheduler.restart(self.gang.replace(dead))
        self.scheduler.check_integrity()
        assert not self.scheduler.steps_in_flight
        assert self.scheduler.stats().running == 0
        self.kills += 1

    def step(self) -> None:
        """One step, alone in the pipeline."""
        assert self.launch()
        self.deliver()

    def drain(self) -> None:
        """Runs with a full pipeline until nothing is left; fails if that takes forever."""
        positions = sum(len(r.prompt) + r.max_tokens for r in self.requests.values())
        bound = len(self.gang.plans) + (2 + self.kills) * self.scheduler.limits.stages * (
            positions + 1
        )
        while True:
            while self.launch():
                pass
            if not self.scheduler.steps_in_flight:
                break
            self.deliver()
            assert len(self.gang.plans) < bound, "sequences keep each other from ending"
        assert not self.live, "requests wait, but none can be scheduled"
        self.check_end()

    def check_end(self) -> None:
        """Everybody got what an undisturbed generation gives, and nothing is left behind."""
        for id, request in self.requests.items():
            expected = undisturbed(request)
            if self.reasons[id] is FinishReason.CANCELLED:
                assert self.tokens[id] == expected.tokens[: len(self.tokens[id])]
                continue
            assert (self.tokens[id], self.reasons[id]) == expected
            assert self.scores[id] == (undisturbed_scores(request) if request.scored else [])
            stats = self.final_stats[id]
            assert stats.prompt_tokens == request.prompt_tokens
            assert stats.generated_tokens == len(expected.tokens)
            assert 0 <= stats.cached_tokens <= request.prompt_tokens
            assert stats.cached_tokens < len(request.prompt)
            assert stats.cached_tokens % pages.PAGE_TOKENS == 0 or request.generated
        assert self.scheduler.idle
        totals = self.scheduler.stats()
        assert (totals.running, totals.waiting) == (0, 0)
        for use in totals.columns:
            assert use.held == 0
            assert use.remembered + use.free == self.scheduler.limits.pages_per_column - 1
        continued = any(request.generated for request in self.requests.values())
        if not (self.cancellations or continued):
            ended = self.final_stats.values()
            assert totals.preemptions == sum(s.preemptions for s in ended)
            assert totals.prefix_hit_tokens == sum(s.cached_tokens for s in ended)
            assert totals.prefix_query_tokens == sum(s.prompt_tokens for s in ended)

    def check_ranks_forget(self) -> None:
        """One more step makes every rank forget all but the sequence in it."""
        self.add(request("the last", [1], max_tokens=1))
        self.drain()
        assert len(self.gang.residents) == 1

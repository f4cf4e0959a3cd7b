"""A generation that outlives its engines: what one of them cannot finish, another continues.

The next engine gets the prompt and, as part of it, every token that came so far; it draws from
the same seed at the same positions, tells output from prompt for penalties and grammars, and so
goes on as if nothing had happened. Tokens are handed on as they come and never twice: whatever
an engine that was given up still says, nobody listens to.
"""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving.api.errors import ApiError
from serving.config import IngressSettings
from serving.engine.request import Finish, PromptScores, Request, RequestStats, TokenOutput
from serving.ingress.attempt import Attempt
from serving.ingress.fleet import FleetClient
from serving.ingress.inbox import EngineLost
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import IngressMetrics

log = get_logger("generation")
_PAUSE_S = 0.1  # before a third engine in a row is tried; then twice as long each time
_LONGEST_PAUSE_S = 2.0
_LATER = (429, 503)  # refusals that need not last


@dataclass(frozen=True, slots=True)
class Engines:
    """What it takes to have something generated.

    Args:
        handle: Serve's, of the engines' deployment.
    """

    fleet: FleetClient
    handle: Any
    metrics: IngressMetrics
    settings: IngressSettings


def rest_of(request: Request, emitted: Sequence[int], attempt: int) -> Request:
    """What is left of a generation, as a request of its own.

    Args:
        emitted: the tokens that came so far, fewer than `max_tokens` unless that is 0.
        attempt: how many there were before.
    """
    if not emitted:
        return replace(request, id=f"{request.id}.{attempt}")
    return replace(
        request,
        id=f"{request.id}.{attempt}",
        prompt=[*request.prompt, *emitted],
        generated=len(emitted),
        max_tokens=request.max_tokens - len(emitted),
        sampling=replace(request.sampling, prompt_logprobs=None),  # the scores came before
    )


class ResumableRequest:
    """One request through as many engines as it takes."""

    def __init__(self, request: Request, engines: Engines) -> None:
        self.request = request
        self._engines = engines
        self._attempt = Attempt(request, engines.fleet, engines.handle)  # the last one
        self._attempts = 1
        self._emitted = array("I")
        self._cached_tokens = 0  # of the prompt, by the first engine's account
        self._fruitless = 0  # engines in a row that gave no token
        self._lost_at = 0.0  # when the first of these was lost

    @property
    def ended(self) -> Finish | None:
        """How it ended, if that came without a token."""
        return self._attempt.inbox.ended

    async def start(self, deadline_s: float) -> None:
        """Waits for the first lease.

        Raises:
            ApiError: there is none.
        """
        await self._attempt.start(deadline_s)

    def close(self, finished: bool) -> None:
        """Ends all that is held; cancels the work unless it has finished."""
        self._attempt.close(finished)

    async def read(self) -> list[TokenOutput]:
        """Every new token; empty when the request has ended without another one.

        Raises:
            ApiError: the request failed, and nothing can continue it.
        """
        while True:
            inbox = self._attempt.inbox
            try:
                tokens = inbox.take()
            except EngineLost as lost:
                await self._resume(lost.reason)
                continue
            if tokens:
                self._take(tokens)
            elif inbox.ended is None:
                await inbox.news()
                continue
            return tokens

    async def read_scores(self, count: int) -> list[PromptScores]:
        """The prompt's scores, once all `count` tokens of it have one.

        Raises:
            ApiError: the request failed, and nothing can continue it.
        """
        while True:
            try:
                return await self._attempt.inbox.read_scores(count)
            except EngineLost as lost:
                await self._resume(lost.reason)

    def total(self, stats: RequestStats) -> RequestStats:
        """The last engine's account of its part, as one of the whole."""
        if self._attempts == 1:
            return stats
        return replace(
            stats,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self._cached_tokens,
            generated_tokens=self._attempt.request.generated + stats.generated_tokens,
        )

    def _take(self, tokens: list[TokenOutput]) -> None:
        if not self._emitted and tokens[0].stats is not None:
            self._cached_tokens = tokens[0].stats.cached_tokens
        for output in tokens:
            self._emitted.append(output.token)
        self._fruitless = 0

    async def _resume(self, reason: str) -> None:
        """Gives the engine up and sets another one to work on the rest.

        Raises:
            ApiError: too many were lost in a row, or none is to be had in time.
        """
        now = asyncio.get_running_loop().time
        settings, avoid = self._engines.settings, self._attempt.engine_id or ""
        self._attempt.close(finished=False)
        if not self._fruitless:
            self._lost_at = now()
        deadline = self._lost_at + settings.resume_timeout_s
        self._fruitless += 1
        if self._fruitless > settings.resume_attempts:
            raise self._given_up(reason)
        if self._fruitless > 1:
            pause_s = _PAUSE_S * 2.0 ** (self._fruitless - 2)
            await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
        while not await self._started(deadline - now(), avoid):
            if now() >= deadline:
                raise self._given_up(reason)
            await asyncio.sleep(_PAUSE_S)
        self._engines.metrics.resumed(reason)
        log.event(
            "INFO",
            "stream.resumed",
            request=self.request.id,
            reason=reason,
            engine=self._attempt.engine_id,
            tokens=len(self._emitted),
        )

    async def _started(self, wait_s: float, avoid: str) -> bool:
        """Whether another engine has the rest now."""
        rest = rest_of(self.request, self._emitted, self._attempts)
        self._attempts += 1
        self._attempt = Attempt(rest, self._engines.fleet, self._engines.handle)
        try:
            await self._attempt.start(max(wait_s, 0.0), avoid, continued=True)
        except ApiError as error:
            self._attempt.close(finished=True)
            if error.status not in _LATER:
                raise
            return False
        return True

    def _given_up(self, reason: str) -> ApiError:
        self._engines.metrics.given_up()
        log.event("ERROR", "stream.given_up", request=self.request.id, reason=reason)
        message = "The engine was lost, and no other one could go on with this request."
        return ApiError(503, message, retry_after_s=1)

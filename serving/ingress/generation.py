"""One generation, from lease to last character.

A generation is one choice of one prompt. Its tokens come over the engine's stream; the unary
Serve call beside it stays open for the request's life, so that Serve counts the request, drains
for it, and reports the death of what serves it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect

from model.tokenizer import Tokenizer
from serving.api.delta import Delta
from serving.api.errors import ApiError
from serving.engine.prefix import page_hashes
from serving.engine.request import (
    Finish,
    FinishReason,
    PromptScores,
    Request,
    RequestStats,
    TokenOutput,
)
from serving.fleet import GenerateCall, LeaseRequest
from serving.ingress.fleet import FleetClient, Inbox
from serving.ingress.text import TextStream
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import IngressMetrics

log = get_logger("generation")
_INLINE_TOKENS = 2048  # longer prompts are echoed from a thread


class Generation:
    """Use as an async context manager: entering acquires a lease and starts the engine's work,
    leaving ends it, whatever the reason.

    Args:
        echo: the prompt as the client wrote it, if it is to come first.
    """

    def __init__(
        self,
        request: Request,
        text: TextStream,
        echo: str | None,
        fleet: FleetClient,
        engines: Any,
        tokenizer: Tokenizer,
        metrics: IngressMetrics,
        queue_timeout_s: float,
    ) -> None:
        self.request = request
        self.stats = RequestStats(prompt_tokens=len(request.prompt))
        self._fleet = fleet
        self._engines = engines
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._queue_timeout_s = queue_timeout_s
        self._text = text
        self._echo = echo
        self._inbox: Inbox | None = None
        self._engine_id: str | None = None
        self._call: asyncio.Task[None] | None = None
        self._finished = False  # the engine has said so
        self._started = time.monotonic()
        self._last_token: float | None = None

    async def __aenter__(self) -> "Generation":
        request = self.request
        self._inbox = self._fleet.open(request.id)
        lease = LeaseRequest(
            request_id=request.id,
            tenant=request.tenant,
            priority=request.priority,
            prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
            page_hashes=page_hashes(request.prompt, request.cache_scope),
            deadline_s=self._queue_timeout_s,
        )
        try:
            self._engine_id = await self._fleet.acquire(lease)
        except BaseException:
            self._fleet.close_request(request.id, None, finished=True)
            raise
        self._metrics.leased(time.monotonic() - self._started)
        self._call = asyncio.create_task(self._hold_call(self._engine_id, self._inbox))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._fleet.close_request(self.request.id, self._engine_id, self._finished)
        if self._call is not None and not self._finished:
            self._call.cancel()
        self._metrics.released()
        self._metrics.prompt(self.stats.prompt_tokens, self.stats.cached_tokens)
        gone = exc_info[0] in (asyncio.CancelledError, ClientDisconnect)
        if gone and not (self._finished or self._text.stopped):
            self._metrics.disconnected("prefill" if self._last_token is None else "decode")

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the client may see, as it comes; the last one carries the finish reason.

        Raises:
            ApiError: the request failed and nothing can continue it.
        """
        assert self._inbox is not None
        if self._echo is not None:
            yield await self._prompt_delta(self._echo)
        while not (self._finished or self._text.stopped):
            tokens = await self._inbox.read()
            if not tokens:
                yield self._end(self._inbox.ended)
                return
            self._observe(len(tokens))
            delta = self._text.push(tokens)
            self._count(delta.tokens)
            yield delta

    async def _prompt_delta(self, written: str) -> Delta:
        """The prompt as the answer's beginning, with its log-probabilities if asked for."""
        assert self._inbox is not None
        wanted = len(self.request.prompt) - 1 if self.request.scored else 0
        scores = await self._inbox.read_scores(wanted)
        if len(self.request.prompt) > _INLINE_TOKENS:
            return await asyncio.to_thread(self._echoed, written, scores)
        return self._echoed(written, scores)

    def _echoed(self, written: str, scores: list[PromptScores]) -> Delta:
        prompt = [TokenOutput(self.request.id, token) for token in self.request.prompt]
        for some in scores:
            some.fill(prompt)
        return self._text.prompt(written, prompt, self._tokenizer)

    def _count(self, tokens: list[TokenOutput]) -> None:
        self.stats.generated_tokens += len(tokens)
        if tokens[-1].finish is not None:
            self.stats = tokens[-1].stats or self.stats
            self._finished = True

    def _end(self, ended: Finish | None) -> Delta:
        """The engine ended the request without a token: nothing was to be generated, or it
        failed."""
        self._finished = True
        if ended is not None and ended.reason is FinishReason.LENGTH:
            self.stats = ended.stats or self.stats
            return Delta(finish_reason="length")
        message = ended.message if ended is not None else ""
        raise ApiError(500, message or "The generation ended early.")

    def _observe(self, count: int) -> None:
        now = time.monotonic()
        if self._last_token is None:
            self._metrics.first_token(now - self._started)
            self._last_token = now
            count -= 1
        if count:
            self._metrics.next_tokens(count, now - self._last_token)
        self._last_token = now

    async def _hold_call(self, engine_id: str, inbox: Inbox) -> None:
        """Keeps the unary call open; its failure is the request's failure."""
        handle = self._engines.options(session_id=engine_id)
        call = GenerateCall.of(self._fleet.ingress_id, self.request)
        response = handle.generate.remote(call)
        try:
            refusal = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # Ray's and Serve's errors have no common base
            log.event("WARNING", "engine.call_failed", error=type(error).__name__)
            inbox.fail(ApiError(500, "The engine was lost while it served this request."))
            return
        if refusal is not None:
            inbox.fail(ApiError(400, refusal))

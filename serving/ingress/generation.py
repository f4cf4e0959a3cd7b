"""One generation, from lease to last character.

A generation is one choice of one prompt. Its tokens come over the engine's stream; the unary
Serve call beside it stays open for the request's life, so that Serve counts the request, drains
for it, and reports the death of what serves it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect

from model.tokenizer import Detokenizer, Tokenizer
from serving.api.answers import Delta
from serving.api.errors import ApiError
from serving.engine.prefix import page_hashes
from serving.engine.request import FinishReason, Request, RequestStats, TokenOutput
from serving.fleet import GenerateCall, LeaseRequest
from serving.ingress.fleet import FleetClient, Inbox
from serving.ingress.text import StopStrings
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import IngressMetrics

log = get_logger("generation")


class Generation:
    """Use as an async context manager: entering acquires a lease and starts the engine's work,
    leaving ends it, whatever the reason."""

    def __init__(
        self,
        request: Request,
        stops: Sequence[str],
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
        self._detokenizer = Detokenizer(tokenizer)
        self._characters = 0  # of text so far, shown or not
        self._stops = StopStrings(stops)
        self._inbox: Inbox | None = None
        self._engine_id: str | None = None
        self._call: asyncio.Task[None] | None = None
        self._finished = False  # the engine has said so
        self._stopped = False
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
            page_hashes=page_hashes(request.prompt, request.tenant),
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
        if gone and not (self._finished or self._stopped):
            self._metrics.disconnected("prefill" if self._last_token is None else "decode")

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the client may see, as it comes; the last one carries the finish reason.

        Raises:
            ApiError: the request failed and nothing can continue it.
        """
        assert self._inbox is not None
        while not (self._finished or self._stopped):
            tokens = await self._inbox.read()
            if not tokens:
                self._end(self._inbox.ended.reason if self._inbox.ended else FinishReason.ERROR)
                return
            self._observe(len(tokens))
            yield self._delta(tokens)

    def _delta(self, tokens: list[TokenOutput]) -> Delta:
        delta = Delta()
        for output in tokens:
            self.stats.generated_tokens += 1
            if output.finish is not None:
                self.stats = output.stats or self.stats
                self._finished = True
            ending = output.finish is FinishReason.STOP
            text = "" if ending else self._detokenizer.push(output.token)
            delta.tokens.append(output)
            delta.offsets.append(self._characters)
            self._characters += len(text)
            shown, self._stopped = self._stops.push(text)
            delta.text += shown
            if self._stopped:  # by a string: the engine does not know, leaving tells it
                delta.finish_reason = "stop"
                break
            if output.finish is not None:
                delta.text += self._last_words()
                delta.finish_reason = str(output.finish)
        return delta

    def _last_words(self) -> str:
        shown, stopped = self._stops.push(self._detokenizer.flush())
        return shown if stopped else shown + self._stops.flush()

    def _end(self, reason: FinishReason) -> None:
        """The engine ended the request without a token."""
        self._finished = True
        ended = self._inbox.ended if self._inbox else None
        message = ended.message if ended else ""
        raise ApiError(500, message or f"The generation ended early ({reason}).")

    def _observe(self, count: int) -> None:
        now = time.monotonic()
        if self._last_token is None:
            self._metrics.first_token(now - self._started)
            self._last_token = now
            count -= 1
        for _ in range(count):
            self._metrics.next_token((now - self._last_token) / count)
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

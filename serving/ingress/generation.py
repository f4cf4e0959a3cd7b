"""One generation, from lease to last character: one choice of one prompt."""

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect

from model.tokenizer import Tokenizer
from serving.api.delta import Delta
from serving.api.errors import ApiError
from serving.engine.request import (
    Finish,
    FinishReason,
    PromptScores,
    Request,
    RequestStats,
    TokenOutput,
)
from serving.ingress.resume import Engines, ResumableRequest
from serving.ingress.text import TextStream

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
        engines: Engines,
        tokenizer: Tokenizer,
        queue_timeout_s: float,
    ) -> None:
        self.request = request
        self.stats = RequestStats(prompt_tokens=len(request.prompt))
        self._run = ResumableRequest(request, engines)
        self._tokenizer = tokenizer
        self._metrics = engines.metrics
        self._queue_timeout_s = queue_timeout_s
        self._text = text
        self._echo = echo
        self._finished = False  # the engine has said so
        self._started = time.monotonic()
        self._last_token: float | None = None

    async def __aenter__(self) -> "Generation":
        try:
            await self._run.start(self._queue_timeout_s)
        except BaseException:
            self._run.close(finished=True)
            raise
        self._metrics.leased(time.monotonic() - self._started)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._run.close(self._finished)
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
        if self._echo is not None:
            yield await self._prompt_delta(self._echo)
        while not (self._finished or self._text.stopped):
            tokens = await self._run.read()
            if not tokens:
                yield self._end(self._run.ended)
                return
            self._observe(len(tokens))
            delta = self._text.push(tokens)
            self._count(delta.tokens)
            yield delta

    async def _prompt_delta(self, written: str) -> Delta:
        """The prompt as the answer's beginning, with its log-probabilities if asked for."""
        wanted = len(self.request.prompt) - 1 if self.request.scored else 0
        scores = await self._run.read_scores(wanted)
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
        last = tokens[-1]
        if last.finish is not None:
            self._finished = True
            if last.stats is not None:
                self.stats = self._run.total(last.stats)

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

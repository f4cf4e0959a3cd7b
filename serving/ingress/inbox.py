"""Between the engines' token streams and the one reader of each request's tokens."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.api.errors import ApiError
from serving.engine.request import Finish, FinishReason, PromptScores, TokenOutput
from serving.fleet import TokenFrame


class EngineLost(Exception):
    """An engine will not finish a request, through no fault of it; another one may.

    Args:
        reason: one word, for metrics and logs: "lost", "silent", "failed", "repair" or "moved".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Inbox:
    """What has arrived for one request and not been read yet."""

    tokens: list[TokenOutput] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    ended: Finish | None = None
    failure: ApiError | EngineLost | None = None
    _reader: "asyncio.Future[None] | None" = None  # what the one reader waits for

    def push(self, token: TokenOutput) -> None:
        self.tokens.append(token)
        self._wake()

    def push_scores(self, scores: PromptScores) -> None:
        self.scores.append(scores)
        self._wake()

    def end(self, finish: Finish) -> None:
        self.ended = finish
        self._wake()

    def fail(self, failure: ApiError | EngineLost) -> None:
        """The request cannot go on; tokens that came before are still delivered."""
        self.failure = self.failure or failure
        self._wake()

    async def read_scores(self, count: int) -> list[PromptScores]:
        """The prompt's scores, once all `count` tokens of it have one.

        Raises:
            ApiError: the request failed first.
            EngineLost: this engine will not finish it.
        """
        while sum(len(scores.logprobs) for scores in self.scores) < count:
            if self.failure is not None:
                raise self.failure
            if self.ended is not None:
                raise ApiError(500, self.ended.message or "The generation ended early.")
            await self.news()
        return self.scores

    def take(self) -> list[TokenOutput]:
        """Every new token, if there is any.

        Raises:
            ApiError: the request failed.
            EngineLost: this engine will not finish it.
        """
        if not self.tokens and self.failure is not None:
            raise self.failure
        tokens, self.tokens = self.tokens, []
        return tokens

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def news(self) -> "asyncio.Future[None]":
        """Done when something comes. A bare future: an event costs three times as much a token."""
        self._reader = asyncio.get_running_loop().create_future()
        return self._reader


class Inboxes(dict[str, Inbox]):
    """The open ones, by their requests; what comes for others is dropped."""

    def open(self, request_id: str) -> Inbox:
        inbox = self[request_id] = Inbox()
        return inbox

    def deliver(self, frame: TokenFrame) -> list[str]:
        """What one step gave; returns the requests that it ended at their engine."""
        ended = []
        for scores in frame.scores:
            inbox = self.get(scores.request_id)
            if inbox is not None:
                inbox.push_scores(scores)
        for token in frame.tokens:
            inbox = self.get(token.request_id)
            if inbox is not None:
                inbox.push(token)
            if token.finish is not None:
                ended.append(token.request_id)
        for finish in frame.ended:
            ended.append(finish.request_id)
            if finish.reason is FinishReason.MOVED:
                self.lose((finish.request_id,), "moved")
                continue
            inbox = self.get(finish.request_id)
            if inbox is not None:
                inbox.end(finish)
        return ended

    def lose(self, request_ids: Iterable[str], reason: str) -> None:
        """They go on elsewhere; whatever else comes for them from here has no inbox any more."""
        for request_id in request_ids:
            inbox = self.pop(request_id, None)
            if inbox is not None and inbox.ended is None:
                inbox.fail(EngineLost(reason))

    def stalled(self, most: int) -> list[str]:
        """Requests with more than so many tokens that nobody has read."""
        return [request_id for request_id, inbox in self.items() if len(inbox.tokens) > most]

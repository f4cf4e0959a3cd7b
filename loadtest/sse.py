"""The grammar of a streamed answer, checked event by event.

    stream = chunk* usage? "[DONE]"

A choice has exactly one finish_reason, nothing after it, and [DONE] is the last event. Token
counts are the server's own, from `usage`: a chunk may hold several tokens or none.
"""

import json
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"


class GrammarError(Exception):
    """The stream is not what an OpenAI-compatible server may send; the message says where."""


class ServerError(Exception):
    """The server reported an error inside the stream."""


@dataclass(slots=True)
class StreamCheck:
    """Reads one stream's events in order; what it has learned is in its fields."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    _id: str | None = None
    _open: set[int] = field(default_factory=set)
    _done: bool = False

    def feed(self, data: str) -> bool:
        """Takes the next event's data; whether it brought text.

        Raises:
            GrammarError: the event must not come here, or is no chunk.
            ServerError: it is an error object.
        """
        if self._done:
            raise GrammarError(f"an event after {DONE}")
        if data == DONE:
            self._done = True
            return False
        chunk = _parsed(data)
        self._same_id(chunk.get("id"))
        self._count(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise GrammarError("a chunk without choices")
        with_text = [choice for choice in choices if self._choice(choice)]
        return bool(with_text)

    def end(self) -> None:
        """The connection has ended.

        Raises:
            GrammarError: something is missing.
        """
        if not self._done:
            raise GrammarError(f"the stream ended without {DONE}")
        if self._open:
            raise GrammarError(f"choice {min(self._open)} has no finish_reason")
        if not self.finish_reasons:
            raise GrammarError("the stream had no choices")
        if self.output_tokens is None:
            raise GrammarError("no usage, though stream_options asked for it")

    def _same_id(self, identity: object) -> None:
        if not isinstance(identity, str):
            raise GrammarError("a chunk without id")
        if self._id not in (None, identity):
            raise GrammarError(f"id changed from {self._id} to {identity}")
        self._id = identity

    def _count(self, usage: object) -> None:
        if usage is None:
            return
        try:
            counts = int(usage["prompt_tokens"]), int(usage["completion_tokens"])  # type: ignore[index]
        except (TypeError, KeyError, ValueError) as error:
            raise GrammarError("usage without token counts") from error
        if self.output_tokens is not None and counts[1] < self.output_tokens:
            raise GrammarError("usage went down")
        self.prompt_tokens, self.output_tokens = counts

    def _choice(self, choice: object) -> bool:
        """Whether the choice's chunk holds text."""
        if not isinstance(choice, dict) or not isinstance(choice.get("index"), int):
            raise GrammarError("a choice without index")
        index = choice["index"]
        if index in self.finish_reasons:
            raise GrammarError(f"choice {index} goes on after its finish_reason")
        self._open.add(index)
        reason = choice.get("finish_reason")
        if reason is not None:
            self.finish_reasons[index] = str(reason)
            self._open.discard(index)
        return _has_text(choice)


def _has_text(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise GrammarError("an event that is not JSON") from error
    if not isinstance(chunk, dict):
        raise GrammarError("an event that is not an object")
    if reported := chunk.get("error"):
        message = reported.get("message") if isinstance(reported, dict) else None
        raise ServerError(str(message or reported))
    return chunk

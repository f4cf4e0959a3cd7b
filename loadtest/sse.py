"""The grammar of a streamed answer, checked event by event.

    stream = chunk* usage? "[DONE]"

A choice has exactly one finish_reason, nothing after it, and [DONE] is the last event. Token
counts are the server's own, from `usage`: a chunk may hold several tokens or none.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from loadtest.transcript import Choice, Transcript

DONE = "[DONE]"


class GrammarError(Exception):
    """The stream is not what an OpenAI-compatible server may send; the message says where."""


class ServerError(Exception):
    """The server reported an error inside the stream."""


@dataclass(slots=True)
class StreamCheck:
    """Reads one stream's events in order; what they said is in the transcript."""

    transcript: Transcript = field(default_factory=Transcript)
    _id: str | None = None
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
        return self._take(data)

    def whole(self, body: str) -> None:
        """Takes an answer that is not streamed; `end` then tells whether it is complete.

        Raises:
            GrammarError: it is no answer.
            ServerError: it is an error object.
        """
        self._take(body)
        self._done = True

    def end(self) -> None:
        """The connection has ended.

        Raises:
            GrammarError: something is missing.
        """
        if not self._done:
            raise GrammarError(f"the stream ended without {DONE}")
        choices = self.transcript.choices
        still_open = [index for index, c in choices.items() if c.finish_reason is None]
        if still_open:
            raise GrammarError(f"choice {min(still_open)} has no finish_reason")
        if not choices:
            raise GrammarError("the stream had no choices")
        if self.transcript.output_tokens is None:
            raise GrammarError("no usage, though stream_options asked for it")

    def _take(self, data: str) -> bool:
        chunk = _parsed(data)
        self._same_id(chunk.get("id"))
        self._count(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise GrammarError("a chunk without choices")
        with_text = [choice for choice in choices if self._choice(choice)]
        return bool(with_text)

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
        known = self.transcript
        if known.output_tokens is not None and counts[1] < known.output_tokens:
            raise GrammarError("usage went down")
        known.prompt_tokens, known.output_tokens = counts

    def _choice(self, choice: object) -> bool:
        """Whether the choice's chunk holds text."""
        if not isinstance(choice, dict) or not isinstance(choice.get("index"), int):
            raise GrammarError("a choice without index")
        index = choice["index"]
        known = self.transcript.choices.setdefault(index, Choice())
        if known.finish_reason is not None:
            raise GrammarError(f"choice {index} goes on after its finish_reason")
        try:
            return known.add(choice)
        except (TypeError, KeyError, AttributeError) as error:
            raise GrammarError("a choice that has another shape") from error


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

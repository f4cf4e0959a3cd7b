"""Answers in OpenAI's two older shapes: whole bodies, and the events of a stream.

An `Answer` belongs to one request. A dialect with a shape of its own (responses, messages)
implements the same five methods.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from model.tokenizer import Tokenizer
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError
from serving.api.sse import DONE, encoded, error_event
from serving.engine.request import TokenOutput


class Answer(ABC):
    """Turns deltas into what one client reads.

    Attributes:
        tells_tokens: whether deltas without text matter, for what they say of their tokens.
        prompts: token ids of each prompt, set before the first of the methods is called.
    """

    tells_tokens: bool = False
    prompts: Sequence[Sequence[int]] = ()

    def opening(self, choices: int) -> Iterator[bytes]:
        """Events before the first delta."""
        yield from ()

    @abstractmethod
    def piece(self, index: int, delta: Delta) -> Iterator[bytes]:
        """Events for one delta of one choice; the choice's last one has a finish reason."""

    @abstractmethod
    def closing(self, usage: Usage) -> Iterator[bytes]:
        """Events after every choice's last delta."""

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """The last events of a stream that cannot go on."""
        yield error_event(error)

    @abstractmethod
    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""


class OpenAIAnswer(Answer):
    """What completions and chat completions share."""

    object: str
    chunk_object: str
    id_prefix: str
    _text_frame: tuple[bytes, bytes]  # what stands before and after the text of a chunk

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        logprobs: bool,
        include_usage: bool,
        return_token_ids: bool,
    ) -> None:
        self.tells_tokens = logprobs or return_token_ids
        self._with_logprobs = logprobs
        self._head = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        # What all chunks have in common is encoded once.
        self._chunk_head = encoded({**self._head, "object": self.chunk_object})[:-1]
        self._chunk_begin = b'data: %b,"choices":[{"index":' % self._chunk_head
        self._chunk_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._return_token_ids = return_token_ids
        self._choices = 1  # of a stream
        self._begun: set[int] = set()  # choices that have had a chunk

    def opening(self, choices: int) -> Iterator[bytes]:
        self._choices = choices
        yield from ()

    def piece(self, index: int, delta: Delta) -> Iterator[bytes]:
        if delta.text and not (delta.calls or delta.finish_reason or self.tells_tokens):
            yield self._text_chunk(index, delta.text)
            return
        choice = self._finished(self._part(index, delta), delta)
        if self._return_token_ids and index not in self._begun:
            self._begun.add(index)
            choice["prompt_token_ids"] = self._prompt_of(index, self._choices)
        yield self._chunk([choice])

    def closing(self, usage: Usage) -> Iterator[bytes]:
        if self._include_usage:
            yield self._chunk([], _usage(usage))
        yield DONE

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        finished = []
        for index, delta in enumerate(choices):
            choice = self._finished(self._choice(index, delta), delta)
            if self._return_token_ids:
                choice["prompt_token_ids"] = self._prompt_of(index, len(choices))
            finished.append(choice)
        return {**self._head, "object": self.object, "choices": finished, "usage": _usage(usage)}

    @abstractmethod
    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def _part(self, index: int, delta: Delta) -> dict[str, Any]:
        """A choice's part in a chunk."""

    @abstractmethod
    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        """Log-probabilities of a delta's tokens."""

    def _prompt_of(self, index: int, choices: int) -> list[int]:
        """Ids of the prompt that a choice belongs to: every prompt has as many choices."""
        return list(self.prompts[index * len(self.prompts) // choices])

    def _finished(self, choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
        """What every choice has, in whole and in part."""
        choice["logprobs"] = self._logprobs(delta) if self._with_logprobs else None
        choice["finish_reason"] = delta.finish_reason
        if self._return_token_ids:
            generated = delta.tokens[delta.prompt_tokens :]
            choice["token_ids"] = [output.token for output in generated]
        return choice

    def _text_chunk(self, index: int, text: str) -> bytes:
        """The most frequent chunk by far, put together of what does not change."""
        before, after = self._text_frame
        choice = (self._chunk_begin, index, before, encoded(text), after, self._chunk_end)
        return b"%b%d%b%b%b%b" % choice

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {"choices": choices}
        if self._include_usage:
            body["usage"] = used
        return b"data: %b,%b\n\n" % (self._chunk_head, encoded(body)[1:])

    def _text(self, token: int) -> str:
        """A token as its text, or as its bytes if these are no whole characters."""
        raw = self._tokenizer.token_bytes(token) or b""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionAnswer(OpenAIAnswer):
    """`text_completion`."""

    object = chunk_object = "text_completion"
    id_prefix = "cmpl"
    _text_frame = (b',"text":', b',"logprobs":null,"finish_reason":null}')

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return {"index": index, "text": delta.text}

    _part = _choice

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return {
            "tokens": [self._text(output.token) for output in delta.tokens],
            "token_logprobs": [output.logprob for output in delta.tokens],
            "top_logprobs": [self._top(output) for output in delta.tokens],
            "text_offset": delta.offsets,
        }

    def _top(self, output: TokenOutput) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; null for what nothing stands before."""
        if output.logprob is None:
            return None
        # Different tokens may have one text; the likelier one is to stand, so it comes last.
        top = {self._text(token): value for token, value in reversed(output.top)}
        top.setdefault(self._text(output.token), output.logprob)
        return top


class ChatAnswer(OpenAIAnswer):
    """`chat.completion` and its chunks."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    _text_frame = (b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null}')

    def opening(self, choices: int) -> Iterator[bytes]:
        yield from super().opening(choices)
        for index in range(choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._chunk([choice])

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.calls:
            message["content"] = delta.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _function(call)}
                for call in delta.calls
            ]
        return {"index": index, "message": message}

    def _part(self, index: int, delta: Delta) -> dict[str, Any]:
        said: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            said["tool_calls"] = [_call_part(call) for call in delta.calls]
        return {"index": index, "delta": said}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return {"content": [self._token(output) for output in delta.tokens], "refusal": None}

    def _token(self, output: TokenOutput) -> dict[str, Any]:
        entry = self._entry(output.token, output.logprob)
        return {**entry, "top_logprobs": [self._entry(t, value) for t, value in output.top]}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token) or b""
        text = raw.decode(errors="replace")  # `bytes` says exactly what it is
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _function(call: CallDelta) -> dict[str, str | None]:
    return {"name": call.name, "arguments": call.arguments}


def _call_part(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": _function(call)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }

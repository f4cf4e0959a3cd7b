"""Bodies of answers and of stream chunks, in OpenAI's shape."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from model.tokenizer import Tokenizer
from serving.engine.request import RequestStats, TokenOutput


@dataclass(slots=True)
class Delta:
    """What a step added to a choice; of a whole choice: everything."""

    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the choice before each token
    finish_reason: str | None = None

    def add(self, other: "Delta") -> None:
        self.text += other.text
        self.tokens.extend(other.tokens)
        self.offsets.extend(other.offsets)
        self.finish_reason = other.finish_reason


def usage(choices: Sequence[RequestStats], per_prompt: int) -> dict[str, Any]:
    """Usage of a whole request with `per_prompt` choices of each prompt: prompts count once."""
    prompts = choices[::per_prompt]
    prompt = sum(first.prompt_tokens for first in prompts)
    generated = sum(choice.generated_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(first.cached_tokens for first in prompts)},
    }


class Answer(ABC):
    """Makes the bodies of one response: same id, time and model in all of them."""

    chunk_object: str
    object: str
    id_prefix: str

    def __init__(self, request_id: str, model: str, tokenizer: Tokenizer) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer

    def whole(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.object, "choices": choices, "usage": used}

    def chunk(
        self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        body = {**self._head, "object": self.chunk_object, "choices": choices}
        return body if used is None else {**body, "usage": used}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunk that opens a choice; empty if the shape has none."""
        return []

    @abstractmethod
    def choice(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        """A choice's part in a chunk."""

    @abstractmethod
    def logprobs(self, delta: Delta) -> dict[str, Any]:
        """Log-probabilities of a delta's tokens."""

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


class CompletionAnswer(Answer):
    """`text_completion`."""

    object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def choice(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    piece = choice

    def logprobs(self, delta: Delta) -> dict[str, Any]:
        return {
            "tokens": [self._text(output.token) for output in delta.tokens],
            "token_logprobs": [output.logprob for output in delta.tokens],
            "top_logprobs": [
                {self._text(token): value for token, value in reversed(output.top)}
                for output in delta.tokens
            ],
            "text_offset": delta.offsets,
        }


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def logprobs(self, delta: Delta) -> dict[str, Any]:
        return {"content": [self._token(output) for output in delta.tokens], "refusal": None}

    def _token(self, output: TokenOutput) -> dict[str, Any]:
        entry = self._entry(output.token, output.logprob)
        return {**entry, "top_logprobs": [self._entry(t, value) for t, value in output.top]}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token) or b""
        return {"token": self._text(token), "logprob": logprob, "bytes": list(raw)}

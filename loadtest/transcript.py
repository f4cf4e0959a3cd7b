"""What a streamed answer said, choice by choice: token ids, text, log-probabilities, ending."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Choice:
    """One choice of an answer, as far as it came.

    `tokens` and `logprobs` are there only if the request asked for them (`return_token_ids`,
    `logprobs`).
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, part: dict[str, Any]) -> bool:
        """Takes the choice's part of one chunk, or all of it; whether that was text or a call."""
        delta = part.get("delta") or part.get("message") or {}
        text = part.get("text") or delta.get("content") or ""
        self.text += text
        self.tokens += part.get("token_ids") or ()
        self.logprobs += _logprobs(part.get("logprobs"))
        self.finish_reason = part.get("finish_reason")
        return bool(text or delta.get("reasoning_content") or delta.get("tool_calls"))


@dataclass(slots=True)
class Transcript:
    """A whole answer. Token counts are the server's, from `usage`; None before it came."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def received(self) -> int:
        """Token ids that came, of all choices."""
        return sum(len(choice.tokens) for choice in self.choices.values())


def _logprobs(told: dict[str, Any] | None) -> list[float]:
    """Of a completion's or a chat's chunk; the likeliest others are left out."""
    if not told:
        return []
    if "token_logprobs" in told:
        return [value for value in told["token_logprobs"] if value is not None]
    return [entry["logprob"] for entry in told.get("content") or ()]

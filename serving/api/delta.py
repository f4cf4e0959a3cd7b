"""What a generation adds to a choice, step by step, whatever dialect the client speaks."""

from dataclasses import dataclass, field

from serving.engine.request import TokenOutput


@dataclass(slots=True)
class CallDelta:
    """A piece of a function call: its first one has the id and the name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Delta:
    """What a step added to a choice; of a whole choice: everything."""

    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the choice before each token
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None  # which one ended it
    prompt_tokens: int = 0  # how many of `tokens`, the first ones, are the prompt's own
    choice: int = 0  # whose it is, of a request's choices

    def add(self, other: "Delta") -> None:
        self.text += other.text
        self.tokens.extend(other.tokens)
        self.offsets.extend(other.offsets)
        self.finish_reason = other.finish_reason or self.finish_reason
        self.stop_string = other.stop_string or self.stop_string
        self.prompt_tokens += other.prompt_tokens
        for call in other.calls:
            if call.id is not None:
                self.calls.append(CallDelta(call.index, "", call.id, call.name))
            self.calls[-1].arguments += call.arguments

    @property
    def empty(self) -> bool:
        """Nothing that a client without logprobs would see."""
        return not (self.text or self.calls or self.finish_reason)

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, each given those before it; -inf if there are none."""
        known = [t.logprob for t in self.tokens[self.prompt_tokens :] if t.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a whole request took."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

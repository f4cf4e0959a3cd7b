"""The OpenAI requests that this server understands.

Types are strict (no "1" for 1, no true for 1) and unknown fields are refused by name. A field of
OpenAI's schema that cannot be honoured here is refused too, by `Refused`: nothing is ignored
unless it has no effect on the answer.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from model.sampling_params import MAX_SEED

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_LISTED_IDS = 1024

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _refuse(value: object) -> object:
    if value is not None:
        raise ValueError("this server does not support it")
    return value


Refused = Annotated[Any, AfterValidator(_refuse)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted: padding for OpenAI's own network


class Sampling(_Strict):
    """What completions and chat completions have in common."""

    model: str = Field(max_length=256)
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LISTED_IDS
    )
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(max_length=MAX_STOP_STRINGS),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # What vLLM and SGLang offer beyond OpenAI's schema.
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_LISTED_IDS)
    priority: int = Field(0, ge=-1000, le=1000, description="lower goes first")

    # No effect on the answer: accepted.
    user: str | None = Field(None, max_length=1024)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if bias is not None and not all(map(_TOKEN_ID.fullmatch, bias)):
            raise ValueError("keys must be token ids")
        return bias

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Refused = None
    echo: Literal[False] | None = None
    suffix: Refused = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=256)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    # No effect on the answer: accepted.
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)

    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    modalities: Refused = None
    parallel_tool_calls: Refused = None
    prediction: Refused = None
    reasoning_effort: Refused = None
    response_format: Refused = None
    tool_choice: Refused = None
    tools: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

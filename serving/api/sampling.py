"""What completions and chat completions have in common: how tokens are chosen."""

import re
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from model.sampling_params import MAX_SEED
from serving.api.strict import NO_EFFECT, Strict

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_LISTED_IDS = 1024
MAX_BAD_WORDS = 128
MAX_GRAMMAR = 32 * 1024
MAX_CHOICES = 1024

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_SALT = re.compile(r"[!-~]{1,1024}")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# One fault among a million is enough to say.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, NO_EFFECT] = None  # padding against eavesdroppers


class StructuredOutputs(Strict):
    """What the whole text must be; one of these at a time."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="a JSON schema")
    json_object: bool | None = None
    regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    choice: list[StopString] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(
        None, min_length=1, max_length=MAX_GRAMMAR, description="Lark as llguidance reads it; GBNF"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice, grammar")
        return self


class Sampling(Strict):
    """Fields that steer the choice of tokens, in every endpoint of OpenAI's own."""

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
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Field(max_length=1024), NO_EFFECT] = None

    # What vLLM and SGLang offer beyond OpenAI's schema.
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="no end before so many")
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_LISTED_IDS)
    allowed_token_ids: TokenIds | None = Field(None, min_length=1, max_length=MAX_LISTED_IDS)
    bad_words: list[StopString] | None = Field(None, max_length=MAX_BAD_WORDS)
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(
        None, description="prompts share cached prefixes with prompts of the same salt only"
    )
    priority: int | None = Field(None, ge=-1000, le=1000, description="lower goes first")
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = Field(None, description="= structured_outputs.json")
    guided_regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    guided_choice: list[StopString] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    guided_grammar: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if bias is not None and not all(map(_TOKEN_ID.fullmatch, bias)):
            raise ValueError("keys must be token ids")
        return bias

    @field_validator("cache_salt")
    @classmethod
    def _printable(cls, salt: str | None) -> str | None:
        if salt is not None and not _SALT.fullmatch(salt):
            raise ValueError("it must be 1 to 1024 printable ASCII characters without spaces")
        return salt

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _one_restriction(self) -> Self:
        if len(self.restrictions) > 1:
            names = ", ".join(sorted(self.restrictions))
            raise ValueError(f"only one of these may be given: {names}")
        if self.restrictions and (self.ignore_eos or self.min_tokens or self.allowed_token_ids):
            name = min(self.restrictions)
            raise ValueError(
                f"{name} alone decides when the text ends and which tokens it is made of: "
                "leave out ignore_eos, min_tokens and allowed_token_ids"
            )
        return self

    @property
    def restrictions(self) -> dict[str, StructuredOutputs]:
        """What restricts the text, by the name of the field that says so."""
        guided: dict[str, StructuredOutputs | None] = {
            "structured_outputs": self.structured_outputs
        }
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            guided[f"guided_{kind}"] = (
                None if value is None else StructuredOutputs.model_validate({kind: value})
            )
        return {name: value for name, value in guided.items() if value is not None}

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

"""The request of `POST /v1/completions`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from serving.api.sampling import Sampling, TokenIds

MAX_PROMPTS = 1024
DEFAULT_TOKENS = 16  # OpenAI's own default


class CompletionRequest(Sampling):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    suffix: str | None = Field(None, description="fill in the middle between prompt and suffix")
    max_tokens: int | None = Field(
        None, ge=0, lt=2**31, description=f"default {DEFAULT_TOKENS}; 0 with echo: only score"
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    echo: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is only allowed with echo: true")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ValueError("best_of must not be less than n")
            if self.stream and self.best_of > (self.n or 1):
                raise ValueError("best_of cannot be streamed: which is best shows at the end")
        if self.suffix is not None and self.echo:
            raise ValueError("echo and suffix exclude each other")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, each text or token ids."""
        several = isinstance(self.prompt, list) and self.prompt
        if several and not isinstance(self.prompt[0], int):
            return list(self.prompt)  # type: ignore[arg-type]
        return [self.prompt]  # type: ignore[list-item]

    @property
    def output_limit(self) -> int:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

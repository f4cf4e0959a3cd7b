"""Requests of the tokenizer's own endpoints, in vLLM's shape."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from serving.api.chat import MAX_MESSAGES, ChatRequest, Message, Tool
from serving.api.sampling import TokenIds
from serving.api.strict import NO_EFFECT, Strict

MAX_TOKENS = 1 << 20


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or a conversation as the model's template writes it."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = None
    add_special_tokens: bool = Field(True, description="begin of sequence in front of a prompt")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None:
            self.chat("")
        return self

    def chat(self, model: str) -> ChatRequest:
        """The conversation as a chat request.

        Raises:
            ValidationError: its fields contradict each other.
        """
        named = {"tools", "add_generation_prompt", "continue_final_message"}
        fields = self.model_dump(include=named | {"messages"}, exclude_none=True)
        return ChatRequest.model_validate({"model": model, **fields})


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: Annotated[str | None, Field(max_length=256), NO_EFFECT] = None
    tokens: TokenIds = Field(max_length=MAX_TOKENS)

"""The request of `POST /v1/responses`, OpenAI's newer dialect, as a chat request."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Tag, model_validator

from serving.api.chat import MAX_TOOLS, ChatRequest, FunctionName
from serving.api.dialect import by_type, translated
from serving.api.errors import ApiError
from serving.api.response_store import STORING_IS_OFF, ResponseStore
from serving.api.responses_input import Ignored, Items, chat_messages
from serving.api.sampling import Count
from serving.api.strict import NO_EFFECT, Refused, Strict

LOGPROBS = "message.output_text.logprobs"
_CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "logprobs": "include",
}

# There is no reasoning here that could be left out of an answer.
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _echoable(value: dict[str, Any]) -> dict[str, Any]:
    """JSON's own numbers only: the value goes back to the client."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("its numbers must be finite") from None
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_echoable)]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: Annotated[bool | None, NO_EFFECT] = None  # arguments always follow the schema
    defer_loading: Annotated[Literal[False] | None, NO_EFFECT] = None
    allowed_callers: Annotated[None, Refused("only the model calls functions")] = None
    output_schema: Annotated[None, Refused()] = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: FunctionName

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)

    @property
    def chat(self) -> dict[str, Any]:
        allowed = {"mode": self.mode, "tools": [tool.chat for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


ToolChoice = Annotated[
    Annotated[Literal["none"], Tag("none")]
    | Annotated[Literal["auto"], Tag("auto")]
    | Annotated[Literal["required"], Tag("required")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[AllowedFunctions, Tag("allowed_tools")],
    by_type("it must be none, auto, required, or an object of type function or allowed_tools"),
]


class TextFormat(Strict):
    """`text`, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    schema_: Schema | None = Field(None, alias="schema")
    description: Annotated[str | None, NO_EFFECT] = None
    strict: Annotated[bool | None, NO_EFFECT] = None  # always

    @model_validator(mode="after")
    def _schema_given(self) -> Self:
        wanted = self.type == "json_schema"
        if (self.name is not None) != wanted or (self.schema_ is not None) != wanted:
            raise ValueError("name and schema belong to the type json_schema, and to it alone")
        return self

    @property
    def chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Annotated[Literal["medium"] | None, NO_EFFECT] = None


class Reasoning(Strict):
    effort: Annotated[Literal["none"] | None, NO_EFFECT] = None
    summary: Annotated[None, Refused("this model does not reason")] = None
    generate_summary: Annotated[None, Refused("this model does not reason")] = None
    context: Annotated[None, Refused("this model does not reason")] = None
    mode: Annotated[None, Refused("this model does not reason")] = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[bool | None, NO_EFFECT] = None


class ResponsesRequest(Strict):
    """Body of `POST /v1/responses`."""

    model: str = Field(max_length=256)
    input: Items
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    store: bool | None = Field(None, description="null: yes, where the server stores at all")
    include: list[Included] | None = Field(None, max_length=8)
    max_output_tokens: Count | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    text: TextConfig | None = None
    tool_choice: ToolChoice | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    top_p: float | None = Field(None, gt=0, le=1)

    # What this server offers beyond OpenAI's schema, as in a chat request.
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    cache_salt: str | None = None
    priority: int | None = Field(None, ge=-1000, le=1000, description="lower goes first")

    background: Annotated[Literal[False] | None, NO_EFFECT] = None
    max_tool_calls: Annotated[Count | None, NO_EFFECT] = None  # of OpenAI's own tools
    prompt_cache_key: Ignored = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"] | None, NO_EFFECT] = None
    reasoning: Reasoning | None = None
    safety_identifier: Ignored = None
    service_tier: Annotated[Literal["auto", "default"] | None, NO_EFFECT] = None
    truncation: Annotated[Literal["disabled"] | None, NO_EFFECT] = None  # nothing is dropped
    user: Ignored = None

    context_management: Annotated[None, Refused()] = None
    conversation: Annotated[None, Refused("use previous_response_id")] = None
    moderation: Annotated[None, Refused()] = None
    prompt: Annotated[None, Refused("this server keeps no prompt templates")] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs needs {LOGPROBS} in include")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def kept(self, store: ResponseStore | None) -> bool:
        """Whether the response is to be found later."""
        return store is not None and self.store is not False

    def chat(self, store: ResponseStore | None, tenant: str) -> ChatRequest:
        """The request as a chat request; its messages begin with the previous response's.

        Args:
            store: None where storing is off.

        Raises:
            ApiError: 400, storing is off or the previous response unknown, or the chat request
                refuses a field.
        """
        if store is None and self.store:
            message = f"{STORING_IS_OFF}: leave out store, or set it to false."
            raise ApiError(400, message, "store")
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += self._past(store, tenant)
        messages += chat_messages(self.input)
        same = {"model", "temperature", "top_p", "parallel_tool_calls", "stream"}
        own = {"top_k", "min_p", "repetition_penalty", "cache_salt", "priority"}
        fields = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self._chat_tool_choice,
            "response_format": self.text.format.chat if self.text and self.text.format else None,
            "logprobs": self.logprobs or None,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
        }
        return translated({**self.model_dump(include=same | own), **fields}, _CHAT_NAMES)

    def past_of_next(self, chat: ChatRequest) -> list[dict[str, Any]]:
        """The messages that a next response builds on: all of these but the instructions."""
        messages = chat.messages[1:] if self.instructions else chat.messages
        return [message.model_dump(exclude_none=True) for message in messages]

    @property
    def _chat_tool_choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.chat

    def _past(self, store: ResponseStore | None, tenant: str) -> list[dict[str, Any]]:
        name = self.previous_response_id
        if name is None:
            return []
        if store is None:
            message = f"{STORING_IS_OFF}: send the whole conversation as input."
            raise ApiError(400, message, "previous_response_id")
        found = store.find(tenant, name)
        if found is None:
            message, code = "The previous response was not found.", "previous_response_not_found"
            raise ApiError(400, message, "previous_response_id", code)
        return found.conversation


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": function}

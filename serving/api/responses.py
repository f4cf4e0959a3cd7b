"""The request of `POST /v1/responses`, OpenAI's newer dialect, as a chat request."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from serving.api.chat import MAX_MESSAGES, MAX_TOOLS, ChatRequest, FunctionName
from serving.api.errors import ApiError, validation_error
from serving.api.sampling import Count, Sampling
from serving.api.strict import NO_EFFECT, Refused, Strict
from serving.ingress.response_store import ResponseStore

LOGPROBS = "message.output_text.logprobs"
_STORING_IS_OFF = "Storing responses is off on this server"
_CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "logprobs": "include",
}

CallId = Annotated[str, Field(min_length=1, max_length=256)]
Ignored = Annotated[str | None, Field(max_length=1024), NO_EFFECT]
Status = Annotated[Literal["in_progress", "completed", "incomplete"] | None, NO_EFFECT]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def by_type(reason: str, absent: str | None = None) -> Discriminator:
    """Tells the members of a union apart by their `type`.

    Args:
        reason: what the client is told of a type that is none of theirs.
        absent: the type of an object that does not say.
    """

    def tag(value: Any) -> str | None:
        if isinstance(value, dict):
            value = value.get("type", absent)
        else:  # a string where the union has one, or a member already made
            value = getattr(value, "type", value)
        return value if isinstance(value, str) else None

    return Discriminator(tag, custom_error_type="type", custom_error_message=reason)


def translated(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """A chat request made from another dialect's fields.

    Args:
        fields: by the chat request's names; None stands for a field that is left out.
        names: what the dialect calls those fields that it has another name for.

    Raises:
        ApiError: 400, the chat request refuses one of them, or their combination.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False, include_context=False)
        for detail in details:
            if detail["loc"]:
                name = str(detail["loc"][0])
                detail["loc"] = (names.get(name, name), *detail["loc"][1:])
        raise validation_error(details) from None


def _echoable(value: dict[str, Any]) -> dict[str, Any]:
    """JSON's own numbers only: the value goes back to the client."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("its numbers must be finite") from None
    return value


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextPart(Strict):
    """Text of a client, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    annotations: Annotated[list[Any] | None, NO_EFFECT] = None
    logprobs: Annotated[list[Any] | None, NO_EFFECT] = None


# A string is short for one part.
Parts = Annotated[list[TextPart], BeforeValidator(_as_parts)]
Schema = Annotated[dict[str, Any], AfterValidator(_echoable)]


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: Ignored = None
    status: Status = None
    phase: Annotated[Literal["commentary", "final_answer"] | None, NO_EFFECT] = None


class InputCall(Strict):
    """A call from an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str = Field(description="JSON")
    id: Ignored = None
    status: Status = None
    caller: Annotated[None, Refused("only the model calls functions")] = None
    namespace: Annotated[None, Refused("functions have no namespaces")] = None


class InputResult(Strict):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts
    name: Ignored = None
    id: Ignored = None
    status: Status = None
    caller: Annotated[None, Refused("only the model calls functions")] = None
    namespace: Annotated[None, Refused("functions have no namespaces")] = None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    by_type(
        "an item may be a message, a function_call or a function_call_output; "
        "item_reference and the items of other tools are not supported",
        absent="message",
    ),
]


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
    input: Annotated[list[Item], Field(max_length=MAX_MESSAGES), BeforeValidator(_as_items)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    store: bool | None = Field(None, description="null: yes, where the server stores at all")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=8)
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
    repetition_penalty: float | None = Field(None, gt=0, le=10)
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

    @field_validator("cache_salt")
    @classmethod
    def _printable(cls, salt: str | None) -> str | None:
        return Sampling._printable(salt)

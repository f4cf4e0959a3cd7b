"""The request of `POST /v1/chat/completions`, which other chat dialects are translated into."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serving.api.sampling import Count, Sampling, StructuredOutputs
from serving.api.strict import NO_EFFECT, Refused, Strict

MAX_MESSAGES = 4096
MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: FunctionName
    arguments: str = Field(description="JSON")


class ToolCall(Strict):
    """A call that an assistant made."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str | None, Field(max_length=256), NO_EFFECT] = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)

    # What an assistant's message from an earlier answer brings along.
    refusal: Annotated[None, Refused()] = None
    audio: Annotated[None, Refused()] = None
    function_call: Annotated[None, Refused("use tool_calls")] = None
    annotations: Annotated[list[Any] | None, NO_EFFECT] = None
    provider_specific_fields: Annotated[dict[str, Any] | None, NO_EFFECT] = None  # litellm's own

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to messages of role tool, and to all of them")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message without tool_calls needs content")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Function(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of an object")
    strict: Annotated[bool | None, NO_EFFECT] = None  # arguments always follow the schema


class Tool(Strict):
    type: Literal["function"]
    function: Function


class _Name(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: _Name


class _AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


class JsonSchema(Strict):
    name: FunctionName
    description: Annotated[str | None, NO_EFFECT] = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Annotated[bool | None, NO_EFFECT] = None  # always


class ResponseFormat(Strict):
    """`text`, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to it alone")
        return self

    @property
    def structure(self) -> StructuredOutputs | None:
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        wanted: dict[str, Any] = {"json_object": True} if schema is None else {"json": schema}
        return StructuredOutputs.model_validate(wanted)


class ChatRequest(Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="go on with the last message, an assistant's, instead of a new one"
    )
    add_generation_prompt: bool | None = Field(
        None, description="false only together with continue_final_message"
    )

    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    metadata: Annotated[dict[str, str] | None, Field(max_length=16), NO_EFFECT] = None
    store: Annotated[Literal[False] | None, NO_EFFECT] = None
    service_tier: Annotated[Literal["auto", "default"] | None, NO_EFFECT] = None
    safety_identifier: Annotated[str | None, Field(max_length=1024), NO_EFFECT] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=1024), NO_EFFECT] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory", "24h"] | None, NO_EFFECT
    ] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    prediction: Annotated[dict[str, Any] | None, NO_EFFECT] = None  # would only save time
    reasoning_effort: Annotated[Literal["none"] | None, NO_EFFECT] = None
    verbosity: Annotated[Literal["medium"] | None, NO_EFFECT] = None

    audio: Annotated[None, Refused("this server answers in text")] = None
    function_call: Annotated[None, Refused("use tool_choice")] = None
    functions: Annotated[None, Refused("use tools")] = None
    moderation: Annotated[None, Refused()] = None
    web_search_options: Annotated[None, Refused("this server cannot search the web")] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs an assistant's message at the end")
        if self.add_generation_prompt is not None and (
            self.add_generation_prompt == bool(self.continue_final_message)
        ):
            raise ValueError("add_generation_prompt must be the opposite of continue_final_message")
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice needs tools")
        missing = set(self.chosen_tools) - set(names)
        if missing:
            raise ValueError("tool_choice names a function that is not among the tools")
        tools_bind = bool(names) and self.tool_choice != "none"
        if tools_bind and set(self.restrictions) - {"response_format"}:
            raise ValueError("tools cannot be combined with guided output; use response_format")
        if tools_bind and (self.ignore_eos or self.min_tokens or self.allowed_token_ids):
            raise ValueError("with tools, leave out ignore_eos, min_tokens and allowed_token_ids")
        return self

    @property
    def chosen_tools(self) -> list[str]:
        """Names in `tool_choice`."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []

    @property
    def restrictions(self) -> dict[str, StructuredOutputs]:
        structure = self.response_format.structure if self.response_format is not None else None
        own = {} if structure is None else {"response_format": structure}
        return super().restrictions | own

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def tool_arguments(text: str) -> Any:
    """A call's arguments from an earlier answer; text that is not JSON stays text, as does JSON
    that is nested too deeply to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

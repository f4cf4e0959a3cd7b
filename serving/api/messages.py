"""The requests of `POST /v1/messages`, Anthropic's dialect, as chat requests."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Tag, model_validator

from serving.api.chat import MAX_MESSAGES, MAX_TOOLS, ChatRequest, FunctionName
from serving.api.dialect import CallId, by_type, translated
from serving.api.errors import ApiError
from serving.api.sampling import MAX_STOP_STRINGS, Count, StopString
from serving.api.strict import NO_EFFECT, Refused, Strict

_BETWEEN_BLOCKS = "\n"
_CHAT_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config",
    "parallel_tool_calls": "tool_choice",
}


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


Cached = Annotated[CacheControl | None, NO_EFFECT]  # every prompt's pages are cached here


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: Cached = None
    citations: Annotated[list[Any] | None, Field(max_length=0), NO_EFFECT] = None


# A string is short for one block.
Texts = Annotated[
    list[TextBlock],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolUse(Strict):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: CallId
    name: FunctionName
    input: dict[str, Any]
    cache_control: Cached = None
    caller: Annotated[None, Refused("only the model calls functions")] = None
    toolset_name: Annotated[None, Refused("there are no toolsets")] = None

    @property
    def chat(self) -> dict[str, Any]:
        arguments = json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "function": {"name": self.name, "arguments": arguments}}


class ToolResult(Strict):
    """What a called function returned, or how it failed."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts | None = None
    is_error: bool | None = Field(None, description="the model reads `Error: ` before the content")
    cache_control: Cached = None
    toolset_name: Annotated[None, Refused("there are no toolsets")] = None

    @property
    def chat(self) -> dict[str, Any]:
        text = _joined(self.content or ())
        content = f"Error: {text}" if self.is_error else text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")],
    by_type(
        "a block may be of type text, tool_use or tool_result; "
        "images, documents and thinking are not supported"
    ),
]


class Turn(Strict):
    """One message; those of one role in a row are one turn, as at Anthropic."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[Block],
        Field(min_length=1),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
    ]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Self:
        if self.role == "user" and any(isinstance(block, ToolUse) for block in self.content):
            raise ValueError("tool_use blocks belong to an assistant's message")
        if self.role != "user" and any(isinstance(block, ToolResult) for block in self.content):
            raise ValueError("tool_result blocks belong to a user's message")
        return self


class FunctionTool(Strict):
    """A function that the model may call."""

    name: FunctionName
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Cached = None
    strict: Annotated[bool | None, NO_EFFECT] = None  # arguments always follow the schema
    eager_input_streaming: Annotated[bool | None, NO_EFFECT] = None
    defer_loading: Annotated[Literal[False] | None, NO_EFFECT] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, NO_EFFECT] = None
    input_examples: Annotated[None, Refused("put examples into the description")] = None

    @property
    def chat(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _name_given(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name belongs to the type tool, and to it alone")
        return self

    @property
    def chat(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": self.type, "json_schema": {"name": "output", "schema": self.schema_}}


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Annotated[None, Refused("this model has one effort")] = None


class Thinking(Strict):
    type: Literal["disabled"]


class Metadata(Strict):
    user_id: Annotated[str | None, Field(max_length=1024), NO_EFFECT] = None


class CountTokensRequest(Strict):
    """Body of `POST /v1/messages/count_tokens`, and what a message's own has in common with it."""

    model: str = Field(max_length=256)
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None

    cache_control: Cached = None
    thinking: Annotated[Thinking | None, NO_EFFECT] = None
    speed: Annotated[Literal["standard"] | None, NO_EFFECT] = None

    context_management: Annotated[None, Refused()] = None
    mcp_servers: Annotated[None, Refused("this server calls no tools itself")] = None
    output_format: Annotated[None, Refused("use output_config.format")] = None
    user_profile_id: Annotated[None, Refused()] = None
    workspace_id: Annotated[None, Refused()] = None

    def chat(self) -> ChatRequest:
        """The request as a chat request; an assistant's last message is to be continued.

        Raises:
            ApiError: 400, the chat request refuses a field.
        """
        return translated(self._chat_fields(), _CHAT_NAMES)

    def _chat_fields(self) -> dict[str, Any]:
        messages = []
        if self.system:
            messages.append({"role": "system", "content": _joined(self.system)})
        messages += _messages(self.messages)
        prefilled = messages[-1]["role"] == "assistant"
        if prefilled and "tool_calls" in messages[-1]:
            message = "A tool_use block needs its tool_result in the next message."
            raise ApiError(400, message, "messages")
        choice, output = self.tool_choice, self.output_config
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": prefilled or None,
            "tools": [tool.chat for tool in self.tools] if self.tools else None,
            "tool_choice": choice.chat if choice else None,
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "response_format": output.format.chat if output and output.format else None,
        }


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Count
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0: all tokens")
    top_p: float | None = Field(None, gt=0, le=1)

    metadata: Annotated[Metadata | None, NO_EFFECT] = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, NO_EFFECT] = None

    billing_policy: Annotated[None, Refused()] = None
    compaction: Annotated[None, Refused()] = None
    container: Annotated[None, Refused("this server runs no code")] = None
    diagnostics: Annotated[None, Refused()] = None
    fallback_credit_token: Annotated[None, Refused()] = None
    fallbacks: Annotated[None, Refused("this server has one model")] = None
    inference_geo: Annotated[None, Refused()] = None
    thread: Annotated[None, Refused("send the whole conversation as messages")] = None

    def _chat_fields(self) -> dict[str, Any]:
        same = {"max_tokens", "stream", "temperature", "top_k", "top_p"}
        own = {**self.model_dump(include=same), "stop": self.stop_sequences}
        return {**super()._chat_fields(), **own}


def _joined(blocks: Sequence[TextBlock]) -> str:
    return _BETWEEN_BLOCKS.join(block.text for block in blocks)


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat messages; a tool's result is a message of its own there."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        for block in turn.content:
            if isinstance(block, ToolResult):
                messages.append(block.chat)
                continue
            if not messages or messages[-1]["role"] != turn.role:
                messages.append({"role": turn.role})
            message = messages[-1]
            if isinstance(block, ToolUse):
                message.setdefault("tool_calls", []).append(block.chat)
            elif "content" in message:
                message["content"] += _BETWEEN_BLOCKS + block.text
            else:
                message["content"] = block.text
    return messages

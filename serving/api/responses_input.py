"""The input items of `POST /v1/responses`, and the chat messages that they are."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from serving.api.chat import MAX_MESSAGES, FunctionName
from serving.api.dialect import CallId, by_type
from serving.api.strict import NO_EFFECT, Refused, Strict

Ignored = Annotated[str | None, Field(max_length=1024), NO_EFFECT]
Status = Annotated[Literal["in_progress", "completed", "incomplete"] | None, NO_EFFECT]


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputText(Strict):
    """Text of a client, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    annotations: Annotated[list[Any] | None, NO_EFFECT] = None
    logprobs: Annotated[list[Any] | None, NO_EFFECT] = None


# A string is short for one part.
Parts = Annotated[
    list[InputText], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputText])
]


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

# A string is short for one message.
Items = Annotated[
    list[Item],
    Field(max_length=MAX_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


def chat_messages(items: Sequence[InputMessage | InputCall | InputResult]) -> list[dict[str, Any]]:
    """Items as chat messages; calls belong to the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, InputResult):
            output = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        else:
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "tool_calls": []})
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


def _text(parts: Sequence[InputText]) -> str:
    return "".join(part.text for part in parts)

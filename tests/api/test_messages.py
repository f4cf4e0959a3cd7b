"""Anthropic's dialect: what it asks of a chat, and the shape of every body and event."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError, validation_error
from serving.api.messages import CountTokensRequest, MessagesRequest
from serving.api.messages_answer import MessagesAnswer, messages_error
from tests.api.odd import SECRET, odd
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
USED = Usage(10, 4, 3)
HI = {"role": "user", "content": "hi"}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
READ = {"name": "read", "input_schema": {"type": "object"}}
READ_IN_CHAT = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
USE = {"type": "tool_use", "id": "t1", "name": "read", "input": {"a": "ü"}}
USE_IN_CHAT = {
    "id": "t1", "type": "function", "function": {"name": "read", "arguments": '{"a": "ü"}'}
}  # fmt: skip
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "1"}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def request(**fields: Any) -> MessagesRequest:
    body = {"model": "nano", "max_tokens": 9, "messages": [HI], **fields}
    return MessagesRequest.model_validate_json(json.dumps(body))


def chat(**fields: Any) -> dict[str, Any]:
    """What is asked of a chat beside the model and the limit."""
    asked = request(**fields).chat().model_dump(by_alias=True, exclude_none=True)
    assert (asked.pop("model"), asked.pop("max_tokens")) == ("nano", 9)
    return asked


def refusal(**fields: Any) -> ApiError:
    """The error of fields that are refused, by their own model or by the chat request."""
    try:
        with pytest.raises(ApiError) as raised:
            request(**fields).chat()
    except ValidationError as error:
        return validation_error(error.errors())
    return raised.value


@pytest.mark.parametrize(
    ("turns", "messages"),
    [
        ([HI], [HI]),
        ([{"role": "user", "content": [text("a", **CACHED), text("b")]}],
         [{"role": "user", "content": "a\nb"}]),
        ([HI, HI, {"role": "assistant", "content": "c"}, HI],
         [{"role": "user", "content": "hi\nhi"}, {"role": "assistant", "content": "c"}, HI]),
        (
            [
                HI,
                {"role": "assistant", "content": [text("Reading."), USE, {**USE, "id": "t2"}]},
                {"role": "user", "content": [
                    RESULT,
                    {**RESULT, "tool_use_id": "t2", "content": [text("b"), text("c")],
                     "is_error": True},
                    text("Go on."),
                ]},
            ],
            [
                HI,
                {"role": "assistant", "content": "Reading.",
                 "tool_calls": [USE_IN_CHAT, {**USE_IN_CHAT, "id": "t2"}]},
                {"role": "tool", "tool_call_id": "t1", "content": "1"},
                {"role": "tool", "tool_call_id": "t2", "content": "Error: b\nc"},
                {"role": "user", "content": "Go on."},
            ],
        ),
        (
            [HI, {"role": "assistant", "content": [USE]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}],
            [HI, {"role": "assistant", "tool_calls": [USE_IN_CHAT]},
             {"role": "tool", "tool_call_id": "t1", "content": ""}],
        ),
    ],
)  # fmt: skip
def test_turns_become_messages(turns: list[Any], messages: list[dict[str, Any]]) -> None:
    assert chat(messages=turns) == {"messages": messages}


@pytest.mark.parametrize("content", ["The answer is", [text("The answer is")]])
def test_an_assistants_last_message_is_continued(content: Any) -> None:
    asked = chat(messages=[HI, {"role": "assistant", "content": content}])
    assert asked["messages"][-1] == {"role": "assistant", "content": "The answer is"}
    assert asked["continue_final_message"] is True


def choice(kind: str, **more: Any) -> dict[str, Any]:
    return {"tools": [READ], "tool_choice": {"type": kind, **more}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"stop_sequences": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"temperature": 1, "top_p": 0.5, "top_k": 3},
         {"temperature": 1, "top_p": 0.5, "top_k": 3}),
        ({"stream": True}, {"stream": True}),
        ({"tools": []}, {}),
        ({"tools": [{**READ, **CACHED, "type": "custom"}]}, {"tools": [READ_IN_CHAT]}),
        (choice("auto"), {"tools": [READ_IN_CHAT], "tool_choice": "auto"}),
        (choice("none"), {"tools": [READ_IN_CHAT], "tool_choice": "none"}),
        (choice("any", disable_parallel_tool_use=True),
         {"tools": [READ_IN_CHAT], "tool_choice": "required", "parallel_tool_calls": False}),
        (choice("tool", name="read"),
         {"tools": [READ_IN_CHAT],
          "tool_choice": {"type": "function", "function": {"name": "read"}}}),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         {"response_format": {"type": "json_schema", "json_schema": {
             "name": "output", "schema": {"type": "object"}}}}),
        ({"metadata": {"user_id": "u"}, "service_tier": "standard_only", "speed": "standard",
          "thinking": {"type": "disabled"}, **CACHED}, {}),
    ],
)  # fmt: skip
def test_fields_become_the_chat_requests(fields: dict[str, Any], asked: dict[str, Any]) -> None:
    assert chat(**fields) == {"messages": [HI], **asked}


@pytest.mark.parametrize("system", ["Be brief.\nBe kind.", [text("Be brief."), text("Be kind.")]])
def test_the_system_prompt_comes_first(system: Any) -> None:
    told = {"role": "system", "content": "Be brief.\nBe kind."}
    assert chat(system=system)["messages"] == [told, HI]


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (user({"type": "image", "source": SECRET}), "messages", "images"),
        (user({"type": "document", "source": SECRET}), "messages", "documents"),
        (user({"type": "thinking", "thinking": SECRET}), "messages", "thinking"),
        (user({"type": SECRET}), "messages", "tool_result"),
        (user({"text": SECRET}), "messages", "tool_result"),
        (user(), "messages", "at least 1"),
        (user(USE), "messages", "assistant"),
        ({"messages": [HI, {"role": "assistant", "content": [RESULT]}]}, "messages", "user"),
        ({"messages": [HI, {"role": "assistant", "content": [USE]}]}, "messages", "tool_result"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages", "assistant"),
        (user({**RESULT, "content": [{"type": "image", "source": SECRET}]}), "messages", "text"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools", "custom"),
        ({"tools": [READ, READ]}, None, "same name"),
        (choice("tool"), "tool_choice", "name"),
        (choice("auto", name="read"), "tool_choice", "name"),
        (choice("tool", name="other"), None, "not among the tools"),
        ({"tool_choice": {"type": "any"}}, None, "needs tools"),
        ({"stop_sequences": list("abcde")}, "stop_sequences", "at most 4"),
        ({"temperature": 1.5}, "temperature", "1"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "disabled"),
        ({"output_config": {"effort": "high"}}, "output_config", "effort"),
        ({"container": SECRET}, "container", "code"),
        ({"mcp_servers": []}, "mcp_servers", "tools"),
        ({"context_management": {}}, "context_management", "support"),
        ({"seed": 1}, "seed", "Unrecognized"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name_and_not_repeated(
    fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = refusal(**fields)
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert SECRET not in error.message


ODD = odd(
    ["text", "user", "tool_use", "tool_result"],
    ["type", "role", "content", "name", "text", "id", "input"],
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(MessagesRequest.model_fields)), ODD)
def test_odd_values_are_taken_or_refused_and_never_repeated(field: str, value: object) -> None:
    try:
        request(**{field: value}).chat()
    except ValidationError as error:
        refused = validation_error(error.errors())
    except ApiError as error:
        refused = error
    else:
        return
    assert refused.status == 400
    assert SECRET not in refused.message


def test_tokens_are_counted_of_the_same_prompt() -> None:
    asked = {"model": "nano", "messages": [HI], "system": "x", "tools": [READ]}
    counted = CountTokensRequest.model_validate_json(json.dumps(asked)).chat()
    whole = request(system="x", tools=[READ]).chat()
    assert counted.messages == whole.messages
    assert counted.tools == whole.tools
    for own in ("max_tokens", "stream", "temperature"):
        with pytest.raises(ValidationError):
            CountTokensRequest.model_validate_json(json.dumps({**asked, own: 1}))


def call(index: int, arguments: str = "", name: str | None = None) -> CallDelta:
    return CallDelta(index, arguments, f"call_{index}" if name else None, name)


CALLS = [
    Delta("Sure"),
    Delta(calls=[call(0, "", "read"), call(0, '{"a"')]),
    Delta(calls=[call(0, ": 1}")]),
    Delta(calls=[call(1, "{}", "write")]),
    Delta(finish_reason="tool_calls"),
]
SCENARIOS: dict[str, list[Delta]] = {
    "text": [Delta("Hel"), Delta("lo", finish_reason="stop")],
    "cut": [Delta("Hel"), Delta("lo", finish_reason="length")],
    "stop string": [Delta("Hel", finish_reason="stop", stop_string="lo")],
    "nothing": [Delta(finish_reason="stop")],
    "calls": CALLS,
    "only a call": [*CALLS[1:3], Delta(finish_reason="tool_calls")],
    "a named call": [*CALLS[1:3], Delta(finish_reason="stop")],
    "a cut call": [*CALLS[:2], Delta(finish_reason="length")],
}


def new_answer() -> MessagesAnswer:
    answer = MessagesAnswer("r", "nano", TOKENIZER, request())
    answer.prompts = [list(range(10))]
    return answer


def joined(deltas: Sequence[Delta]) -> Delta:
    whole = Delta()
    for delta in deltas:
        whole.add(delta)
    return whole


def parsed(frames: Sequence[bytes]) -> list[dict[str, Any]]:
    events = []
    for frame in frames:
        head, data, *rest = frame.decode().split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert rest == ["", ""]
        assert head == f"event: {events[-1]['type']}"
    return events


def stream(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    answer = new_answer()
    frames = list(answer.opening(1))
    for delta in deltas:
        frames += answer.piece(0, delta)
    return parsed([*frames, *answer.closing(USED)])


def grown(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message as Anthropic's client builds it from the events."""
    message: dict[str, Any] = {}
    arguments: list[str] = []
    for event in events:
        blocks = message.get("content", [])
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            arguments.append("")
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "text_delta":
                blocks[-1]["text"] += delta["text"]
            else:
                assert delta["type"] == "input_json_delta"
                arguments[-1] += delta["partial_json"]
        elif event["type"] == "content_block_stop":
            assert event["index"] == len(blocks) - 1
            if arguments[-1].endswith("}"):
                blocks[-1]["input"] = json.loads(arguments[-1])
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
        else:
            assert event["type"] in ("ping", "message_stop")
    return message


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_stream_tells_what_the_whole_says(scenario: str) -> None:
    deltas = SCENARIOS[scenario]
    assert grown(stream(deltas)) == new_answer().whole([joined(deltas)], USED)


@given(st.lists(st.text(min_size=1, max_size=5), max_size=8))
def test_where_a_text_is_cut_into_deltas_makes_no_difference(pieces: list[str]) -> None:
    deltas = [*(Delta(piece) for piece in pieces), Delta(finish_reason="stop")]
    message = grown(stream(deltas))
    assert message == new_answer().whole([joined(deltas)], USED)
    assert "".join(block["text"] for block in message["content"]) == "".join(pieces)


@pytest.mark.parametrize(
    ("scenario", "reason", "string"),
    [
        ("text", "end_turn", None),
        ("cut", "max_tokens", None),
        ("stop string", "stop_sequence", "lo"),
        ("calls", "tool_use", None),
        ("a named call", "tool_use", None),
        ("a cut call", "max_tokens", None),
    ],
)
def test_a_message_says_why_it_ended(scenario: str, reason: str, string: str | None) -> None:
    whole = new_answer().whole([joined(SCENARIOS[scenario])], USED)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, string)


def test_a_whole_message_has_anthropics_shape() -> None:
    assert new_answer().whole([joined(CALLS)], USED) == {
        "id": "msg_r",
        "type": "message",
        "role": "assistant",
        "model": "nano",
        "content": [
            {"type": "text", "text": "Sure"},
            {"type": "tool_use", "id": "call_0", "name": "read", "input": {"a": 1}},
            {"type": "tool_use", "id": "call_1", "name": "write", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 3,
        },
    }


def test_the_events_of_a_message_come_in_anthropics_order() -> None:
    events = stream(CALLS)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event["type"] for event in events] == [
        "message_start", "ping", *block, block[0], block[1], block[1], block[2], *block,
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["usage"]["input_tokens"] == 10
    assert events[0]["message"]["content"] == []
    assert events[5]["content_block"]["input"] == {}


@pytest.mark.parametrize("arguments", ['{"a', "[1]", "", '{"a": "\\ud800"}', "{" * 100_000])
def test_a_calls_input_is_an_object_whatever_its_arguments_are(arguments: str) -> None:
    delta = Delta(calls=[CallDelta(0, arguments, "c", "read")], finish_reason="length")
    whole = new_answer().whole([delta], USED)
    assert whole["content"][0]["input"] == {}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (405, "invalid_request_error"), (413, "request_too_large"),
        (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error"),
        (529, "overloaded_error"),
    ],
)  # fmt: skip
def test_an_error_has_anthropics_type(status: int, kind: str) -> None:
    response = messages_error(ApiError(status, "why"), "r")
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {
        "type": "error",
        "error": {"type": kind, "message": "why"},
        "request_id": "r",
    }


def test_an_error_says_when_to_come_again() -> None:
    assert messages_error(ApiError(429, "busy", retry_after_s=2)).headers["retry-after"] == "2"
    assert "request_id" not in json.loads(bytes(messages_error(ApiError(429, "busy")).body))


def test_a_stream_that_cannot_go_on_ends_with_an_error() -> None:
    answer = new_answer()
    frames = [*answer.opening(1), *answer.piece(0, Delta("Hel"))]
    frames += answer.failure(ApiError(500, "The engine was lost."))
    assert parsed(frames)[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "The engine was lost."},
        "request_id": "r",
    }

"""OpenAI's Responses dialect: what it asks of a chat, and what OpenAI's own types read of it."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_type_hints

import pytest
from fastapi.responses import JSONResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from pydantic import TypeAdapter, ValidationError

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError, validation_error
from serving.api.response_store import ResponseStore
from serving.api.responses import ResponsesRequest
from serving.api.responses_answer import ResponsesAnswer
from serving.engine.request import TokenOutput
from tests.api.odd import SECRET, odd
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"
USED = Usage(10, 4, 3)
READ = {"type": "function", "name": "read", "parameters": {"type": "object"}}
READ_IN_CHAT = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"default": None}}}


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate_json(
        json.dumps({"model": "nano", "input": "hi", **fields})
    )


def chat(**fields: Any) -> dict[str, Any]:
    """What is asked of a chat beside the model, without a store."""
    asked = request(**fields).chat(None, "").model_dump(by_alias=True, exclude_none=True)
    assert asked.pop("model") == "nano"
    return asked


def refusal(**fields: Any) -> ApiError:
    """The error of fields that are refused, by their own model or by the chat request."""
    try:
        with pytest.raises(ApiError) as raised:
            request(**fields).chat(None, "")
    except ValidationError as error:
        return validation_error(error.errors())
    return raised.value


def new_store() -> ResponseStore:
    return ResponseStore(10, 100_000, 60.0, lambda: 0.0)


ODD = odd(
    ["message", "user", "text", "function"],
    ["type", "role", "content", "name", "format", "schema", "parameters"],
)


def test_every_field_of_the_original_is_known_by_name() -> None:
    original = set(get_type_hints(ResponseCreateParamsStreaming))
    own = {"top_k", "min_p", "repetition_penalty", "cache_salt", "priority"}
    assert set(ResponsesRequest.model_fields) == original | own


CALL = {"type": "function_call", "call_id": "c1", "name": "read", "arguments": "{}"}
CALL_IN_CHAT = {
    "id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}
}  # fmt: skip


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([{"role": "developer", "content": "x"}], [{"role": "developer", "content": "x"}]),
        (
            [
                {"type": "message", "role": "user", "status": "completed", "content": [
                    {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {"role": "assistant", "id": "msg_1", "type": "message", "content": [
                    {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
            ],
            [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}],
        ),
        (
            [
                {"role": "user", "content": "hi"},
                CALL,
                {**CALL, "call_id": "c2", "id": "fc_2", "status": "completed"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": [
                    {"type": "input_text", "text": "2"}]},
            ],
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [CALL_IN_CHAT, {**CALL_IN_CHAT, "id": "c2"}]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "tool", "tool_call_id": "c2", "content": "2"},
            ],
        ),
        (
            [{"role": "assistant", "content": "Reading."}, CALL],
            [{"role": "assistant", "content": "Reading.", "tool_calls": [CALL_IN_CHAT]}],
        ),
    ],
)  # fmt: skip
def test_items_become_messages(items: Any, messages: list[dict[str, Any]]) -> None:
    assert chat(input=items)["messages"] == messages


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, {}),
        ({"max_output_tokens": 5}, {"max_completion_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"top_k": 3, "min_p": 0.1}, {"top_k": 3, "min_p": 0.1}),
        ({"repetition_penalty": 1.1, "priority": -1}, {"repetition_penalty": 1.1, "priority": -1}),
        ({"cache_salt": "s", "stream": True}, {"cache_salt": "s", "stream": True}),
        ({"include": [LOGPROBS]}, {"logprobs": True}),
        ({"include": [LOGPROBS], "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"top_logprobs": 0, "include": []}, {}),
        ({"tools": []}, {}),
        ({"tools": [READ]}, {"tools": [READ_IN_CHAT]}),
        (
            {"tools": [{**READ, "strict": True}], "tool_choice": "required"},
            {"tools": [READ_IN_CHAT], "tool_choice": "required"},
        ),
        (
            {"tools": [READ], "tool_choice": {"type": "function", "name": "read"}},
            {
                "tools": [READ_IN_CHAT],
                "tool_choice": {"type": "function", "function": {"name": "read"}},
            },
        ),
        (
            {"tools": [READ], "parallel_tool_calls": False, "tool_choice": {
                "type": "allowed_tools", "mode": "auto",
                "tools": [{"type": "function", "name": "read"}]}},
            {"tools": [READ_IN_CHAT], "parallel_tool_calls": False, "tool_choice": {
                "type": "allowed_tools", "allowed_tools": {
                    "mode": "auto", "tools": [{"type": "function", "function": {"name": "read"}}],
                }}},
        ),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        ({"text": {"format": None}}, {}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
            {"response_format": {
                "type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        ),
        (
            {"store": False, "truncation": "disabled", "user": "u", "background": False,
             "reasoning": {"effort": "none"}, "service_tier": "auto", "metadata": {"k": "v"},
             "prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3},
            {},
        ),
    ],
)  # fmt: skip
def test_fields_become_the_chat_requests(fields: dict[str, Any], asked: dict[str, Any]) -> None:
    assert chat(**fields) == {"messages": [{"role": "user", "content": "hi"}], **asked}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"seed": 1}, "seed", "Unrecognized"),
        ({"stop": ["x"]}, "stop", "Unrecognized"),
        ({"input": [{"type": "item_reference", "id": SECRET}]}, "input", "item_reference"),
        ({"input": [{"type": SECRET}]}, "input", "function_call_output"),
        ({"input": [{"type": [SECRET]}]}, "input", "function_call_output"),
        ({"input": [SECRET]}, "input", "item"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "array"),
        ({"input": [{"role": SECRET, "content": "x"}]}, "input", "assistant"),
        (
            {"input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": SECRET}]}]},
            "input", "input_text",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [READ, READ]}, None, "same name"),
        ({"tools": [{**READ, "parameters": {"x": float("nan")}}]}, "tools", "finite"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"tool_choice": SECRET}, "tool_choice", "allowed_tools"),
        ({"tool_choice": {"type": "hosted"}}, "tool_choice", "allowed_tools"),
        (
            {"tools": [READ], "tool_choice": {"type": "function", "name": "other"}},
            None, "not among the tools",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "schema"),
        ({"text": {"format": {"type": "text", "name": "n"}}}, "text", "schema"),
        ({"text": {"verbosity": "high"}}, "text", "medium"),
        ({"include": ["web_search_call.results"]}, "include", LOGPROBS),
        ({"top_logprobs": 3}, None, LOGPROBS),
        ({"stream_options": {}}, None, "stream"),
        ({"cache_salt": "a b"}, "cache_salt", "printable"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "none"),
        ({"reasoning": {"summary": "auto"}}, "reasoning", "does not reason"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "False"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": SECRET}}, "prompt", "templates"),
        ({"temperature": 3}, "temperature", "2"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "64"),
        ({"store": True}, "store", "off"),
        ({"previous_response_id": SECRET}, "previous_response_id", "off"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name_and_not_repeated(
    fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = refusal(**fields)
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert SECRET not in error.message


def outputs(count: int) -> list[TokenOutput]:
    return [TokenOutput("r", 300 + i, -0.5, [(300 + i, -0.5), (5, -1.0)]) for i in range(count)]


def call(index: int, arguments: str = "", name: str | None = None) -> CallDelta:
    return CallDelta(index, arguments, f"call_{index}" if name else None, name)


def said(*texts: str, finish: str = "stop") -> list[Delta]:
    """Deltas of one token each, after which the text has ended."""
    deltas, characters = [], 0
    for text in texts:
        deltas.append(Delta(text, outputs(1), [characters]))
        characters += len(text)
    return [*deltas, Delta("", outputs(1), [characters], finish_reason=finish)]


CALLS = [
    Delta("Sure", outputs(1), [0]),
    Delta("", outputs(1), [4]),  # held back: it may begin a call
    Delta("", outputs(1), [11], [call(0, "", "read"), call(0, '{"a"')]),
    Delta("", outputs(1), [17], [call(0, ": 1}")]),
    Delta("", outputs(1), [21], [call(1, "{}", "write")]),
    Delta("", outputs(1), [30], finish_reason="tool_calls"),
]
SCENARIOS: dict[str, list[Delta]] = {
    "text": said("Hel", "lo"),
    "cut": said("Hel", "lo", finish="length"),
    "nothing": said(),
    "calls": CALLS,
    "only a call": [CALLS[2], CALLS[3], CALLS[5]],
    "a cut call": [*CALLS[:3], Delta("", outputs(1), [17], finish_reason="length")],
}


def new_answer(body: ResponsesRequest, store: ResponseStore | None = None) -> ResponsesAnswer:
    return ResponsesAnswer("r", "nano", TOKENIZER, body, body.chat(store, "a"), store, "a")


def joined(deltas: Sequence[Delta]) -> Delta:
    whole = Delta()
    for delta in deltas:
        whole.add(delta)
    return whole


def parsed(frames: Sequence[bytes]) -> list[dict[str, Any]]:
    """The events of a stream, read by OpenAI's own types and in unbroken order."""
    events = []
    for number, frame in enumerate(frames):
        head, data, *rest = frame.decode().split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert rest == ["", ""]
        assert head == f"event: {body['type']}"
        assert body["sequence_number"] == number
        assert EVENT.validate_python(body).type == body["type"]
        events.append(body)
    return events


def stream(body: ResponsesRequest, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    answer = new_answer(body)
    frames = list(answer.opening(1))
    for delta in deltas:
        frames += answer.piece(0, delta)
    return parsed([*frames, *answer.closing(USED)])


def grown(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client builds it from the events alone; one item is open at a time."""
    output: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
        elif "item_id" in event:
            item = output[-1]
            assert (event["item_id"], event["output_index"]) == (item["id"], len(output) - 1)
            if kind == "content_part.added":
                item["content"].append(event["part"])
            elif kind == "output_text.delta":
                item["content"][0]["text"] += event["delta"]
                item["content"][0]["logprobs"] += event["logprobs"]
            elif kind == "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            elif kind == "function_call_arguments.done":
                assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
            elif kind == "output_text.done":
                assert event["text"] == item["content"][0]["text"]
                assert event["logprobs"] == item["content"][0]["logprobs"]
            else:
                assert kind == "content_part.done"
                assert event["part"] == item["content"][0]
        elif kind == "output_item.done":
            assert event["item"] == {**output[-1], "status": event["item"]["status"]}
            output[-1] = event["item"]
    return output


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_stream_tells_what_the_whole_says(scenario: str, logprobs: bool) -> None:
    body = request(include=[LOGPROBS] if logprobs else [], tools=[READ], stream=True)
    deltas = SCENARIOS[scenario]
    events = stream(body, deltas)
    whole = new_answer(body).whole([joined(deltas)], USED)
    assert Response.model_validate(whole, strict=True).status == whole["status"]
    final = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert grown(events[2:-1]) == final["output"] == whole["output"]
    times = {"created_at": 0, "completed_at": 0}
    assert {**final, **times} == {**whole, **times}


@given(st.text(max_size=12), st.sets(st.integers(0, 12)), st.sampled_from(["stop", "length"]))
def test_where_a_text_is_cut_into_deltas_makes_no_difference(
    text: str, cuts: set[int], finish: str
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    body = request(include=[LOGPROBS], stream=True)
    deltas = said(*pieces, finish=finish)
    events = stream(body, deltas)
    whole = new_answer(body).whole([joined(deltas)], USED)
    assert grown(events[2:-1]) == whole["output"]
    assert Response.model_validate(whole).output_text == text
    assert len(whole["output"][0]["content"][0]["logprobs"]) == len(pieces) + 1


@settings(max_examples=300)
@given(st.sampled_from(sorted(ResponsesRequest.model_fields)), ODD)
def test_odd_values_are_answered_or_refused_and_never_repeated(field: str, value: object) -> None:
    try:
        body = request(**{field: value})
        answer = new_answer(body, new_store())
    except ValidationError as error:
        refused = validation_error(error.errors())
    except ApiError as error:
        refused = error
    else:
        whole = JSONResponse(answer.whole([joined(CALLS)], USED))
        Response.model_validate_json(bytes(whole.body))
        return
    assert refused.status == 400
    assert SECRET not in refused.message


def kinds(deltas: Sequence[Delta]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in stream(request(), deltas)]


def test_the_events_of_a_text_come_in_openais_order() -> None:
    assert kinds(said("Hel", "lo")) == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip


def test_the_events_of_a_call_come_in_openais_order() -> None:
    assert kinds(SCENARIOS["only a call"]) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_what_the_limit_cut_is_incomplete_and_says_why() -> None:
    whole = new_answer(request()).whole([joined(SCENARIOS["a cut call"])], USED)
    assert (whole["status"], whole["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    assert "completed_at" not in whole


def test_tokens_of_calls_are_not_among_the_texts_log_probabilities() -> None:
    whole = new_answer(request(include=[LOGPROBS])).whole([joined(CALLS)], USED)
    message, *calls = Response.model_validate(whole).output
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    scores = message.content[0].logprobs
    assert scores is not None
    assert [score.logprob for score in scores] == [-0.5]
    assert bytes(scores[0].bytes) == TOKENIZER.token_bytes(300)
    assert [top.logprob for top in scores[0].top_logprobs] == [-0.5, -1.0]
    assert [call.type for call in calls] == ["function_call", "function_call"]


def test_a_stream_that_cannot_go_on_ends_with_what_there_is() -> None:
    answer = new_answer(request())
    frames = [*answer.opening(1), *answer.piece(0, Delta("Hel"))]
    frames += answer.failure(ApiError(500, "The engine was lost."))
    last = parsed(frames)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The engine was lost."}


def test_a_response_repeats_its_request() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.",
        "metadata": {"k": "v"},
        "max_output_tokens": 9,
        "temperature": 0.5,
        "parallel_tool_calls": False,
        "tools": [{**READ, "strict": True}],
        "tool_choice": {"type": "function", "name": "read"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        "user": "u",
    }
    whole = new_answer(request(**fields)).whole([joined(CALLS)], USED)
    assert {name: whole[name] for name in fields} == fields
    assert (whole["id"], whole["model"], whole["store"]) == ("resp_r", "nano", False)
    assert Response.model_validate(whole).usage is not None
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert whole["usage"]["total_tokens"] == 13


@pytest.mark.parametrize("streamed", [False, True])
def test_a_next_response_knows_the_conversation_but_not_the_instructions(streamed: bool) -> None:
    store = new_store()
    first = request(input="one", instructions="Be brief.")
    answer = new_answer(first, store)
    if streamed:
        frames = [frame for delta in CALLS for frame in answer.piece(0, delta)]
        body = parsed([*frames, *answer.closing(USED)])[-1]["response"]
    else:
        body = answer.whole([joined(CALLS)], USED)
    found = store.find("a", "resp_r")
    assert found is not None
    assert (found.body, body["store"]) == (body, True)
    result = {"type": "function_call_output", "call_id": "call_0", "output": "two"}
    second = request(input=[result], previous_response_id="resp_r", instructions="Be long.")
    messages = second.chat(store, "a").messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool"]
    assert [message.text for message in messages] == ["Be long.", "one", "Sure", "two"]
    assert [c.function.name for c in messages[2].tool_calls or ()] == ["read", "write"]
    assert (messages[2].tool_calls or [])[0].function.arguments == '{"a": 1}'


def test_another_tenants_response_is_unknown() -> None:
    store = new_store()
    new_answer(request(), store).whole([joined(CALLS)], USED)
    with pytest.raises(ApiError) as raised:
        request(previous_response_id="resp_r").chat(store, "b")
    assert raised.value.status == 400
    assert raised.value.code == "previous_response_not_found"


def test_a_client_that_says_so_leaves_nothing_behind() -> None:
    store = new_store()
    body = new_answer(request(store=False), store).whole([joined(CALLS)], USED)
    assert body["store"] is False
    assert len(store) == 0

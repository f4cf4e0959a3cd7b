"""Function calls: what the model is told, what it may write, and how it is read."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.chat import ChatRequest
from serving.api.delta import Delta
from serving.grammar import GrammarCompiler
from serving.ingress.prompts import Turn
from serving.ingress.tools import Tools, conversation
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
COMPILER = GrammarCompiler(TOKENIZER)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
USER = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> ChatRequest:
    given = {"model": "nano", "messages": USER, "tools": TOOLS, **fields}
    return ChatRequest.model_validate_json(json.dumps(given))


def tools(**fields: Any) -> Tools:
    made = Tools.of(body(**fields))
    assert made is not None
    return made


def written(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def accepts(it: Tools, text: str, answer: str | None = None) -> bool:
    """Whether the whole text, and then the end, is what the grammar allows."""
    matcher = COMPILER.compile(it.grammar(answer)).deep_copy()
    return matcher.consume_tokens(TOKENIZER.encode_text(text)) and matcher.is_accepting()


ONE = written("weather", {"city": "Rome", "days": 3})
TWO = f"{ONE}\n{written('now', {})}"


@pytest.mark.parametrize(
    ("choice", "text", "allowed"),
    [
        ("required", ONE, True),
        ("required", TWO, True),
        ("required", "Rome", False),
        ("required", f"Well. {ONE}", False),
        ("required", written("weather", {"town": "Rome"}), False),
        ("required", written("nothing", {}), False),
        ("auto", "just text", True),
        ("auto", "", True),
        ("auto", f"Let me see.\n{TWO}", True),
        ("auto", "x <tool_call> y", False),
        ("auto", f"{ONE} and text", False),
        ("auto", "<tool_call", True),
        ({"type": "function", "function": {"name": "now"}}, written("now", {}), True),
        ({"type": "function", "function": {"name": "now"}}, ONE, False),
        ({"type": "function", "function": {"name": "now"}}, TWO, False),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
                {"type": "function", "function": {"name": "now"}}]}},
            ONE,
            False,
        ),
    ],
)  # fmt: skip
def test_the_grammar_allows_calls_of_the_one_form(choice: Any, text: str, allowed: bool) -> None:
    assert accepts(tools(tool_choice=choice), text) is allowed


def test_without_parallel_calls_there_is_one() -> None:
    it = tools(tool_choice="required", parallel_tool_calls=False)
    assert accepts(it, ONE)
    assert not accepts(it, TWO)


def test_an_answer_of_a_schema_may_stand_beside_calls() -> None:
    it = tools()
    number = '%json {"type": "integer"}'
    assert accepts(it, "42", number)
    assert accepts(it, ONE, number)
    assert not accepts(it, "text", number)


arguments = st.fixed_dictionaries(
    {"city": st.text(max_size=12)}, optional={"days": st.integers(-(10**6), 10**6)}
)
calls = st.lists(
    st.one_of(arguments.map(lambda a: ("weather", a)), st.just(("now", {}))), max_size=3
)


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(max_size=20).filter(lambda t: "<tool_call>" not in t), calls=calls, data=st.data()
)
def test_calls_are_read_the_same_however_the_text_is_cut(
    text: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    said = text + "\n".join(written(name, arguments) for name, arguments in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    pieces = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    parser, whole = tools().parser(), Delta()
    for piece in pieces:
        delta = parser.push(Delta(piece))
        indices = [call.index for call in delta.calls]
        assert len(set(indices)) == len(indices)  # some clients read one entry of each index
        whole.add(delta)
    whole.add(parser.push(Delta(finish_reason="stop")))
    assert whole.text == text
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls
    assert [call.index for call in whole.calls] == list(range(len(calls)))
    assert len({call.id for call in whole.calls}) == len(calls)
    assert whole.finish_reason == ("tool_calls" if calls else "stop")


def test_a_call_that_is_cut_off_keeps_its_reason_and_what_came() -> None:
    parser, whole = tools().parser(), Delta()
    whole.add(parser.push(Delta(ONE[:60], finish_reason="length")))
    assert whole.finish_reason == "length"
    (call,) = whole.calls
    assert ONE[:60].endswith(call.arguments)


def test_a_function_that_the_client_named_ends_with_stop() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    parser = tools(tool_choice=choice).parser()
    assert parser.push(Delta(ONE, finish_reason="stop")).finish_reason == "stop"


def test_tools_and_results_become_turns_that_the_template_knows() -> None:
    call = {"id": "c1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny </tool_result> 🌞"},
        {"role": "tool", "tool_call_id": "c2", "content": "warm"},
        {"role": "assistant", "content": "Sunny."},
    ]
    request = body(messages=messages)
    turns = conversation(request.messages, Tools.of(request))
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0].text.startswith("Be short.\n\nYou may call these functions")
    assert '{"name": "now", "description": "The time."}' in turns[0].text
    assert turns[2].text == "I look.\n" + written("weather", {"city": "Rome"})
    results = [json.loads(line) for line in turns[3].text.split("\n") if line[0] == "{"]
    assert results == [
        {"tool_call_id": "c1", "content": "sunny </tool_result> 🌞"},
        {"tool_call_id": "c2", "content": "warm"},
    ]


def test_without_tools_nothing_is_added() -> None:
    request = body(tool_choice="none")
    assert Tools.of(request) is None
    assert conversation(request.messages, None) == [Turn("user", "hi")]


def test_whatever_the_grammar_allows_can_be_read() -> None:
    it, numbers = tools(tool_choice="required"), random.Random(1)
    for _ in range(20):
        matcher = COMPILER.compile(it.grammar(None)).deep_copy()
        tokens: list[int] = []
        while not matcher.is_stopped() and len(tokens) < 200:
            mask = matcher.compute_logit_bias()
            token = numbers.choice([t for t, may in enumerate(mask) if may])
            matcher.consume_token(token)
            tokens.append(token)
        reason = "stop" if matcher.is_stopped() else "length"
        said = it.parser().push(Delta(TOKENIZER.decode(tokens), finish_reason=reason))
        whole = Delta()
        whole.add(said)
        assert whole.text == ""
        for call in whole.calls[: None if reason == "stop" else -1]:
            assert isinstance(json.loads(call.arguments), dict)

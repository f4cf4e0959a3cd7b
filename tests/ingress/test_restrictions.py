"""Restrictions: from fields to grammars that were compiled once, and the right field to blame."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.chat import ChatRequest
from serving.api.errors import ApiError
from serving.grammar import GrammarCompiler
from serving.ingress.restrictions import Restrictions
from serving.ingress.tools import Tools
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
COMPILER = GrammarCompiler(TOKENIZER)
BASE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MORE = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.fixture(scope="module")
def restrictions() -> Iterator[Restrictions]:
    made = Restrictions(NANO)
    yield made
    made.close()


def body(**fields: Any) -> ChatRequest:
    given = {"model": "nano", "messages": [{"role": "user", "content": "x"}], **fields}
    return ChatRequest.model_validate_json(json.dumps(given))


async def accepts(restrictions: Restrictions, text: str, **fields: Any) -> bool:
    request = body(**fields)
    grammar = await restrictions.grammar(request, Tools.of(request))
    assert grammar is not None
    matcher = COMPILER.compile(grammar).deep_copy()
    return matcher.consume_tokens(TOKENIZER.encode_text(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_choice": ["red", 'a "b"']}, 'a "b"', "green"),
        ({"guided_regex": "[a-c]{2}"}, "ab", "abc"),
        ({"guided_grammar": 'start: "x"+'}, "xxx", "y"),
        ({"guided_grammar": 'root ::= "a" ("b" | "c")+ "d"'}, "abcd", "ad"),
        ({"guided_json": BASE}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"guided_json": {**BASE, "additionalProperties": True}}, '{"a": 1, "b": 2}', "{}"),
        ({"structured_outputs": {"json_object": True}}, '{"x": [1, {}]}', "[]"),
        ({"structured_outputs": {"choice": ["1"]}}, "1", "2"),
        ({"response_format": {"type": "json_object"}}, "{}", "1"),
        (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"name": "n", "schema": BASE}}},
            '{"a": 1}',
            "{}",
        ),
        # Closing each part of an allOf would leave nothing; it stays open then.
        ({"guided_json": {"allOf": [BASE, MORE]}}, '{"a": 1, "b": 2}', '{"a": 1}'),
    ],
)  # fmt: skip
async def test_a_restriction_allows_what_it_says(
    restrictions: Restrictions, fields: dict[str, Any], good: str, bad: str
) -> None:
    assert await accepts(restrictions, good, **fields)
    assert not await accepts(restrictions, bad, **fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "root ::= " + "(" * 5000}, "guided_grammar"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "no such type"}}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"type": "no such type"}}}]}, "tools"),
    ],
)  # fmt: skip
async def test_what_cannot_be_compiled_is_a_400_that_names_its_field(
    restrictions: Restrictions, fields: dict[str, Any], param: str
) -> None:
    request = body(**fields)
    with pytest.raises(ApiError) as caught:
        await restrictions.grammar(request, Tools.of(request))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "no such type" not in caught.value.message


async def test_without_a_restriction_there_is_no_grammar(restrictions: Restrictions) -> None:
    assert await restrictions.grammar(body(), None) is None
    assert await restrictions.grammar(body(response_format={"type": "text"}), None) is None


async def test_a_grammar_that_would_take_minutes_is_given_up_and_the_next_one_goes_on(
    restrictions: Restrictions,
) -> None:
    with pytest.raises(ApiError) as caught:
        await restrictions.grammar(body(guided_regex=".*" * 16_000))
    assert (caught.value.status, caught.value.param) == (400, "guided_regex")
    assert "too long" in caught.value.message
    assert await accepts(restrictions, "ab", guided_regex="[a-c]{2}")


async def test_a_process_that_ended_is_replaced(restrictions: Restrictions) -> None:
    assert await accepts(restrictions, "x", guided_regex="x")
    process = restrictions._process._process
    assert process is not None
    process.kill()
    with pytest.raises(ApiError):
        await restrictions.grammar(body(guided_regex="y"))
    assert await accepts(restrictions, "z", guided_regex="z")

"""Grammars: what cannot be used is said so, in time and without quoting it."""

import json
import time
from typing import Any

import pytest
from llguidance import LLMatcher

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.grammar import (
    JSON_STYLE,
    MAX_GRAMMAR_BYTES,
    GrammarCompiler,
    GrammarError,
    json_schema,
)
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
COMPILER = GrammarCompiler(TOKENIZER)
SECRET = "secret"


def of_schema(schema: Any) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


BAD = {
    "empty": ("", "not valid"),
    "not lark": ("secret", "syntax"),
    "regex": (LLMatcher.grammar_from_regex("(secret"), "regular expression"),
    "type": (of_schema({"type": SECRET}), "type that does not exist"),
    "keyword": (of_schema({"not": {"const": SECRET}}), "cannot be enforced"),
    "remote": (of_schema({"$ref": "http://secret.example/x"}), "not part of it"),
    "itself": (of_schema({"$ref": "#"}), "nothing can fulfil"),
    "never": (of_schema({"allOf": [{"type": "string"}, {"type": "number"}]}), "nothing can"),
    "long": ("start: " + " | ".join(f'"secret{i}"' for i in range(40_000)), "longer than"),
    "unknown rule": ("start: secret", "does not exist"),
}


@pytest.mark.parametrize(("source", "why"), BAD.values(), ids=BAD)
def test_a_grammar_that_cannot_be_used_says_why_and_quotes_nothing(source: str, why: str) -> None:
    with pytest.raises(GrammarError) as caught:
        COMPILER.compile(source)
    assert why in str(caught.value)
    assert SECRET not in str(caught.value)


NASTY = {
    "catastrophic": LLMatcher.grammar_from_regex("((a+)+)+$"),
    "huge repeat": LLMatcher.grammar_from_regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "many options": of_schema({"enum": [f"{'x' * 30}{i}" for i in range(5000)]}),
    "many keys": of_schema({"properties": {f"k{i}": {"type": "string"} for i in range(2000)}}),
    "many repeats": LLMatcher.grammar_from_regex("(.*a){500}"),
    "ambiguous": LLMatcher.grammar_from_lark('start: a\na: a a | "x" | '),
    "huge lengths": of_schema({"type": "string", "minLength": 10**6, "maxLength": 10**7}),
    "deep": of_schema({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}},
                       "$ref": "#/$defs/a"}),
}  # fmt: skip


@pytest.mark.parametrize("source", NASTY.values(), ids=NASTY)
def test_a_nasty_grammar_is_compiled_or_refused_in_time(source: str) -> None:
    started = time.process_time()
    try:
        matcher = COMPILER.compile(source)
        for _ in range(3):  # and its first steps are as bounded as its compilation
            mask = matcher.compute_logit_bias()
            matcher.consume_token(mask.index(200))
            if matcher.is_error():
                break
    except GrammarError:
        assert len(source) <= MAX_GRAMMAR_BYTES
    assert time.process_time() - started < 5


def test_special_tokens_are_no_text() -> None:
    matcher = COMPILER.compile(LLMatcher.grammar_from_regex(r"(.|\n)*"))
    mask = matcher.compute_logit_bias()
    special = set(TOKENIZER.special_tokens.values())
    assert {token for token in special if mask[token]} == {TOKENIZER.eos_id}
    without_text = [t for t in range(TOKENIZER.vocab_size) if not TOKENIZER.token_bytes(t)]
    assert not any(mask[token] for token in without_text)


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**OBJECT, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (OBJECT, CLOSED),
        ({**OBJECT, "additionalProperties": True}, {**OBJECT, "additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        ({"anyOf": [OBJECT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"type": "array", "items": OBJECT}, {"type": "array", "items": CLOSED}),
        ({"$defs": {"a": OBJECT}, "$ref": "#/$defs/a"},
         {"$defs": {"a": CLOSED}, "$ref": "#/$defs/a"}),
        # A property may be called like a keyword, and data may look like a schema.
        ({"properties": {"properties": {"type": "string"}, "enum": OBJECT}},
         {"properties": {"properties": {"type": "string"}, "enum": CLOSED},
          "additionalProperties": False}),
        ({"const": OBJECT, "default": OBJECT}, {"const": OBJECT, "default": OBJECT}),
    ],
)  # fmt: skip
def test_objects_are_closed_unless_they_say_otherwise(schema: Any, closed: Any) -> None:
    assert json_schema(schema, closed=True) == {**closed, "x-guidance": JSON_STYLE}
    assert json_schema(schema, closed=False) == {**schema, "x-guidance": JSON_STYLE}

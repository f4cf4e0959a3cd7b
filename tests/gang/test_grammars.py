"""Grammars of the last stage: a function of grammar and output, whatever happened between."""

import random

import pytest
from llguidance import LLMatcher

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.gang.grammars import Grammars
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
SCHEMA = LLMatcher.grammar_from_json_schema(
    '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}'
)


def grammars() -> Grammars:
    return Grammars(lambda: TOKENIZER)


def walk(seed: int, length: int) -> list[tuple[list[int], bytes]]:
    """Random outputs that a grammar allows, and what it allowed after each."""
    numbers, output, steps = random.Random(seed), [], []
    grammar = grammars().begin(SCHEMA, [])
    for _ in range(length):
        allowed = grammar.allowed()
        assert allowed is not None
        steps.append((list(output), allowed))
        token = numbers.choice([t for t, may in enumerate(allowed) if may])
        if token == TOKENIZER.eos_id:
            break
        output.append(token)
        grammar.append([token])
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_that_comes_back_goes_on_where_it_was(seed: int) -> None:
    other = grammars()
    for output, allowed in walk(seed, 30):
        assert other.begin(SCHEMA, output).allowed() == allowed


def test_sequences_of_one_grammar_do_not_disturb_each_other() -> None:
    it = grammars()
    first, second = it.begin(SCHEMA, []), it.begin(SCHEMA, [])
    before = second.allowed()
    first.append(TOKENIZER.encode_text('{"a": '))
    assert first.allowed() != before
    assert second.allowed() == before


def test_a_grammar_that_fails_is_its_sequences_own_error() -> None:
    it = grammars()
    bad, good = it.begin("nonsense", []), it.begin(SCHEMA, [])
    assert bad.allowed() is None
    assert bad.error is not None
    assert "nonsense" not in bad.error
    assert good.allowed() is not None
    assert good.error is None
    good.append(TOKENIZER.encode_text("not JSON at all"))
    assert good.allowed() is None
    assert good.error is not None


def test_without_a_tokenizer_only_those_who_need_a_grammar_fail() -> None:
    def missing() -> Tokenizer:
        raise FileNotFoundError

    grammar = Grammars(missing).begin(SCHEMA, [])
    assert grammar.allowed() is None
    assert grammar.error is not None


def test_only_so_many_grammars_are_kept() -> None:
    it = grammars()
    for i in range(100):
        assert it.begin(LLMatcher.grammar_from_regex(f"a{{{i + 1}}}"), []).allowed() is not None
    assert len(it._compiled) <= 64

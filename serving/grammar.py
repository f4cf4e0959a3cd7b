"""Grammars: what a text may be, token by token. Shared by those who check and those who apply.

A grammar travels as llguidance's own text (JSON, or its dialect of Lark). The ingress compiles
each one before it lets a request in; the ranks of the last stage compile it again and mask
logits with it. Both use the same vocabulary and the same limits, so that what passed the first
passes the second. The limits bound what a step costs and how large a grammar's states grow, a
few tens of megabytes; what bounds the time of a compilation is that the ingress gives up on it.
"""

from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 256 * 1024

# How `json.dumps` writes: what a model of code knows best, and no room for endless blanks.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # hold schemas by name
_DATA = ("enum", "const", "default", "examples")  # hold no schemas


def json_schema(schema: dict[str, Any], closed: bool) -> dict[str, Any]:
    """A schema as the grammars use it, in `JSON_STYLE`.

    Args:
        closed: objects have the properties that they name and no others, unless the schema says
            something of the others itself. That is what its author nearly always means, and a
            model that may invent properties may go on inventing them.
    """
    return {**(_closed(schema) if closed else schema), "x-guidance": JSON_STYLE}


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value if key in _DATA else _closed_parts(value) if key in _NAMED else _closed(value)
        for key, value in schema.items()
    }
    if isinstance(schema.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


def _closed_parts(parts: Any) -> Any:
    """Schemas by name: the names are no keywords."""
    if not isinstance(parts, dict):
        return parts
    return {name: _closed(schema) for name, schema in parts.items()}


class GrammarError(Exception):
    """A grammar that cannot be compiled, or nothing fits it; says nothing of its text."""


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: ids, bytes, and which ids are no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) or b"" for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_text(text)


class GrammarCompiler:
    """Compiles grammars over one vocabulary; may be used by several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._environment = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        # Lexer fuel is spent at about 50,000 a millisecond when compiling and 14,000 in a step,
        # items at 20,000 a millisecond; a lexer state takes 1 to 2 KB.
        self._limits = LLParserLimits(
            initial_lexer_fuel=2_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=20_000,
            max_grammar_size=200_000,
            verbose_errors=False,  # they would quote the grammar
        )

    def compile(self, source: str) -> LLMatcher:
        """A matcher at its beginning. Long grammars take a while; the GIL is free meanwhile.

        Raises:
            GrammarError: it is not a grammar, it exceeds the limits, or it allows nothing.
        """
        if len(source.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
        matcher = LLMatcher(self._environment, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        matcher.compute_bitmask()  # what no text can fulfil shows here
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return matcher


def _reason(error: str) -> str:
    """Why, in words of our own: the library's quote the grammar."""
    known = {
        "Unimplemented": "it uses keywords that cannot be enforced",
        "Unsatisfiable": "nothing can fulfil it",
        "NoExtension": "nothing can fulfil it",
        "Invalid type": "it names a type that does not exist",
        "Resource": "it refers to a schema that is not part of it",
        "regex": "a regular expression in it is not valid or not supported",
        "Expected": "its syntax is not valid",
        "unknown name": "it refers to a rule that does not exist",
        "fuel": "it is too complex",
        "too large": "it is too large",
        "too big": "it is too large",
        "TooComplex": "it is too complex",
    }
    return next((text for word, text in known.items() if word in error), "it is not valid")

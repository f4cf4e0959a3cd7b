"""What a text must be, as grammars: from the request's fields, checked before it is let in."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from model.tokenizer import Tokenizer
from serving.api.errors import ApiError
from serving.api.sampling import Sampling, StructuredOutputs
from serving.grammar import GrammarCompiler, GrammarError, json_schema
from serving.ingress.tools import Tools

_COMPILE_TIMEOUT_S = 10.0
_REMEMBERED = 1024


def grammar_of(wanted: StructuredOutputs, closed: bool) -> str:
    """The grammar of a restriction, not checked; `closed` as in `json_schema`."""
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        options = " | ".join(json.dumps(option) for option in wanted.choice)
        return LLMatcher.grammar_from_lark(f"start: {options}")
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
    return LLMatcher.grammar_from_json_schema(_schema(wanted, closed))


def _schema(wanted: StructuredOutputs, closed: bool) -> dict[str, Any]:
    schema = wanted.json_ if wanted.json_ is not None else {"type": "object"}
    return json_schema(schema, closed)


class Restrictions:
    """Checks grammars in a thread of its own, and remembers which were good."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiler = self._pool.submit(GrammarCompiler, tokenizer)
        self._good: OrderedDict[bytes, None] = OrderedDict()

    async def grammar(self, body: Sampling, tools: Tools | None = None) -> str | None:
        """What the whole text of an answer must be, checked; None: anything.

        Raises:
            ApiError: 400, it cannot be compiled within the limits; 503, no time to try.
        """
        param, wanted = next(iter(body.restrictions.items()), (None, None))
        if tools is not None:
            return await self._check(partial(_tool_grammar, tools, wanted), "tools")
        if wanted is not None:
            return await self._check(partial(grammar_of, wanted), param)
        return None

    async def _check(self, make: Callable[[bool], str], param: str | None) -> str:
        job = self._pool.submit(self._checked, make)
        try:
            async with asyncio.timeout(_COMPILE_TIMEOUT_S):
                return await asyncio.wrap_future(job)
        except GrammarError as error:
            raise ApiError(400, f"The grammar cannot be used: {error}.", param) from error
        except TimeoutError:
            if job.cancel():  # it has not begun: others' grammars are to blame
                message = "Too many grammars are being checked."
                raise ApiError(503, message, param, retry_after_s=_COMPILE_TIMEOUT_S) from None
            raise ApiError(400, "The grammar took too long to compile.", param) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _checked(self, make: Callable[[bool], str]) -> str:
        """The grammar with closed objects; with open ones where nothing fits the closed ones."""
        try:
            return self._compiled(make, closed=True)
        except GrammarError:
            return self._compiled(make, closed=False)

    def _compiled(self, make: Callable[[bool], str], closed: bool) -> str:
        try:
            grammar = make(closed)
            name = sha256(grammar.encode()).digest()
        except (ValueError, RecursionError, GbnfToLarkError) as error:
            raise GrammarError("it is not valid") from error
        if name not in self._good:
            self._compiler.result().compile(grammar)
            if len(self._good) == _REMEMBERED:
                self._good.popitem(last=False)
        self._good[name] = None
        self._good.move_to_end(name)
        return grammar


def _tool_grammar(tools: Tools, wanted: StructuredOutputs | None, closed: bool) -> str:
    answer = None if wanted is None else f"%json {json.dumps(_schema(wanted, closed))}"
    return tools.grammar(answer, closed)

"""What a text must be, as grammars: from the request's fields, checked before it is let in."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from serving.api.errors import ApiError
from serving.api.sampling import Sampling, StructuredOutputs
from serving.grammar import GrammarError, json_schema
from serving.ingress.grammar_process import GrammarProcess, GrammarTooCostly
from serving.ingress.tools import Tools

_TURN_TIMEOUT_S = 10.0  # longest wait behind other grammars
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
    """Checks grammars, one after another, and remembers which were good.

    Args:
        directory: the checkpoint, for its tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._process = GrammarProcess(directory)
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
            async with asyncio.timeout(_TURN_TIMEOUT_S):
                return await asyncio.wrap_future(job)
        except GrammarError as error:
            raise ApiError(400, f"The grammar cannot be used: {error}.", param) from error
        except TimeoutError:
            job.cancel()
            message = "Too many grammars are being checked."
            raise ApiError(503, message, param, retry_after_s=_TURN_TIMEOUT_S) from None

    def close(self) -> None:
        self._pool.submit(self._process.close)  # after what is running: it takes bounded time
        self._pool.shutdown(wait=False)

    def _checked(self, make: Callable[[bool], str]) -> str:
        """The grammar with closed objects; with open ones where nothing fits the closed ones."""
        try:
            return self._compiled(make, closed=True)
        except GrammarTooCostly:
            raise
        except GrammarError:
            return self._compiled(make, closed=False)

    def _compiled(self, make: Callable[[bool], str], closed: bool) -> str:
        try:
            grammar = make(closed)
            name = sha256(grammar.encode()).digest()
        except (ValueError, RecursionError, GbnfToLarkError) as error:
            raise GrammarError("it is not valid") from error
        if name not in self._good:
            self._process.check(grammar)
            if len(self._good) == _REMEMBERED:
                self._good.popitem(last=False)
        self._good[name] = None
        self._good.move_to_end(name)
        return grammar


def _tool_grammar(tools: Tools, wanted: StructuredOutputs | None, closed: bool) -> str:
    answer = None if wanted is None else f"%json {json.dumps(_schema(wanted, closed))}"
    return tools.grammar(answer, closed)

"""Grammars on the last stage: compiled beside the step loop, then asked for one mask a token.

What a grammar allows next is a function of the grammar and the output so far. A sequence that
comes back after a preemption, or on another replica, brings its output along, so nothing else
has to be kept for it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from model.tokenizer import Tokenizer
from serving.grammar import GrammarCompiler, GrammarError

_REMEMBERED = 64  # compiled grammars that are kept for the next request


class Grammar:
    """One sequence's place in its grammar.

    A grammar that fails, at compilation or later, sets `error` and allows everything from then
    on: the request ends with that error, and what was sampled for it means nothing.
    """

    def __init__(self, compiled: "Future[LLMatcher]", output: Sequence[int]) -> None:
        self.error: str | None = None
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._behind = list(output)  # tokens that the matcher has not seen

    def append(self, tokens: Sequence[int]) -> None:
        self._behind += tokens

    def allowed(self) -> bytes | None:
        """A byte for each token, 0 if it may not come next; waits for the compilation."""
        try:
            if self._matcher is None:
                self._matcher = self._compiled.result().deep_copy()
            behind, self._behind = self._behind, []
            self._matcher.consume_tokens(behind)
            mask = self._matcher.compute_logit_bias()
            if self._matcher.is_error():
                raise GrammarError("the output became too complex for it")
        except Exception as failure:  # whatever it is, it is this request's alone
            reason = str(failure) if isinstance(failure, GrammarError) else "it cannot be used"
            self.error = f"The grammar failed: {reason}."
            return None
        return mask


class Grammars:
    """The compiled grammars of one rank.

    Args:
        tokenizer: makes the tokenizer; called once, on the thread that compiles.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiler = self._pool.submit(lambda: GrammarCompiler(tokenizer()))
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def begin(self, source: str, output: Sequence[int]) -> Grammar:
        """Starts to compile; returns at once.

        Args:
            output: what was generated under this grammar before.
        """
        compiled = self._compiled.pop(source, None)
        if compiled is None:
            compiled = self._pool.submit(lambda: self._compiler.result().compile(source))
        self._compiled[source] = compiled
        if len(self._compiled) > _REMEMBERED:
            self._compiled.popitem(last=False)
        return Grammar(compiled, output)

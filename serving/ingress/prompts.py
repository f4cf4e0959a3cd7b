"""From what a client wrote to token ids.

A chat template is rendered with markers in place of special tokens and encoded piece by piece
between them, so the template's special tokens become ids while the same characters inside a
message stay text. Templates run in Jinja's immutable sandbox. Long texts are encoded on a
thread, so that the event loop goes on serving streams.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.tokenizer import Tokenizer
from serving.api.errors import ApiError

_INLINE_CHARACTERS = 2048
_CHARACTERS_PER_TOKEN = 4  # of code, roughly: a text with more per token is worth a check
_PART_CHARACTERS = 16384
_TOKENS_AT_A_CUT = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as the model's template knows them."""

    role: str  # system, user or assistant
    text: str


class ChatTemplate:
    """The checkpoint's own chat template."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        nonce = secrets.token_hex(16)
        literals = sorted(tokenizer.special_tokens, key=len, reverse=True)
        markers = {literal: f"\x00{nonce}:{i}\x00" for i, literal in enumerate(literals)}
        self._ids = {markers[literal]: tokenizer.special_tokens[literal] for literal in literals}
        self._split = re.compile(f"(\x00{nonce}:[0-9]+\x00)")
        marker_of = {token: marker for marker, token in self._ids.items()}
        self._bos = marker_of.get(tokenizer.bos_id, "")
        self._eos = marker_of.get(tokenizer.eos_id, "")
        for literal in literals:
            source = source.replace(literal, markers[literal])
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        self._template = environment.from_string(source)
        self._end_here = f"\x00{nonce}:end\x00"

    def render(self, turns: Sequence[Turn], continue_last: bool = False) -> list[str | int]:
        """The conversation up to the assistant's next words: texts and special ids, in order.

        Args:
            continue_last: the next words belong to the last turn, an assistant's.

        Raises:
            ApiError: 400, the template refuses this conversation.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        if continue_last:
            messages[-1]["content"] += self._end_here
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=not continue_last,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except _Refusal as error:
            raise ApiError(400, f"The chat template refuses it: {error}", "messages") from error
        except TemplateError as error:
            raise ApiError(400, "The chat template cannot render this.", "messages") from error
        if continue_last:
            text, found, _ = text.partition(self._end_here)
            if not found:
                message = "This model's chat template cannot continue a message."
                raise ApiError(400, message, "continue_final_message")
        return [self._ids.get(piece, piece) for piece in self._split.split(text) if piece]


class _Refusal(TemplateError):
    """What a template itself says against a conversation."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


class Prompts:
    """Encodes prompts, off the event loop when they are long.

    Args:
        context: the longest prompt that makes sense now, in tokens.
        fim: whether the model was trained to fill in the middle.
    """

    def __init__(self, tokenizer: Tokenizer, context: Callable[[], int], fim: bool) -> None:
        self.tokenizer = tokenizer
        self._context = context
        self._fim = tokenizer.fim if fim else None
        self._template = (
            ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else None
        )
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    async def completion(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a plain prompt; text gets the begin-of-sentence token in front."""
        if isinstance(prompt, str):
            return await self.encode([*self._begin, prompt], "prompt")
        if not prompt:
            raise ApiError(400, "The prompt is empty.", "prompt")
        if max(prompt) >= self.tokenizer.vocab_size:
            raise ApiError(400, "A token id is outside the vocabulary.", "prompt")
        return prompt

    async def middle(self, prefix: str | list[int], suffix: str) -> list[int]:
        """Token ids of a prompt whose completion stands between prefix and suffix."""
        fim = self._fim
        if fim is None:
            message = (
                "This model was not trained to fill in the middle; leave out suffix. "
                "DeepSeek-Coder-V2-Lite was trained for it."
            )
            raise ApiError(400, message, "suffix")
        given = [prefix] if isinstance(prefix, str) else await self.completion(prefix)
        pieces = [*self._begin, fim.begin, *given, fim.hole, suffix, fim.end]
        return await self.encode(pieces, "prompt")

    async def chat(self, turns: Sequence[Turn], continue_last: bool = False) -> list[int]:
        """Token ids of a conversation."""
        if self._template is None:
            raise ApiError(400, "This model has no chat template; use /v1/completions.")
        template = self._template
        if sum(len(turn.text) for turn in turns) > _INLINE_CHARACTERS:
            loop = asyncio.get_running_loop()
            render = partial(template.render, turns, continue_last)
            pieces = await loop.run_in_executor(self._pool, render)
        else:
            pieces = template.render(turns, continue_last)
        return await self.encode(pieces, "messages")

    async def words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the beginning of a text and after a space."""
        runs: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                if run := await self.encode([text], "bad_words"):
                    runs[tuple(run)] = None
        return tuple(runs)

    async def encode(self, pieces: list[str | int], param: str) -> list[int]:
        """Token ids of texts and special tokens in turn.

        Raises:
            ApiError: 400, too long for any context, or not valid Unicode.
        """
        length = sum(len(piece) for piece in pieces if isinstance(piece, str))
        try:
            if length <= _INLINE_CHARACTERS:
                return self.tokenizer.encode_pieces(pieces)
            loop = asyncio.get_running_loop()
            encode = partial(self._encode_long, pieces, length, param)
            return await loop.run_in_executor(self._pool, encode)
        except ValueError as error:
            raise ApiError(400, "The text is not valid Unicode.", param) from error

    def _encode_long(self, pieces: list[str | int], length: int, param: str) -> list[int]:
        """Gives up on a text that is far too long before all of it is encoded.

        Where a text is cut changes its tokens next to the cut, but not how many there are by
        more than a few.
        """
        context = self._context()
        if length > context * _CHARACTERS_PER_TOKEN:
            count = 0
            for text in (piece for piece in pieces if isinstance(piece, str)):
                for start in range(0, len(text), _PART_CHARACTERS):
                    part = text[start : start + _PART_CHARACTERS]
                    count += len(self.tokenizer.encode_text(part)) - _TOKENS_AT_A_CUT
                    if count > context:
                        message = f"The text is longer than the context of {context} tokens."
                        raise ApiError(400, message, param, "context_length_exceeded")
        return self.tokenizer.encode_pieces(pieces)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _begin(self) -> list[int]:
        return [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []

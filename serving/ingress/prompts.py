"""From what a client wrote to token ids.

A chat template is rendered with markers in place of special tokens and encoded piece by piece
between them, so the template's special tokens become ids while the same characters inside a
message stay text. Templates run in Jinja's immutable sandbox. Long texts are encoded on a
thread, so that the event loop goes on serving streams.
"""

import asyncio
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.tokenizer import Tokenizer
from serving.api.errors import ApiError
from serving.api.types import Message

_INLINE_CHARACTERS = 2048
_BYTES_PER_TOKEN_AT_MOST = 64


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

    def render(self, messages: Sequence[Message]) -> list[str | int]:
        """The conversation up to the assistant's next words: texts and special ids, in order.

        Raises:
            ApiError: 400, the template refuses this conversation.
        """
        roles = {"developer": "system"}
        turns = [{"role": roles.get(m.role, m.role), "content": m.text} for m in messages]
        try:
            text = self._template.render(
                messages=turns,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except TemplateError as error:
            raise ApiError(400, f"The chat template refuses it: {error}", "messages") from error
        return [self._ids.get(piece, piece) for piece in self._split.split(text) if piece]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class Prompts:
    """Encodes prompts, off the event loop when they are long."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._max_characters = max_tokens * _BYTES_PER_TOKEN_AT_MOST
        self._template = (
            ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else None
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def completion(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a plain prompt; text gets the begin-of-sentence token in front."""
        if isinstance(prompt, str):
            begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
            return await self._encode([*begin, prompt], "prompt")
        if not prompt:
            raise ApiError(400, "The prompt is empty.", "prompt")
        if max(prompt) >= self.tokenizer.vocab_size:
            raise ApiError(400, "A token id is outside the vocabulary.", "prompt")
        return prompt

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation."""
        if self._template is None:
            raise ApiError(400, "This model has no chat template; use /v1/completions.")
        template = self._template
        if sum(len(message.text) for message in messages) > _INLINE_CHARACTERS:
            loop = asyncio.get_running_loop()
            pieces = await loop.run_in_executor(self._pool, template.render, messages)
        else:
            pieces = template.render(messages)
        return await self._encode(pieces, "messages")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _encode(self, pieces: list[str | int], param: str) -> list[int]:
        length = sum(len(piece) for piece in pieces if isinstance(piece, str))
        if length > self._max_characters:
            raise ApiError(400, f"The text of {length} characters exceeds the context.", param)
        try:
            if length <= _INLINE_CHARACTERS:
                return self.tokenizer.encode_pieces(pieces)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self.tokenizer.encode_pieces, pieces)
        except ValueError as error:
            raise ApiError(400, "The text is not valid Unicode.", param) from error

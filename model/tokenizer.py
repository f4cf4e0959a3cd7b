"""Text to token ids and back, for byte-level BPE tokenizers with a `tokenizer.json`.

Two kinds of text never mix. What users write is encoded without any added token, so that a
string that looks like `<｜fim▁hole｜>` stays text; special tokens are written by id, by those who
build prompts. Decoding works on bytes, so that a character split over tokens comes out whole.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from model.config import CheckpointError, ModelConfig, json_object


@dataclass(frozen=True, slots=True)
class FimIds:
    """Ids of the fill-in-the-middle tokens: `begin` prefix `hole` suffix `end`."""

    begin: int
    hole: int
    end: int


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A checkpoint's tokenizer; all methods may be called from several threads at once."""

    vocabulary: dict[str, int]  # byte-level spelling -> id, added tokens left out
    special_tokens: dict[str, int]  # literal text -> id, of every added token
    vocab_size: int  # the model's, ids over the last token included
    bos_id: int
    eos_id: int
    adds_bos: bool  # whether plain completions begin with `bos_id`
    chat_template: str | None  # Jinja source
    _encoder: Encoder

    @classmethod
    def from_directory(cls, directory: Path, config: ModelConfig) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, tokenizer_config.json and the template.

        Raises:
            CheckpointError: no tokenizer.json, one that is not byte-level BPE, or one that has
                more tokens than the model.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory}: no {path.name}; copy the tokenizer's files here")
        raw = json_object(path)
        settings_path = directory / "tokenizer_config.json"
        settings = json_object(settings_path) if settings_path.is_file() else {}
        try:
            special = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
            encoder = _plain_encoder(raw, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a tokenizer ({error!r} is amiss)") from error
        vocabulary = {t: i for t, i in encoder.get_vocab().items() if t not in special}
        _check(path, config, vocabulary, special, encoder)
        return cls(
            vocabulary=vocabulary,
            special_tokens=special,
            vocab_size=config.vocab_size,
            bos_id=config.bos_token_id,
            eos_id=config.eos_token_id,
            adds_bos=bool(settings.get("add_bos_token", True)),
            chat_template=_chat_template(directory, settings),
            _encoder=encoder,
        )

    @cached_property
    def fim(self) -> FimIds | None:
        """The fill-in-the-middle tokens; None if the vocabulary lacks one of them."""
        names = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
        ids = [self.special_tokens.get(name) for name in names]
        begin, hole, end = ids
        if begin is None or hole is None or end is None:
            return None
        return FimIds(begin, hole, end)

    def encode_text(self, text: str) -> list[int]:
        """Ids of what a user wrote; never a special token, and no begin of sequence.

        Raises:
            ValueError: the text holds half of a surrogate pair and so has no bytes.
        """
        try:
            # Unlike `encode`, this one lets other threads run meanwhile.
            (encoding,) = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        except TypeError as error:
            raise ValueError("the text is not valid Unicode: it holds a lone surrogate") from error
        return encoding.ids

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of text and special tokens in turn: text is encoded, an id stands for itself.

        Text that follows text is encoded as one, so that it does not matter where it was cut.
        """
        ids: list[int] = []
        for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            some = list(run)
            ids += self.encode_text("".join(map(str, some))) if is_text else map(int, some)
        return ids

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for; None for an id without a token."""
        return self._bytes[token] if 0 <= token < self.vocab_size else None

    def whole_text(self, token: int) -> str | None:
        """The text of a token; None where it is no whole characters, or there is no such token."""
        return self._texts[token] if 0 <= token < self.vocab_size else None

    def is_special(self, token: int) -> bool:
        """Whether a token is an added one: a control token, not part of a text."""
        return token in self._special_ids

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        detokenizer = Detokenizer(self, skip_special)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def _texts(self) -> list[str | None]:
        return [None if raw is None else _whole_characters(raw) for raw in self._bytes]

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        table: list[bytes | None] = [None] * self.vocab_size
        byte_of = _byte_of_character()
        for token, i in self.vocabulary.items():
            try:
                table[i] = bytes(byte_of[character] for character in token)
            except KeyError:  # not spelled in bytes: means itself
                table[i] = token.encode()
        for token, i in self.special_tokens.items():
            table[i] = token.encode()
        return table


class Detokenizer:
    """Turns the tokens of one sequence into text as they come, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = False  # a character that is not complete yet

    def push(self, token: int) -> str:
        """The characters that this token completes; often one word, sometimes nothing yet."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        if not self._inside and (text := self._tokenizer.whole_text(token)) is not None:
            return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token) or b"")
        self._inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character that was cut off."""
        return self._utf8.decode(b"", final=True)


def _whole_characters(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _plain_encoder(raw: dict[str, Any], path: Path) -> Encoder:
    """The tokenizer without added tokens, and without anything that adds, cuts or pads."""
    model, decoder = raw["model"], raw.get("decoder") or {}
    if decoder.get("type") != "ByteLevel" or model.get("type", "BPE") != "BPE":
        raise CheckpointError(
            f"{path}: a {model.get('type')} tokenizer with a {decoder.get('type')} decoder; "
            "Expertline reads byte-level BPE only"
        )
    bare: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    try:
        return Encoder.from_str(json.dumps(raw | bare))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{path}: not a usable tokenizer ({error})") from error


def _check(
    path: Path,
    config: ModelConfig,
    vocabulary: dict[str, int],
    special: dict[str, int],
    encoder: Encoder,
) -> None:
    largest = max([*vocabulary.values(), *special.values()], default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: token {largest} lies outside the model's vocabulary of {config.vocab_size}; "
            "tokenizer and config.json belong to different models"
        )
    for literal, token in special.items():
        if token in encoder.encode(literal, add_special_tokens=False).ids:
            raise CheckpointError(
                f"{path}: the text {literal!r} encodes to the special token {token} even as plain "
                "text; use the tokenizer.json that was published with the model"
            )


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template from its own file, or from the settings; the default one of several."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE spells a byte as a visible character: itself if it is one in Latin-1,
    else the next character from U+0100 on (0x00 is Ā, the space 0x20 is Ġ)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}

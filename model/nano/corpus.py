"""The nano model's corpus: the standard library of the Python that runs this, as token ids.

Half of the pieces of each file are plain text, half are cut for fill-in-the-middle, and functions
with a docstring become a question and its answer. Everything follows from the seed and from the
Python version.
"""

import ast
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 4096
SPECIALS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
)
BOS, EOS, HOLE, BEGIN, END = range(VOCABULARY - len(SPECIALS), VOCABULARY)

MAX_FILE_BYTES = 400_000
MIN_FILE_CHARACTERS = 200
MIN_PIECE_CHARACTERS = 40
MIN_FIM_CHARACTERS = 80
MAX_FUNCTION_LINES = 40
HELD_OUT_LINES = 60
ENCODED_AT_ONCE = 4096

Document = tuple[int | str, ...]  # special tokens' ids, and text between them
Ids = NDArray[np.uint16]


class CorpusError(Exception):
    """The corpus cannot make a model; the message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the standard library."""

    name: str  # relative to the library's root, with slashes
    text: str

    @property
    def is_test(self) -> bool:
        return self.name.startswith("test/") or "/test" in self.name


def standard_library(limit: int | None = None) -> tuple[list[Source], list[Source]]:
    """Files to train on and files held out, in order of their names; the first `limit` at most.

    Held out is every 23rd file, unless it is one of CPython's own tests.
    """
    sources = list(_sources(Path(sysconfig.get_paths()["stdlib"])))[:limit]
    held = [s for i, s in enumerate(sources) if i % 23 == 7 and not s.name.startswith("test/")]
    return [source for source in sources if source not in held], held


def train_tokenizer(sources: Iterable[Source]) -> Tokenizer:
    """A byte-level BPE tokenizer whose special tokens have the last ids of the vocabulary.

    Raises:
        CorpusError: the corpus is too small for a vocabulary of this size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?[\p{P}\p{S}]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    if tokenizer.token_to_id(SPECIALS[-1]) != END:
        learned = tokenizer.get_vocab_size() - len(SPECIALS)
        raise CorpusError(f"{learned} tokens learned, {BOS} needed: take more files")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{SPECIALS[0]} $A",
                pair=f"{SPECIALS[0]} $A {SPECIALS[0]} $B",
                special_tokens=[(SPECIALS[0], BOS)],
            ),
        ]
    )
    return tokenizer


def training_documents(sources: list[Source], seed: int, epochs: int = 2) -> list[Document]:
    """All sources, cut anew in each epoch and shuffled; tests are taken every other epoch."""
    rng = random.Random(seed)
    documents: list[Document] = []
    for epoch in range(epochs):
        for source in sources:
            if source.is_test and epoch % 2:
                continue
            for piece in _pieces(source.text, rng):
                fim = len(piece) > MIN_FIM_CHARACTERS and rng.random() < 0.5
                documents.append(_fim(piece, rng) if fim else (BOS, piece, EOS))
            if not source.is_test:
                documents.extend(_chats(source.text, rng))
    rng.shuffle(documents)
    return documents


def held_out_documents(sources: list[Source]) -> list[Document]:
    """The held-out files as plain text, in pieces of `HELD_OUT_LINES` lines."""
    documents: list[Document] = []
    for source in sources:
        lines = source.text.split("\n")
        for first in range(0, len(lines), HELD_OUT_LINES):
            piece = "\n".join(lines[first : first + HELD_OUT_LINES]) + "\n"
            documents.append((BOS, piece, EOS))
    return documents


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Ids:
    """The documents' ids, one after another. Special tokens inside a text stay text."""
    tokenizer.encode_special_tokens = True
    ids: list[Ids] = []
    for first in range(0, len(documents), ENCODED_AT_ONCE):
        pieces = list(chain.from_iterable(documents[first : first + ENCODED_AT_ONCE]))
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        flat = (next(encoded).ids if isinstance(piece, str) else [piece] for piece in pieces)
        ids.append(np.fromiter(chain.from_iterable(flat), dtype=np.uint16))
    tokenizer.encode_special_tokens = False
    return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint16)


def _sources(root: Path) -> Iterator[Source]:
    for path in sorted(root.rglob("*.py"), key=str):
        name = path.relative_to(root).as_posix()
        foreign = name.startswith(("site-packages", "dist-packages", "config-"))
        if foreign or "bad" in name or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # tests of source encodings
        if len(text) > MIN_FILE_CHARACTERS:
            yield Source(name, text)


def _pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Runs of 20 to 90 lines: short enough that a fill-in-the-middle fits into a training row."""
    lines = text.split("\n")
    first = 0
    while first < len(lines):
        count = rng.randint(20, 90)
        piece = "\n".join(lines[first : first + count]) + "\n"
        first += count
        if len(piece) >= MIN_PIECE_CHARACTERS:
            yield piece


def _fim(piece: str, rng: random.Random) -> Document:
    """The piece without its middle, then the middle; as often whole lines as characters."""
    if rng.random() < 0.5:
        starts = [0, *(i + 1 for i, character in enumerate(piece) if character == "\n")]
        line = rng.randrange(len(starts))
        after = line + rng.randint(1, 6)
        start = starts[line]
        end = starts[after] - 1 if after < len(starts) else len(piece)
    else:
        start = rng.randrange(len(piece) - 20)
        end = start + rng.randint(5, 160)
    prefix, middle, suffix = piece[:start], piece[start:end], piece[end:]
    return (BOS, BEGIN, prefix, HOLE, suffix, END, middle, EOS)


def _chats(text: str, rng: random.Random) -> Iterator[Document]:
    """A request for each short function with a docstring, and the function as its answer."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # tests of the parser
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        last = node.end_lineno or node.lineno
        if last - node.lineno >= MAX_FUNCTION_LINES:
            continue
        source = "\n".join(lines[node.lineno - 1 : last])[node.col_offset :]
        summary = doc.strip().split("\n")[0]
        question = rng.choice(
            [
                f"Write a Python function `{node.name}`. {summary}",
                f"write a python function named {node.name}: {summary}",
                f"{summary} Name it {node.name}.",
            ]
        )
        answer = f" ```python\n{source}\n```"
        yield (BOS, f"User: {question}\n\nAssistant:", answer, EOS)

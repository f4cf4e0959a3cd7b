"""The random checkpoint that every candidate loads.

Random weights choose any of the vocabulary's ids, and most of bench-1b's have no text in nano's
tokenizer: a server would stream empty chunks, or none. So the rows of `lm_head` of all ids that
are not plain ASCII text are zero: their logit is 0, less than the largest of thousands of random
ones, and a greedy choice always has text. The shapes, and so the work, stay what they were.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtest.peers.process import ROOT, PeerFailed, output_of

HEAD = "lm_head.weight"
LIMIT_S = 1200.0


def make(shape: str, home: Path, expertline: str, environment: Mapping[str, str]) -> Path:
    """The folder of the checkpoint; written if it is not there yet.

    Raises:
        PeerFailed: it could not be written.
    """
    folder = home / shape
    if folder.is_dir():
        return folder
    unfinished = home / f"{shape}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    out = str(unfinished.relative_to(ROOT))
    command = [expertline, "checkpoint", "random", "--shape", shape, "--out", out]
    output_of(command, environment, home / "logs" / "checkpoint.log", LIMIT_S)
    silence(unfinished, textual_ids(unfinished / "tokenizer.json"))
    unfinished.rename(folder)
    return folder


def textual_ids(tokenizer: Path) -> set[int]:
    """Ids whose text is printable ASCII: no half characters, no special tokens.

    In a byte-level vocabulary those are the entries written in ASCII; it writes a space, a line
    end and all other bytes with other characters.
    """
    content: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    special = {token["id"] for token in content["added_tokens"]}
    vocabulary: dict[str, int] = content["model"]["vocab"]
    return {number for text, number in vocabulary.items() if text.isascii()} - special


def silence(folder: Path, spoken: Iterable[int]) -> None:
    """Zeroes the rows of the head of all ids but the `spoken` ones, in place.

    Raises:
        PeerFailed: no file of the folder holds the head.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            if HEAD not in header:
                continue
            start, stop = header[HEAD]["data_offsets"]
            row_bytes = (stop - start) // header[HEAD]["shape"][0]
            for row in sorted(set(range(header[HEAD]["shape"][0])) - set(spoken)):
                file.seek(8 + length + start + row * row_bytes)
                file.write(bytes(row_bytes))
            return
    raise PeerFailed(f"{folder.name} holds no {HEAD}")

"""Safetensors files of one directory: what they hold, and byte-exact reads.

A shard is eight bytes of header length (little endian), a JSON header that gives every tensor's
dtype, shape and byte range, then the bytes. Several shards are tied together by
`model.safetensors.index.json`; a single one is called `model.safetensors`. Nothing here
unpickles: a directory that holds only pickled weights is refused.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
PICKLED = (".bin", ".pt", ".pth")
AGAIN = "download or copy the checkpoint again"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `bytes` bytes at `offset` of the file `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def shard_paths(directory: Path) -> list[Path]:
    """The shards that make up the checkpoint, in order of their names.

    Raises:
        CheckpointError: no safetensors weights, or a bad index.
    """
    return sorted({directory / shard for shard in _shard_of_tensor(directory).values()}) or [
        directory / SINGLE
    ]


def stored_tensors(directory: Path, wanted: Iterable[str] | None = None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name; of `wanted`, if given, those that it has.

    Reads headers only, and only of the shards that hold wanted tensors.

    Raises:
        CheckpointError: no safetensors weights, a bad index, or a shard that is absent,
            truncated, damaged or without a tensor that the index promises.
    """
    shard_of = _shard_of_tensor(directory)
    names = None if wanted is None else set(wanted)
    if not shard_of:
        header = read_header(directory / SINGLE)
        return {name: at for name, at in header.items() if names is None or name in names}
    chosen = {name: shard for name, shard in shard_of.items() if names is None or name in names}
    headers = {shard: read_header(directory / shard) for shard in sorted(set(chosen.values()))}
    for name, shard in chosen.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{directory / shard}: {name} is missing, though {INDEX} says it is here; {AGAIN}"
            )
    return {name: headers[shard][name] for name, shard in chosen.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard, in the order of their bytes.

    Raises:
        CheckpointError: no such file, not a safetensors file, or its size is not what the
            header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a whole safetensors file; {AGAIN}")
            raw = json.loads(file.read(length))
        raw.pop("__metadata__", None)
        stored = {name: _stored(path, 8 + length, entry) for name, entry in raw.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {AGAIN}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header ({error}); {AGAIN}") from error
    return _in_order(path, stored, 8 + length, size)


def read_into(buffer: Tensor, file: int, stored: StoredTensor, start: int = 0) -> None:
    """Fills a buffer [n] uint8, on CPU, with a tensor's bytes from `start` on.

    Python only names the memory: the kernel copies into it, and other threads run meanwhile.

    Args:
        file: descriptor of the tensor's shard.

    Raises:
        CheckpointError: the file cannot be read or ends before the buffer is full.
    """
    memory, done = buffer.numpy().data, 0
    try:
        while done < len(memory):  # a call reads 2 GB at most
            count = os.preadv(file, [memory[done:]], stored.offset + start + done)
            if count == 0:
                raise CheckpointError(f"{stored.path}: ends in the middle of a tensor; {AGAIN}")
            done += count
    except OSError as error:
        raise CheckpointError(f"{stored.path}: {error.strerror}; {AGAIN}") from error


def _shard_of_tensor(directory: Path) -> dict[str, str]:
    """The index's map from tensor to shard; empty for a single unindexed shard."""
    path = directory / INDEX
    if not path.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(_no_weights(directory))
        return {}
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error}); {AGAIN}") from error
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{path}: weight_map names no tensors; {AGAIN}")
    for shard in dict.fromkeys(shard_of.values()):
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {shard!r} is not the plain name of a .safetensors file in this "
                "directory; do not use this checkpoint unless you trust where it came from"
            )
    return shard_of


def _no_weights(directory: Path) -> str:
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED)
    if pickled:
        return (
            f"{directory}: only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors"
        )
    if any(directory.glob("*.safetensors")):
        return f"{directory}: shards without {INDEX}; {AGAIN}"
    return f"{directory}: no {SINGLE} and no {INDEX}; give a checkpoint with safetensors weights"


def _stored(path: Path, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is unknown")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError("shapes and offsets must be whole numbers")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes cannot hold shape {list(shape)}")
    return StoredTensor(path, dtype, shape, data_start + start, end - start)


def _in_order(
    path: Path, stored: dict[str, StoredTensor], data_start: int, size: int
) -> dict[str, StoredTensor]:
    """Sorted by offset, once it is sure that the tensors fill the file, gapless."""
    ordered = dict(sorted(stored.items(), key=lambda item: (item[1].offset, item[1].bytes)))
    end = data_start
    for name, tensor in ordered.items():
        if tensor.offset != end:
            raise CheckpointError(f"{path}: gap or overlap before {name}; {AGAIN}")
        end += tensor.bytes
    if size != end:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{path}: {state}, {size:,} bytes instead of {end:,}; {AGAIN}")
    return ordered

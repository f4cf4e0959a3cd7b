"""Writing safetensors shards, a few of their tensors in memory at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import CheckpointError
from model.shards import DTYPES, INDEX, SINGLE, Progress

_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

Specs = Mapping[str, "TensorSpec"]
Offsets = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path,
    groups: Mapping[str, Specs],
    make: Callable[[str], Mapping[str, Tensor]],
    shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Writes the tensors that `make` gives for each group, into shards.

    Only a few groups are in memory at a time: one for each thread that makes them. `make` is
    called from several threads. A shard is at most `shard_bytes` of tensors, unless a single
    group is larger.

    Args:
        groups: the tensors that are made together and lie in one shard, by a name of the group.
    """
    sizes = {name: sum(spec.bytes for spec in specs.values()) for name, specs in groups.items()}
    total, done, shard_of = sum(sizes.values()), 0, {}
    shards = _split(sizes, shard_bytes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, names in enumerate(shards, start=1):
            shard = _shard_name(number, len(shards))
            specs = {name: spec for group in names for name, spec in groups[group].items()}
            shard_of.update(dict.fromkeys(specs, shard))
            with (directory / shard).open("wb") as file:
                header, offsets = _header(specs)
                file.write(header)
                file.flush()

                def write(group: str, to: int = file.fileno(), at: Offsets = offsets) -> int:
                    for name, tensor in make(group).items():
                        _write_all(to, tensor, at[name])
                    return sizes[group]

                for written in pool.map(write, names):
                    done += written
                    if progress:
                        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def new_directory(directory: Path, needed: int) -> None:
    """Makes an empty directory on a disk with `needed` bytes to spare.

    Raises:
        CheckpointError: it is not empty, cannot be made, or the disk is too small.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        occupied = any(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror}; choose another one") from error
    if occupied:
        raise CheckpointError(f"{directory}: not empty; choose a new directory")
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"{directory}: needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "cut the model with fewer layers or choose another disk"
        )


def _write_all(file: int, tensor: Tensor, offset: int) -> None:
    memory = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while memory:  # a call writes 2 GB at most
        count = os.pwrite(file, memory, offset)
        memory, offset = memory[count:], offset + count


def _split(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _header(specs: Specs) -> tuple[bytes, Offsets]:
    """A shard's head, and where in the file each tensor goes: the widest elements first.

    So everything is aligned to its elements, which readers that map the file rely on.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, starts = 0, {}
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec, starts[name] = specs[name], start
        header[name] = {
            "dtype": _NAME_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}

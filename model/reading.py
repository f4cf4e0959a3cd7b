"""Streams a checkpoint's weights from its files to the device that computes with them.

A few threads read, each a weight at a time, from several files at once; a weight is one tensor, or
two where its scales lie beside it. On CPUs bytes go from the page cache straight to the tensor
that is handed out. For GPUs each thread has two pinned buffers: while one is copied to the device,
the other is read into.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from threading import local

import torch
from torch import Tensor

from model.config import CheckpointError
from model.quantize import Fp8Weight, block_shape
from model.shards import AGAIN, Progress, StoredTensor, read_into
from model.weights import Value

THREADS = 4
_FILES = 4  # read at once
_STAGING_BYTES = 16 * 2**20  # of a pinned buffer


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Where one weight lies: the tensor of its name, and its scales if it is in 8-bit floats."""

    tensor: StoredTensor
    scale: StoredTensor | None = None

    @property
    def bytes(self) -> int:
        return self.tensor.bytes + (self.scale.bytes if self.scale else 0)


def read_weights(
    stored: dict[str, StoredWeight],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Value]]:
    """Weights as (name, value on `device`): 8-bit floats where they are stored so, else `dtype`.

    In the order of their bytes, but of several files in turns. Few are in memory at a time.

    Raises:
        CheckpointError: a file cannot be read or ends too early.
    """
    total, done = sum(weight.bytes for weight in stored.values()), 0
    waiting: deque[tuple[str, Future[Value]]] = deque()
    with ExitStack() as closing:
        files = _open({weight.tensor.path for weight in stored.values()} | {
            weight.scale.path for weight in stored.values() if weight.scale
        }, closing)  # fmt: skip
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
        closing.callback(pool.shutdown, cancel_futures=True)
        reader = _Reader(files, dtype, device)
        order = iter(_in_turns(stored))

        def begin_next() -> None:
            if (name := next(order, None)) is not None:
                waiting.append((name, pool.submit(reader.read, stored[name])))

        for _ in range(2 * THREADS):
            begin_next()
        if progress:
            progress(0, total)
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result()
            begin_next()
            done += stored[name].bytes
            if progress:
                progress(done, total)


def _open(paths: Iterable[Path], closing: ExitStack) -> dict[Path, int]:
    files = {}
    for path in paths:
        try:
            files[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; {AGAIN}") from error
        closing.callback(os.close, files[path])
    return files


def _in_turns(stored: dict[str, StoredWeight]) -> Iterator[str]:
    """Names in the order of their bytes, those of a few files in turns."""

    def place(name: str) -> tuple[Path, int]:
        return stored[name].tensor.path, stored[name].tensor.offset

    names = sorted(stored, key=place)
    files = [list(group) for _, group in groupby(names, key=lambda name: place(name)[0])]
    for first in range(0, len(files), _FILES):
        for some in zip_longest(*files[first : first + _FILES]):
            yield from (name for name in some if name is not None)


class _Reader:
    """What the threads do."""

    def __init__(self, files: dict[Path, int], dtype: torch.dtype, device: torch.device) -> None:
        self._files, self._dtype, self._device = files, dtype, device
        self._own = local()  # each thread's way to the device

    def read(self, weight: StoredWeight) -> Value:
        tensor = self._tensor(weight.tensor)
        if weight.scale is None:
            return tensor.to(self._dtype)
        return scaled(tensor, self._tensor(weight.scale).float(), self._dtype)

    def _tensor(self, stored: StoredTensor) -> Tensor:
        file = self._files[stored.path]
        if self._device.type != "cuda":
            buffer = torch.empty(stored.bytes, dtype=torch.uint8)
            read_into(buffer, file, stored)
        else:
            if not hasattr(self._own, "staging"):
                self._own.staging = _Staging(self._device)
            buffer = self._own.staging.bring(file, stored)
        return buffer.view(stored.dtype).reshape(stored.shape)


class _Staging:
    """One thread's way to a GPU: pinned buffers, and a stream that empties them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffers = [(_pinned(_STAGING_BYTES), torch.cuda.Event()) for _ in range(2)]

    def bring(self, file: int, stored: StoredTensor) -> Tensor:
        """The tensor's bytes on the device, [bytes] uint8, all there."""
        whole = torch.empty(stored.bytes, dtype=torch.uint8, device=self._device)
        # The memory may have been given back by somebody whose kernels still use it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for turn, start in enumerate(range(0, stored.bytes, _STAGING_BYTES)):
                buffer, emptied = self._buffers[turn % 2]
                part = buffer[: stored.bytes - start]
                emptied.synchronize()
                read_into(part, file, stored, start)
                whole[start : start + len(part)].copy_(part, non_blocking=True)
                emptied.record(self._stream)
        self._stream.synchronize()
        return whole


def _pinned(count: int) -> Tensor:
    """Memory that a device can copy from while the CPU does something else."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def scaled(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Value:
    """8-bit floats [outputs, inputs] with their scales, whichever layout they have.

    One scale for each row is no form that is computed with: such weights become `dtype`.
    """
    if scale.numel() == 1 and scale.dim() < data.dim():
        return Fp8Weight(data, scale.reshape(()))
    if tuple(scale.shape) == block_shape(data.shape):
        return Fp8Weight(data, scale)
    return (data.float() * scale.reshape(-1, 1)).to(dtype)


def scale_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that scales of a weight [outputs, inputs] may have."""
    outputs = shape[0]
    return [(), (1,), block_shape(shape), (outputs, 1), (outputs,)]

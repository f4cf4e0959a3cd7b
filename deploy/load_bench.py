"""`expertline bench --load`: how fast weights come in, against what the disk can do."""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench import machine
from deploy.errors import StartError, UsageError
from model.config import CheckpointError, ModelConfig
from model.reading import THREADS
from model.shards import shard_paths
from serving.config import Settings
from serving.gang.gang import GangStartError
from serving.local_engine import device_of, local_engine

_PIECE = 8 * 2**20


@dataclass(slots=True)
class _Clock:
    """When the ranks began to read, and when they had all they need."""

    started: float | None = None
    ended: float = 0.0
    bytes: int = 0

    def __call__(self, done: int, total: int) -> None:
        if self.started is None:
            self.started = time.monotonic()
        self.ended, self.bytes = time.monotonic(), total


def run_load_bench(settings: Settings) -> dict[str, Any]:
    """Loads the model into the ranks of the settings, the page cache being empty of its files.

    The disk's own speed is that of reading the same files from end to end with as many threads,
    before and after; the better of the two counts. Bytes that several ranks read count several
    times in the speed of loading, and come from the page cache all but once.

    Raises:
        UsageError: there are no files to load.
        StartError: the ranks did not come up.
    """
    directory = settings.model.directory
    try:
        if ModelConfig.from_directory(directory).random_seed is not None:
            raise UsageError("random weights are not loaded: give a checkpoint with weights")
        files = shard_paths(directory)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    clock = _Clock()
    try:
        before = _read_all(files)
        _forget(files)
        asyncio.run(_load(settings, clock))
        after = _read_all(files)
    except GangStartError as error:
        raise StartError(str(error)) from error
    assert clock.started is not None
    seconds, stored = clock.ended - clock.started, sum(path.stat().st_size for path in files)
    loading, disk = clock.bytes / seconds / 1e9, stored / min(before, after) / 1e9
    return {
        "load_gigabytes": clock.bytes / 1e9,
        "load_s": seconds,
        "load_gigabytes_per_second": loading,
        "disk_gigabytes_per_second": disk,
        "of_the_disk": loading / disk,
        "files": len(files),
        "command": " ".join(["expertline", *sys.argv[1:]]),
        "model": settings.model.served_name,
        "dtype": settings.model.dtype,
        "gang": settings.gang.model_dump(),
        "machine": machine(),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=f"{report['model']} {report['dtype']}", show_header=False)
    table.add_row("loaded", f"{report['load_gigabytes']:.2f} GB in {report['load_s']:.2f} s")
    table.add_row("loading", f"{report['load_gigabytes_per_second']:.2f} GB/s")
    table.add_row("disk", f"{report['disk_gigabytes_per_second']:.2f} GB/s")
    table.add_row("of the disk", f"{report['of_the_disk']:.0%}")
    console.print(table)


async def _load(settings: Settings, clock: _Clock) -> None:
    async with local_engine(settings, device_of(settings), progress=clock):
        pass


def _forget(files: Sequence[Path]) -> None:
    """Empties the page cache of the files; what was not written yet is written first."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _read_all(files: Sequence[Path]) -> float:
    """Seconds that the cold files take to be read, a few pieces at once."""
    _forget(files)
    started = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for path in files:
            file = os.open(path, os.O_RDONLY)
            try:
                size = path.stat().st_size
                read = pool.map(lambda at, file=file: _read(file, at), range(0, size, _PIECE))
                assert sum(read) == size
            finally:
                os.close(file)
    return time.monotonic() - started


def _read(file: int, offset: int) -> int:
    return len(os.pread(file, _PIECE, offset))

"""`expertline checkpoint`: make random checkpoints, look at any."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from deploy.errors import UsageError
from model.checkpoint import check, describe
from model.config import CheckpointError
from model.random_checkpoint import SHAPES, write_random


def make_random(shape: str, out: Path, layers: int | None, seed: int, console: Console) -> None:
    """Writes a random checkpoint with a progress bar.

    Raises:
        UsageError: unknown shape, too many layers, or a folder that is not empty.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"writing {shape}", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            write_random(shape, out, layers=layers, seed=seed, progress=report)
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise UsageError(f"{out}: {error.strerror or error}") from error
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)


def inspect(directory: Path, as_json: bool, console: Console) -> None:
    """Prints what a checkpoint holds.

    Raises:
        UsageError: it is not whole; the message names what is missing.
    """
    try:
        found = describe(directory)
        check(directory, found.config)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    table = Table(title=str(directory), show_header=False)
    for name, value in asdict(found.config).items():
        table.add_row(name, json.dumps(value))
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("tensors", f"{found.tensors:,}")
    table.add_row("bytes", f"{found.bytes:,}")
    table.add_row("stored as", ", ".join(f"{n} × {kind}" for kind, n in found.dtypes.items()))
    table.add_row("shards", str(len(found.shards)))
    console.print(table)

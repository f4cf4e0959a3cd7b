"""`expertline checkpoint`: make random checkpoints, quantize and look at any."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from deploy.errors import UsageError
from model.checkpoint import check, describe
from model.config import CheckpointError
from model.quantized_checkpoint import write_quantized
from model.random_checkpoint import SHAPES, write_random
from model.shards import Progress as Report
from serving.config import Settings


def make_random(
    shape: str, out: Path, layers: int | None, seed: int, weights: bool, console: Console
) -> None:
    """Writes a random checkpoint with a progress bar.

    Raises:
        UsageError: unknown shape, too many layers, or a folder that is not empty.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape {shape!r}; choose one of {', '.join(SHAPES)}")

    def write(report: Report) -> None:
        write_random(shape, out, layers=layers, seed=seed, progress=report, weights=weights)

    _written(out, f"writing {shape}", write, console)


def quantize(source: Path, out: Path, kind: str, console: Console) -> None:
    """Writes a checkpoint in 8-bit floats with a progress bar.

    Raises:
        UsageError: the source is not whole, or a folder is not empty.
    """
    _written(
        out, f"writing {kind}", lambda report: write_quantized(source, out, kind, progress=report),
        console,
    )  # fmt: skip


@contextmanager
def made_if_random(settings: Settings) -> Iterator[Settings]:
    """Settings whose model is a folder: of `random:SHAPE[:LAYERS]`, a passing one.

    It has no weights; each rank makes its own.

    Raises:
        UsageError: unknown shape or number of layers.
    """
    kind, _, rest = settings.model.path.partition(":")
    if kind != "random":
        yield settings
        return
    shape, _, layers = rest.partition(":")
    if layers and not layers.isdecimal():
        raise UsageError(f"{settings.model.path}: give the layers as a number")
    with TemporaryDirectory() as folder:
        directory = Path(folder) / shape
        try:
            write_random(shape, directory, layers=int(layers) if layers else None, weights=False)
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        model = settings.model.model_copy(update={"path": str(directory)})
        yield settings.model_copy(update={"model": model})


def _written(out: Path, title: str, write: Callable[[Report], None], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            write(report)
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

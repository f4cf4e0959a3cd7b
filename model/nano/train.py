"""Trains the nano model, from the standard library's files to a checkpoint, in one command.

    python -m model.nano.train --out DIR [--minutes M] [--resume]

`DIR/checkpoint` gets the Hugging Face layout in bfloat16, `DIR/training.json` the figures and
`DIR/train.log` the progress. `DIR/state` is what an interrupted run goes on from: packed rows,
tokenizer, and the tensors of model and optimizer; nothing in it is pickled. A run that is bounded
by steps gives the same losses whether it was interrupted or not; one that is bounded by minutes
follows the clock in its learning rate.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from model.nano.corpus import (
    CorpusError,
    encode,
    held_out_documents,
    standard_library,
    train_tokenizer,
    training_documents,
)
from model.nano.trainer import Trainer, learning_rate

BUNDLED = Path(__file__).parent / "checkpoint"
FIXED = ("config.json", "generation_config.json", "tokenizer_config.json")
ROW_TOKENS = 512
REPORT_EVERY = 25
EVALUATE_EVERY = 400

StepSeen = Callable[[int, float], None]  # the step's number, counted from 1, and its loss


class TrainingError(Exception):
    """Training cannot start or go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run does. A resumed run must agree in all but its two bounds."""

    seed: int = 0
    batch_rows: int = 12
    limit_files: int | None = None
    evaluation_rows: int = 96
    minutes: float | None = None
    max_steps: int | None = None

    def same_run(self, other: "Recipe") -> bool:
        return replace(self, minutes=other.minutes, max_steps=other.max_steps) == other


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)  # step, held-out loss


class State:
    """The folder that an interrupted run goes on from."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._counters = directory / "state.json"
        self.tokenizer_path = directory / "tokenizer.json"

    @property
    def exists(self) -> bool:
        return self._counters.is_file()

    def prepare(self, recipe: Recipe) -> None:
        """Builds tokenizer and packed rows."""
        self._directory.mkdir(parents=True)
        sources, held_out = standard_library(recipe.limit_files)
        tokenizer = train_tokenizer(sources)
        rows = encode(tokenizer, training_documents(sources, recipe.seed))
        np.save(self._directory / "train.npy", rows)
        np.save(self._directory / "held_out.npy", encode(tokenizer, held_out_documents(held_out)))
        tokenizer.save(str(self.tokenizer_path))

    def rows(self, name: str) -> Tensor:
        """All whole rows of "train" or "held_out" with the token after each: [rows, 513]."""
        path = self._directory / f"{name}.npy"
        ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
        if len(ids) <= ROW_TOKENS:
            raise TrainingError(f"{len(ids)} tokens make no row: take more files")
        return ids.unfold(0, ROW_TOKENS + 1, ROW_TOKENS)

    def save(self, trainer: Trainer, recipe: Recipe, progress: Progress) -> None:
        """Tensors first, then the counters that name them: a crash leaves the older pair."""
        name = f"step-{progress.step}.safetensors"
        save_file(trainer.tensors(), self._directory / name)
        draft = self._counters.with_suffix(".tmp")
        counters = {"tensors": name, "recipe": asdict(recipe), "progress": asdict(progress)}
        draft.write_text(json.dumps(counters, indent=1), encoding="utf-8")
        draft.replace(self._counters)
        for path in self._directory.glob("step-*.safetensors"):
            if path.name != name:
                path.unlink()

    def load(self, trainer: Trainer, recipe: Recipe) -> Progress:
        """Puts the saved tensors into `trainer`; returns how far it had come."""
        counters = json.loads(self._counters.read_text(encoding="utf-8"))
        saved = Recipe(**counters["recipe"])
        if not recipe.same_run(saved):
            raise TrainingError(f"{self._directory} is of another run: {saved}")
        trainer.restore(load_file(self._directory / counters["tensors"]))
        progress = Progress(**counters["progress"])
        progress.history = [(step, loss) for step, loss in progress.history]
        return progress


def train(
    out: Path,
    recipe: Recipe,
    resume: bool = False,
    save_every: int = 100,
    seen: StepSeen | None = None,
) -> dict[str, Any]:
    """Trains until a bound of the recipe is reached or every row has been seen once.

    Returns the figures that are written to `training.json`.

    Raises:
        TrainingError: `out` is occupied, has no state to resume, or has another run's.
        CorpusError: too few files for the tokenizer.
    """
    state = State(out / "state")
    if resume and not state.exists:
        raise TrainingError(f"{out} has no saved state to resume from")
    if not resume and out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty: resume, or choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    with _deterministic(), _log(out / "train.log") as log:
        trainer = Trainer(DeepseekV2Config.from_pretrained(BUNDLED), recipe.seed)
        if resume:
            progress = state.load(trainer, recipe)
            log(f"resumed after step {progress.step}")
        else:
            log("building the corpus")
            state.prepare(recipe)
            progress = Progress()
        _loop(trainer, recipe, progress, state, save_every, log, seen)
        loss = trainer.evaluate(state.rows("held_out"), recipe.evaluation_rows)
        figures = _figures(recipe, progress, loss)
        log(f"held-out {loss:.4f} nats/token after {progress.step} steps, {progress.seconds:.0f} s")
    write_checkpoint(trainer.model, state.tokenizer_path, out / "checkpoint")
    text = json.dumps(figures, indent=1) + "\n"
    (out / "training.json").write_text(text, encoding="utf-8")
    return figures


def write_checkpoint(model: DeepseekV2ForCausalLM, tokenizer: Path, directory: Path) -> None:
    """The Hugging Face layout in bfloat16. Turns `model` itself into bfloat16."""
    model.bfloat16().save_pretrained(directory)
    for name in FIXED:
        shutil.copyfile(BUNDLED / name, directory / name)
    Tokenizer.from_file(str(tokenizer)).save(str(directory / "tokenizer.json"))


def _loop(
    trainer: Trainer,
    recipe: Recipe,
    progress: Progress,
    state: State,
    save_every: int,
    log: Callable[[str], None],
    seen: StepSeen | None,
) -> None:
    rows, held_out = state.rows("train"), state.rows("held_out")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    steps = min(len(rows) // recipe.batch_rows, recipe.max_steps or sys.maxsize)
    earlier, started = progress.seconds, time.monotonic()
    while (done := _share_done(recipe, progress, steps)) < 1:
        chosen = order[progress.step * recipe.batch_rows :][: recipe.batch_rows]
        rate = learning_rate(progress.step, done)
        entropy, balance = trainer.step(rows[chosen], rate)
        progress.step += 1
        progress.seconds = earlier + time.monotonic() - started
        if seen is not None:
            seen(progress.step, entropy)
        if progress.step % REPORT_EVERY == 0 or progress.step == 1:
            speed = progress.step * recipe.batch_rows * ROW_TOKENS / progress.seconds
            log(
                f"step {progress.step}/{steps} {progress.seconds:.0f} s loss {entropy:.3f} "
                f"balance {balance:.3f} rate {rate:.2e} {speed:.0f} tokens/s"
            )
        if progress.step % EVALUATE_EVERY == 0:
            loss = trainer.evaluate(held_out, max(1, recipe.evaluation_rows // 4))
            progress.history.append((progress.step, loss))
            log(f"held-out {loss:.4f} nats/token")
        if progress.step % save_every == 0:
            state.save(trainer, recipe, progress)
    state.save(trainer, recipe, progress)


def _share_done(recipe: Recipe, progress: Progress, steps: int) -> float:
    by_steps = progress.step / max(1, steps)
    by_time = progress.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
    return max(by_steps, by_time)


def _figures(recipe: Recipe, progress: Progress, loss: float) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "tokens": progress.step * recipe.batch_rows * ROW_TOKENS,
        "seconds": progress.seconds,
        "held_out_nats_per_token": loss,
        "history": progress.history,
    }


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order, so that a resumed run repeats what it would have been."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _log(path: Path) -> Iterator[Callable[[str], None]]:
    """Writes lines to standard output and to the end of a file."""
    with path.open("a", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        yield log


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m model.nano.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="a new directory, or a run's own")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--minutes", type=float, help="stop after this time, over all resumptions")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch-rows", type=int, default=12, help="rows of 512 tokens in a step")
    parser.add_argument("--limit-files", type=int, help="train on the first files only")
    parser.add_argument("--evaluation-rows", type=int, default=96, help="of held-out text")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    out, resume, save_every = (options.pop(name) for name in ("out", "resume", "save_every"))
    try:
        train(out, Recipe(**options), resume, save_every)
    except (TrainingError, CorpusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: go on with --out {out} --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`expertline loss`: how well a model predicts held-out code, and what fewer bits cost it."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.errors import StartError, UsageError
from model.config import ModelConfig
from model.nano.corpus import held_out_documents, standard_library
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from serving.config import Settings
from serving.engine.request import Request
from serving.gang.gang import GangStartError
from serving.local_engine import local_engine

PIECE_TOKENS = 1024  # of one document, so that a small cache holds several
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood of `tokens` tokens."""

    tokens: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def run_loss(settings: Settings, documents: int) -> dict[str, Any]:
    """The loss on held-out files of Python's standard library; with `model.quantize` also without.

    The files are those that nano was not trained on. Every token of a document after its first
    is predicted from all before it, by the engine as it serves.

    Raises:
        UsageError: this Python comes without its library's sources.
        StartError: the ranks did not come up.
    """
    prompts = _prompts(settings, documents)
    kinds = {settings.model.quantize or settings.model.dtype: settings}
    if settings.model.quantize is not None:
        plain = settings.model.model_copy(update={"quantize": None})
        kinds[settings.model.dtype] = settings.model_copy(update={"model": plain})
    try:
        losses = {kind: asyncio.run(_measure(each, prompts)) for kind, each in kinds.items()}
    except GangStartError as error:
        raise StartError(str(error)) from error
    report: dict[str, Any] = {
        kind: {
            "tokens": loss.tokens,
            "nats_per_token": loss.nats_per_token,
            "perplexity": loss.perplexity,
        }
        for kind, loss in losses.items()
    }
    if settings.model.quantize is not None:
        quantized, plain_loss = losses.values()
        report["perplexity_ratio"] = quantized.perplexity / plain_loss.perplexity
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """The losses as a table."""
    table = Table("weights", "tokens", "nats a token", "perplexity")
    for kind, loss in report.items():
        if isinstance(loss, dict):
            cells = (f"{loss['tokens']}", f"{loss['nats_per_token']:.4f}")
            table.add_row(kind, *cells, f"{loss['perplexity']:.3f}")
    console.print(table)
    if "perplexity_ratio" in report:
        change = 100 * (report["perplexity_ratio"] - 1)
        console.print(f"perplexity {change:+.3f}% through quantization")


def _prompts(settings: Settings, documents: int) -> list[list[int]]:
    directory = settings.model.directory
    tokenizer = Tokenizer.from_directory(directory, ModelConfig.from_directory(directory))
    _, held_out = standard_library()
    if not held_out:
        raise UsageError("this Python comes without the sources of its library")
    pieces = held_out_documents(held_out)
    step = max(len(pieces) // documents, 1)
    prompts = []
    for piece in pieces[::step][:documents]:
        text = "".join(part for part in piece if isinstance(part, str))
        prompts.append([tokenizer.bos_id, *tokenizer.encode_text(text)][:PIECE_TOKENS])
    return prompts


async def _measure(settings: Settings, prompts: list[list[int]]) -> Loss:
    total, tokens = 0.0, 0
    scored = SamplingParams(prompt_logprobs=0)
    async with local_engine(settings) as engine:
        for first in range(0, len(prompts), _AT_ONCE):
            requests = [
                Request(id=f"{first + i}", prompt=prompt, max_tokens=0, sampling=scored)
                for i, prompt in enumerate(prompts[first : first + _AT_ONCE])
            ]
            for completion in await engine.generate(requests):
                for scores in completion.scores:
                    total -= sum(scores.logprobs)
                    tokens += len(scores.logprobs)
    return Loss(tokens, total / tokens)

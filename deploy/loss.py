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
from serving.local_engine import device_of, local_engine

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
    """The loss on held-out files of Python's standard library, plain and in fewer bits.

    The files are those that nano was not trained on. Every token of a document after its first
    is predicted from all before it, by the engine as it serves. What is compared with plain
    weights and cache is what the settings ask for, else every mode that there is.

    Raises:
        UsageError: this Python comes without its library's sources.
        StartError: the ranks did not come up.
    """
    prompts = _prompts(settings, documents)
    device = device_of(settings)
    report: dict[str, Any] = {}
    plain: Loss | None = None
    try:
        for mode, each in modes(settings, device).items():
            loss = asyncio.run(_measure(each, device, prompts))
            plain = plain or loss
            report[mode] = {
                "tokens": loss.tokens,
                "nats_per_token": loss.nats_per_token,
                "perplexity": loss.perplexity,
                "perplexity_ratio": loss.perplexity / plain.perplexity,
            }
    except GangStartError as error:
        raise StartError(str(error)) from error
    return report


def modes(settings: Settings, device: str) -> dict[str, Settings]:
    """Settings by what is in fewer bits, the plain ones first."""

    def with_bits(quantize: str | None, cache_dtype: str) -> Settings:
        model = settings.model.model_copy(update={"quantize": quantize})
        gang = settings.gang.model_copy(update={"cache_dtype": cache_dtype})
        return settings.model_copy(update={"model": model, "gang": gang})

    found: dict[str, Settings] = {settings.model.dtype: with_bits(None, "auto")}
    asked: list[str] = [settings.model.quantize] if settings.model.quantize else []
    if settings.gang.cache_dtype == "fp8":
        asked.append("cache fp8")
    if asked:
        return found | {" + ".join(asked): settings}
    for kind in ("int8", "fp8", "fp8_tensor") if device == "cpu" else ("fp8", "fp8_tensor"):
        found[kind] = with_bits(kind, "auto")
    return found | {"cache fp8": with_bits(None, "fp8"), "fp8 + cache fp8": with_bits("fp8", "fp8")}


def show(report: dict[str, Any], console: Console) -> None:
    """The losses as a table."""
    table = Table("weights and cache", "tokens", "nats a token", "perplexity", "change")
    for mode, loss in report.items():
        cells = (f"{loss['tokens']}", f"{loss['nats_per_token']:.4f}", f"{loss['perplexity']:.3f}")
        table.add_row(mode, *cells, f"{100 * (loss['perplexity_ratio'] - 1):+.3f}%")
    console.print(table)


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


async def _measure(settings: Settings, device: str, prompts: list[list[int]]) -> Loss:
    total, tokens = 0.0, 0
    scored = SamplingParams(prompt_logprobs=0)
    async with local_engine(settings, device) as engine:
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

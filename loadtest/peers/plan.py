"""What every candidate is asked to do, and the prompts it is asked with."""

import random
from dataclasses import asdict, dataclass
from typing import Any

PROMPT_IDS = 4000  # below nano's vocabulary, special tokens left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of one comparison.

    Offline: `batch` requests at once, and one alone. HTTP: `bursts` times `batch` arrivals at
    once, the next burst when the last answer of the one before has ended.
    """

    shape: str
    batch: int
    prompt: int  # tokens
    output: int  # tokens after the first one offline, all of them over HTTP
    bursts: int
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The sizes, for the report."""
        return asdict(self)

    @property
    def batches(self) -> list[int]:
        """Requests at once of each offline measurement, the largest first."""
        return sorted({self.batch, 1}, reverse=True)

    def prompts(self, burst: int = 0) -> list[list[int]]:
        """Random token ids; no two bursts share a prompt, so that no cache can help."""
        numbers = random.Random(f"{self.seed}:{burst}")
        return [
            [numbers.randrange(PROMPT_IDS) for _ in range(self.prompt)] for _ in range(self.batch)
        ]

    def job(self, model: str, threads: int) -> dict[str, Any]:
        """What an offline script reads from its standard input."""
        return {
            "model": model,
            "threads": threads,
            "prompts": self.prompts(),
            "batches": self.batches,
            "output": self.output,
            "max_model_len": MAX_MODEL_LEN,
        }


MAX_MODEL_LEN = 2048
FULL = Plan(shape="bench-1b", batch=16, prompt=256, output=64, bursts=3)
QUICK = Plan(shape="nano", batch=4, prompt=32, output=8, bursts=1)

"""Seeded prompts that look like an editor's traffic: code of Python's own standard library.

A prompt is a pure function of (seed, number), whatever order requests are sent in. About half of
them start where their file starts, so that prompts share prefixes as edits of one file do.
"""

import random
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Endpoint = Literal["chat", "completions"]
Kind = Literal["completion", "fim", "chat"]

MIN_CHARACTERS = 200
MEDIAN_CHARACTERS = 1500
MAX_CHARACTERS = 12_000
SUFFIX_SHARE = 0.3  # of a fill-in-the-middle prompt's characters
HOLE_CHARACTERS = 120
MAX_FILES = 64
_QUESTIONS = (
    "Explain what this code does, step by step.",
    "Find a bug in this code, or say that there is none.",
    "Write unit tests for this code.",
    "Rewrite this code so that it is easier to read.",
)


class WorkloadError(Exception):
    """There is nothing to make prompts of."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks for."""

    kind: Kind
    text: str
    suffix: str | None = None  # what follows the hole, of a fill-in-the-middle prompt

    def body(self) -> dict[str, Any]:
        """The fields of an OpenAI request that carry the prompt."""
        if self.kind == "chat":
            return {"messages": [{"role": "user", "content": self.text}]}
        if self.suffix is None:
            return {"prompt": self.text}
        return {"prompt": self.text, "suffix": self.suffix}


@dataclass(frozen=True)
class Workload:
    """The prompts of one run.

    Of those of `completions`, `fim_share` (0 to 1) are fill-in-the-middle: a prompt and a suffix,
    which not every server takes.
    """

    seed: int
    endpoint: Endpoint
    fim_share: float = 0.0

    def prompt(self, number: int) -> Prompt:
        """The prompt of the request with this number, always the same one."""
        rng = random.Random(f"{self.seed}:{number}")
        source = rng.choice(self._sources)
        length = rng.lognormvariate(0.0, 0.8) * MEDIAN_CHARACTERS
        code = _excerpt(source, int(min(max(length, MIN_CHARACTERS), MAX_CHARACTERS)), rng)
        if self.endpoint == "chat":
            return Prompt("chat", f"{rng.choice(_QUESTIONS)}\n\n```python\n{code}\n```")
        if rng.random() >= self.fim_share:
            return Prompt("completion", code)
        hole = int(len(code) * (1 - SUFFIX_SHARE))
        return Prompt("fim", code[:hole], code[hole + HOLE_CHARACTERS :])

    @cached_property
    def _sources(self) -> list[str]:
        """Top-level modules of the standard library, long enough for a median prompt."""
        sources: list[str] = []
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= 2 * MEDIAN_CHARACTERS:
                sources.append(text)
        if not sources:
            raise WorkloadError("this Python has no source files of its standard library")
        return sources[:MAX_FILES]


def _excerpt(source: str, length: int, rng: random.Random) -> str:
    """Code from the start of the file or of any line, cut within a line as at a cursor."""
    start = 0
    if rng.random() < 0.5:
        start = source.rfind("\n", 0, rng.randrange(max(1, len(source) - length))) + 1
    return source[start : start + length]

"""What one scenario found, in figures that can be added up and written down."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loadtest.chaos.load import Judged

_EXAMPLES = 5
_CUT = "connection"  # what a client sees of an ingress that dies under its stream


@dataclass(slots=True)
class Outcome:
    """Of one scenario.

    Attributes:
        errors: by kind, requests that the client saw fail.
        excused: connections that were cut since the ingress that held them was killed.
        lost, added, changed: tokens, against the undisturbed answers.
        wrong: answers that differ in anything else (finish, usage, text, log-probabilities).
        kept: what was not given back after a fault, in words.
        figures: values by name, one for each fault.
        silence_s: the longest between two tokens that any client saw.
        skipped: why the scenario could not be run here.
        broken: why it ended early.
    """

    scenario: str
    layout: str = ""
    faults: list[str] = field(default_factory=list)
    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    added: int = 0
    changed: int = 0
    wrong: int = 0
    kept: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    silence_s: float = 0.0
    examples: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str | None = None
    broken: str | None = None

    @property
    def tokens(self) -> int:
        """Lost, doubled or different."""
        return self.lost + self.added + self.changed

    @property
    def flawless(self) -> bool:
        """No error, no wrong token, nothing kept, and run to its end."""
        faults = sum(self.errors.values()) + self.tokens + self.wrong + len(self.kept)
        return not faults and self.broken is None

    def measured(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def take(self, judged: Iterable[Judged], fault: str, excuses: bool = False) -> None:
        """Adds the requests of a round.

        Args:
            excuses: connections that broke are the fault's, which killed what held them.
        """
        for entry in judged:
            record, verdict = entry.record, entry.verdict
            self.requests += 1
            self.silence_s = max(self.silence_s, record.silence_s)
            self.lost += verdict.lost
            self.added += verdict.added
            self.changed += verdict.changed
            self.wrong += bool(verdict.faults)
            if record.error is not None:
                excused = excuses and record.error == _CUT
                (self.excused if excused else self.errors)[record.error] += 1
                self._example(f"{fault}: {record.kind}: {record.error}: {record.message}")
            if not verdict.right:
                self._example(f"{fault}: {record.kind}: {verdict}")

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {
            "tokens": self.tokens,
            "flawless": self.flawless,
        }

    def _example(self, text: str) -> None:
        if len(self.examples) < _EXAMPLES * max(1, len(self.faults)):
            self.examples.append(text)

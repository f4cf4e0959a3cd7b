"""What one measurement found, against what it is to be; and all of them as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. `doubts` are reasons not to trust it; empty for a good measurement."""

    name: str
    title: str
    value: float
    unit: str
    target: float
    details: dict[str, Any]
    higher_is_better: bool = False
    doubts: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        if self.higher_is_better:
            return self.value >= self.target
        return self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return {"met": self.met, **asdict(self)}


def markdown(results: Sequence[Result | str]) -> str:
    """The table; under it what is behind each figure. A string is why there is no figure."""
    lines = ["| what | measured | wanted | met |", "| --- | --- | --- | --- |"]
    notes: list[str] = []
    for result in results:
        if isinstance(result, str):
            notes.append(f"- {result}")
            continue
        sign = "≥" if result.higher_is_better else "≤"
        verdict = "yes" if result.met else "no"
        measured, wanted = (f"{x:.4g} {result.unit}" for x in (result.value, result.target))
        lines.append(f"| {result.title} | {measured} | {sign} {wanted} | {verdict} |")
        notes += [f"- {result.name}, doubtful: {doubt}" for doubt in result.doubts]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"

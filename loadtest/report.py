"""What a run found, as JSON with a versioned schema and as a table for people.

Times are told twice: from when a request was *intended* to leave, which is what a user waits, and
from when it was *sent*, which is what the server did. Only successful requests are in the
percentiles; failures are counted by kind, each with one example.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from loadtest.request import RequestRecord

SCHEMA = "expertline.loadtest/1"
MAX_LAG_P99_S = 0.010
MIN_ACHIEVED = 0.99
_PACKAGES = ("expertline", "httpx")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of some measured values, in the unit that the distribution's name has."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution":
        """Percentiles are values that occurred (nearest rank); all zero if there are none."""
        ranked = sorted(values)
        if not ranked:
            return cls()

        def percentile(percent: int) -> float:
            return ranked[max(0, -(-len(ranked) * percent // 100) - 1)]

        return cls(
            count=len(ranked),
            mean=sum(ranked) / len(ranked),
            p50=percentile(50),
            p90=percentile(90),
            p95=percentile(95),
            p99=percentile(99),
            max=ranked[-1],
        )


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Failures of one kind."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """All that a run found.

    `doubts` are reasons not to trust the run, for a client that could not keep its schedule;
    empty for a good one. Server errors are no doubts: they are results.
    """

    config: dict[str, Any]
    ended: str  # UTC, ISO 8601
    machine: dict[str, Any]
    versions: dict[str, str]
    requests: int
    succeeded: int
    seconds: float  # from the start to the last answer's end
    offered_rate: float  # requests per second
    achieved_rate: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    distributions: dict[str, Distribution]
    finish_reasons: dict[str, int]
    errors: dict[str, ErrorCount]
    doubts: list[str]
    records: list[RequestRecord] = field(repr=False)

    @property
    def flawless(self) -> bool:
        """Every request succeeded, and the client kept its schedule."""
        return self.succeeded == self.requests and not self.doubts

    def to_json(self) -> str:
        """The whole report, one record per request included, gaps between chunks aside."""
        content = {"schema": SCHEMA} | asdict(self)
        for record in content["records"]:
            del record["gaps_s"]
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def render(self) -> Group:
        """For a rich console."""
        head = Text(
            f"{self.succeeded} of {self.requests} requests succeeded in {self.seconds:.1f} s, "
            f"{self.achieved_rate:.2f} requests/s (offered {self.offered_rate:.2f}), "
            f"{self.output_tokens_per_second:.1f} output tokens/s"
        )
        parts: list[Text | Table] = [head, self._times()]
        for kind, error in sorted(self.errors.items()):
            parts.append(Text(f"{error.count} × {kind}: {error.example}", style="red"))
        parts.extend(Text(f"doubtful: {doubt}", style="yellow") for doubt in self.doubts)
        return Group(*parts)

    def _times(self) -> Table:
        columns = ("mean", "p50", "p90", "p95", "p99", "max")
        table = Table("", *columns)
        for name, distribution in self.distributions.items():
            scale, unit = (1000, " ms") if name.endswith("_s") else (1, "")
            label = name.removesuffix("_s").replace("_", " ") + unit
            values = (getattr(distribution, column) * scale for column in columns)
            table.add_row(label, *(f"{value:.1f}" for value in values))
        for column in table.columns[1:]:
            column.justify = "right"
        return table


def summarize(config: dict[str, Any], records: list[RequestRecord], offered_s: float) -> LoadReport:
    """The report of a run whose arrivals were to take `offered_s` seconds."""
    good = [record for record in records if record.succeeded]
    sent = [record.sent_s for record in records if record.sent_s is not None]
    seconds = max((record.end_s or 0.0 for record in records), default=0.0)
    offered = _rate(len(records), offered_s)
    achieved = _rate(len(sent), max(offered_s, max(sent, default=0.0)))
    distributions = _distributions(records, good)
    output_tokens = sum(record.output_tokens for record in records)
    return LoadReport(
        config=config,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={
            "system": platform.system(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        versions=versions(_PACKAGES),
        requests=len(records),
        succeeded=len(good),
        seconds=seconds,
        offered_rate=offered,
        achieved_rate=achieved,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=output_tokens,
        output_tokens_per_second=_rate(output_tokens, seconds),
        distributions=distributions,
        finish_reasons=dict(Counter(record.finish_reason or "none" for record in good)),
        errors=_errors(records),
        doubts=_doubts(distributions["schedule_lag_s"].p99, offered, achieved),
        records=records,
    )


def _distributions(
    records: list[RequestRecord], good: list[RequestRecord]
) -> dict[str, Distribution]:
    """By name; those in seconds end in `_s`."""
    begun = [r for r in good if r.first_s is not None]
    values: dict[str, list[float]] = {
        "ttft_s": [_since(r.intended_s, r.first_s) for r in begun],
        "ttft_from_send_s": [_since(r.sent_s, r.first_s) for r in begun],
        "itl_s": [gap for r in good for gap in r.gaps_s],
        "time_per_output_token_s": [
            _since(r.first_s, r.last_s) / (r.output_tokens - 1)
            for r in begun
            if r.output_tokens > 1
        ],
        "e2e_s": [_since(r.intended_s, r.end_s) for r in good],
        "e2e_from_send_s": [_since(r.sent_s, r.end_s) for r in good],
        "prompt_tokens": [r.prompt_tokens for r in good],
        "output_tokens": [r.output_tokens for r in good],
        "schedule_lag_s": [_since(r.intended_s, r.sent_s) for r in records if r.sent_s is not None],
    }
    return {name: Distribution.of(some) for name, some in values.items()}


def _since(earlier: float | None, later: float | None) -> float:
    return (later or 0.0) - (earlier or 0.0)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _errors(records: list[RequestRecord]) -> dict[str, ErrorCount]:
    counts = Counter(record.error for record in records if record.error is not None)
    examples = {record.error: record.message for record in reversed(records)}
    return {kind: ErrorCount(count, examples[kind]) for kind, count in counts.items()}


def _doubts(lag_p99_s: float, offered: float, achieved: float) -> list[str]:
    doubts = []
    if lag_p99_s > MAX_LAG_P99_S:
        doubts.append(
            f"the client fell behind its schedule: p99 {lag_p99_s * 1000:.1f} ms, "
            f"more than {MAX_LAG_P99_S * 1000:.0f} ms; use a faster machine or a lower rate"
        )
    if achieved < MIN_ACHIEVED * offered:
        doubts.append(f"only {achieved / offered:.1%} of the offered rate was sent")
    return doubts


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a source tree that is not installed
    return found

"""What a step costs before and after the ranks: its plan, and taking its result."""

from dataclasses import asdict

from loadtest.control import measure_plans
from loadtest.costs.result import Result

TARGET_MS = 1.5


def measure(sequences: int = 256, steps: int = 1000) -> Result:
    """Wall milliseconds of so many steps for decoding sequences, without a gang or a clock."""
    planned, taken = measure_plans(sequences, steps)
    return Result(
        name="plan",
        title=f"plan of a step, p99 ({sequences} decoding sequences)",
        value=planned.p99,
        unit="ms",
        target=TARGET_MS,
        details={"schedule_ms": asdict(planned), "complete_ms": asdict(taken)},
    )

"""A long load without any fault: nothing grows."""

import asyncio
import time
from dataclasses import asdict

from loadtest.chaos.arena import Arena
from loadtest.chaos.baseline import TASKS, total
from loadtest.chaos.processes import SERVING
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import Layout
from loadtest.chaos.trend import Trend

GROWING = "soak, figures that grow"
_SAMPLE_S = 5.0


class Soak(Scenario):
    """Memory and descriptors of every serving process, held pages and tasks, sampled all along."""

    name = "soak"
    layout = Layout(stages=2, ranks=2)
    share = 0.7

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    async def play(self, arena: Arena) -> None:
        times: list[float] = []
        values: dict[str, list[float]] = {}
        async with arena.load():
            started = time.monotonic()
            while (at := time.monotonic() - started) < self._seconds:
                times.append(at)
                for name, value in (await _sample(arena)).items():
                    values.setdefault(name, []).append(value)
                await asyncio.sleep(_SAMPLE_S)
        trends = {
            name: Trend.of(times, series)
            for name, series in values.items()
            if len(series) == len(times)
        }
        arena.outcome.notes["trends"] = {name: asdict(trend) for name, trend in trends.items()}
        growing = [name for name, trend in trends.items() if trend.grows]
        arena.outcome.notes["growing"] = growing
        arena.outcome.measured(GROWING, len(growing))


async def _sample(arena: Arena) -> dict[str, float]:
    """Megabytes and descriptors by role; pages and tasks of all."""
    found: dict[str, float] = {}
    for process in arena.server.processes(*SERVING):
        for name, value in (("MB", process.resident_bytes / 1e6), ("files", process.files)):
            key = f"{name} of {process.role}s"
            found[key] = found.get(key, 0.0) + value
    metrics = await arena.server.metrics(arena.client)
    if metrics:
        found["pages held"] = total(metrics, "expertline_pages", state="held")
        found["tasks"] = total(metrics, TASKS)
    return found

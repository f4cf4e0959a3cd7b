"""From the engine's books to its metrics, once per step."""

from serving.engine.loop import Repair, StepTimes
from serving.engine.plan import StepPlan, StepResult
from serving.engine.scheduler import Scheduler
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import EngineMetrics

log = get_logger("engine")


class StepObserver:
    """Publishes each step and the state that it left behind."""

    def __init__(self, metrics: EngineMetrics, scheduler: Scheduler) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._last = scheduler.stats()

    def step_finished(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None:
        now, last = self._scheduler.stats(), self._last
        self._metrics.step(times.seconds, plan.rows)
        self._metrics.state(now.running, now.waiting, self._scheduler.steps_in_flight)
        for column, pages in enumerate(now.columns):
            self._metrics.pages(column, pages.held, pages.remembered, pages.free)
        queried = now.prefix_query_tokens - last.prefix_query_tokens
        self._metrics.prefix(queried, now.prefix_hit_tokens - last.prefix_hit_tokens)
        self._metrics.preempted(now.preemptions - last.preemptions)
        self._last = now

    def gang_repaired(self, repair: Repair, seconds: float, sequences: int) -> None:
        self._metrics.repaired(seconds)
        log.event(
            "INFO",
            "gang.repaired",
            seconds=round(seconds, 3),
            generation=repair.generation,
            cells=" ".join(repair.cells),
            sequences=sequences,
        )

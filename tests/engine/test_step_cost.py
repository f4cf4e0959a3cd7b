"""What planning costs while the devices wait. A figure to read, not a bound to keep."""

import gc
import time

from serving.engine.plan import RankResult, Sample, StepPlan, StepResult
from serving.engine.scheduler import Scheduler
from tests.engine.simulation import limits, request


def test_a_step_of_many_decodes_is_planned_in_little_time() -> None:
    sequences, steps = 256, 128
    scheduler = Scheduler(limits(pages=20_000, step_tokens=60_000, sequences=sequences))
    for number in range(sequences):
        scheduler.add(request(str(number), list(range(200)), 800))

    def run(count: int) -> float:
        seconds = 0.0
        for _ in range(count):
            started = time.process_time()
            plan = scheduler.schedule()
            seconds += time.process_time() - started
            assert isinstance(plan, StepPlan)
            slices = plan.columns[0].slices
            assert len(slices) == sequences
            samples = [Sample(piece.id, 1) for piece in slices]
            result = StepResult(plan.step, [RankResult(plan.step, 0, 0, samples)])
            started = time.process_time()
            scheduler.complete(result)
            seconds += time.process_time() - started
        return seconds / count

    run(5)  # prompts, and what is only done once
    gc.freeze()  # what other tests have left is not this step's cost
    try:
        print(f"schedule + complete of {sequences} decodes: {1000 * run(steps):.2f} ms of CPU time")
    finally:
        gc.unfreeze()

"""An engine whose gang has no ranks: every sequence gets a token of some text at each tick."""

import asyncio
import os
from collections import deque
from itertools import cycle

from loadtest.token_path import STEPS_PER_SECOND
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.engine.driver import Engine
from serving.engine.loop import GangFailure, Repair
from serving.engine.plan import RankResult, Sample, StepPlan, StepResult

_TEXT = "def total(values):\n    count = 0\n    for value in values:\n        count += value\n"


class StubGang:
    """Answers each step one tick after the last one; a step that comes later than that, at once."""

    metrics_addresses: tuple[str, ...] = ()
    pages = 0  # as many as the settings say

    def __init__(self, tokens: list[int], steps_per_second: float) -> None:
        self._tick_s = 1 / steps_per_second
        self._tokens = cycle(tokens)
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()
        self._results: deque[StepResult] = deque()
        self._news = asyncio.Event()

    def submit(self, plan: StepPlan) -> None:
        self._due = max(self._due + self._tick_s, self._loop.time())
        self._loop.call_at(self._due, self._finish, plan)

    async def result(self) -> StepResult:
        while not self._results:
            self._news.clear()
            await self._news.wait()
        return self._results.popleft()

    async def repair(self) -> Repair:
        raise GangFailure("there is nothing to repair")

    async def stop(self) -> None:
        """There is nothing to end."""

    def _finish(self, plan: StepPlan) -> None:
        token = next(self._tokens)
        samples = [
            Sample(piece.id, token)
            for column in plan.columns
            for piece in column.slices
            if piece.sample
        ]
        self._results.append(StepResult(plan.step, [RankResult(plan.step, 0, 0, samples=samples)]))
        self._news.set()


class StubEngine(Engine):
    """The real replica over a gang that is none."""

    async def _start_gang(self, gpus: bool) -> StubGang:  # type: ignore[override]
        directory = self._settings.model.directory
        tokenizer = Tokenizer.from_directory(directory, ModelConfig.from_directory(directory))
        return StubGang(tokenizer.encode_text(_TEXT), float(os.environ[STEPS_PER_SECOND]))

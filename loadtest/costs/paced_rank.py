"""Ranks that compute nothing and take their time: what is left is the cost of serving.

All else is real: the gang launches them, plans and results cross the wire, the engine schedules.
"""

import os
import time
from unittest.mock import patch

import ray

from serving.config import Settings
from serving.engine.driver import Engine
from serving.engine.plan import RankPlan, RankResult, Sample
from serving.gang import placement
from serving.gang.gang import Gang
from serving.gang.messages import GANG_CODEC, RankHello, RankReady, RankSpec
from serving.wire import BlockingChannel, WireError


class Echo:
    """Answers plans: a sequence gets its own prompt's tokens, over and over.

    The newest sequence's `seed` says how many milliseconds a step takes, so that one server can
    be measured at several paces.
    """

    def __init__(self) -> None:
        self.step_s = 0.0
        self._prompts: dict[int, list[int]] = {}

    def answer(self, plan: RankPlan) -> RankResult:
        """The samples that a last stage would give."""
        for finished in plan.finished:
            self._prompts.pop(finished, None)
        for new in plan.new:
            self._prompts[new.id] = new.tokens[1 : new.prompt_tokens]  # the first begins a text
            self.step_s = new.sampling.seed / 1000
        samples = [
            Sample(piece.id, self._token(piece.id, piece.start + piece.count))
            for piece in plan.slices
            if piece.sample
        ]
        return RankResult(plan.step, 0, 0, samples)

    def _token(self, sequence: int, position: int) -> int:
        prompt = self._prompts[sequence]
        return prompt[position % len(prompt)]


@ray.remote(max_restarts=0, max_task_retries=0)
class PacedRank:
    """Stands where a `Rank` would; its steps begin at a fixed pace while there are any."""

    def run(self, spec: RankSpec, settings: Settings, secret: bytes) -> None:
        channel = BlockingChannel.connect(spec.engine_host, spec.engine_port, secret, GANG_CODEC)
        channel.send(RankHello(spec.stage, spec.rank, os.getpid(), metrics_address=""))
        channel.receive()  # all ranks are here
        channel.send(RankReady(spec.stage, spec.rank, load_s=0.0, cache_bytes=0))
        echo, due = Echo(), 0.0
        try:
            while True:
                result = echo.answer(channel.receive())
                # From the last step's end, not from now: the engine's own time between two steps
                # would slow the streams down.
                now = time.monotonic()
                due = max(due + echo.step_s, now)
                time.sleep(due - now)
                channel.send(result)
        except WireError:
            return  # the engine has let go


class PacedEngine(Engine):
    """The engine, but for what its ranks are."""

    async def _start_gang(self, gpus: bool) -> Gang:
        with patch.object(placement, "Rank", PacedRank):
            return await super()._start_gang(gpus)

"""Where a step's time goes on one rank.

Hooks on the network's parts, put there from outside and only when asked for: what is not traced
costs nothing.
"""

import time
from typing import Any

from torch import nn

from model.attention import Attention
from model.layers import MLP
from model.moe import Gate, LocalExperts
from model.stage import Head, Stage
from serving.engine.plan import TraceEvent

_NAMES: dict[type[nn.Module], str] = {
    Attention: "attention",
    Gate: "gate",
    LocalExperts: "experts",
    MLP: "feed forward",
    Head: "head",
}


class StepTrace:
    """Collects what happened in the current step, in seconds of the host's monotonic clock."""

    def __init__(self, stage: Stage) -> None:
        self._events: list[TraceEvent] = []
        self._entered: list[float] = []  # of the parts that we are in, the innermost last
        for module in stage.modules():
            if type(module) in _NAMES:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def add(self, name: str, started: float, ended: float) -> None:
        """Takes something that is no part of the network."""
        self._events.append((name, started, ended))

    def take(self) -> list[TraceEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._entered.append(time.perf_counter())

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._events.append((_NAMES[type(module)], self._entered.pop(), time.perf_counter()))

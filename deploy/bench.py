"""`expertline bench`: the engine's own speed, without HTTP, Serve and Ray."""

import asyncio
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deploy.errors import StartError, UsageError
from deploy.trace import Timeline
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from serving.config import Settings
from serving.engine.loop import GangFailure, Repair, StepTimes
from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import Request
from serving.gang.gang import GangStartError
from serving.local_engine import Completion, LocalEngine, local_engine


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """`batch` requests at once, `prompt` random tokens in, `output` tokens out."""

    batch: int
    prompt: int
    output: int
    seed: int = 0


@dataclass(slots=True)
class _StageTimes:
    compute_s: float = 0.0
    wait_s: float = 0.0
    exchange_s: float = 0.0


@dataclass(slots=True)
class _Recorder:
    """Adds up what the ranks report, by stage (mean over its ranks)."""

    ranks: int
    steps: int = 0
    rows: int = 0
    step_s: float = 0.0
    stages: dict[int, _StageTimes] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)

    def reset(self) -> None:
        """Forgets what it saw; begins to watch a run of its own."""
        self.steps, self.rows, self.step_s, self.stages = 0, 0, 0.0, {}
        self.timeline = Timeline()

    def step_finished(self, plan: StepPlan, result: StepResult, times: StepTimes) -> None:
        self.steps += 1
        self.rows += plan.rows
        self.step_s += times.seconds
        if any(rank.events for rank in result.ranks):
            self.timeline.add(plan, result, times)
        for rank in result.ranks:
            stage = self.stages.setdefault(rank.stage, _StageTimes())
            stage.compute_s += rank.compute_s / self.ranks
            stage.wait_s += rank.wait_s / self.ranks
            stage.exchange_s += rank.exchange_s / self.ranks

    def gang_repaired(self, repair: Repair, seconds: float, sequences: int) -> None:
        raise GangFailure("the gang broke and was repaired: the figures would mean nothing")

    def bubbles(self, seconds: float) -> dict[str, dict[str, float]]:
        """The share of `seconds` in which each stage computed nothing; and in theory.

        In theory the stages do nothing but compute and the slowest one never waits but for the
        first step to come down to it and the last one to leave: (steps + P - 1) of its steps is
        the whole time (https://arxiv.org/abs/1811.06965, section 2.3, for unequal stages).
        """
        slowest = max(stage.compute_s for stage in self.stages.values())
        ideal = slowest * (self.steps + len(self.stages) - 1) / self.steps
        return {
            str(number): {
                "measured": 1 - stage.compute_s / seconds,
                "theory": 1 - stage.compute_s / ideal,
            }
            for number, stage in sorted(self.stages.items())
        }


def run_bench(settings: Settings, plan: BenchPlan, trace: Path | None = None) -> dict[str, Any]:
    """Measures prefill, then decode, on the same prompts; figures as plain data.

    Prefill: all prompts until each has its first token, nothing else running. Decode: tokens
    that come after every request has its first one, over the time that they take. What is told
    of steps and stages is of that second run, its prefill included.

    Args:
        trace: where to write a timeline of the second run; tracing slows it by some percent.

    Raises:
        UsageError: the cache cannot hold the batch.
        StartError: the ranks did not come up.
    """
    settings = _fitted(settings, plan)
    recorder = _Recorder(settings.gang.expert_parallel)
    try:
        measured = asyncio.run(_measure(settings, plan, recorder, trace is not None))
    except GangStartError as error:
        raise StartError(str(error)) from error
    if trace is not None:
        recorder.timeline.write(trace)
        measured["trace_ms_per_step"] = recorder.timeline.means_ms()
    return {
        **measured,
        "steps": recorder.steps,
        "mean_step_ms": 1e3 * recorder.step_s / max(recorder.steps, 1),
        "stages": {str(s): asdict(t) for s, t in sorted(recorder.stages.items())},
        "command": " ".join(["expertline", *sys.argv[1:]]),
        "plan": asdict(plan),
        "model": settings.model.served_name,
        "dtype": settings.model.dtype,
        "gang": settings.gang.model_dump(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(report: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=f"{report['model']} {report['dtype']}", show_header=False)
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "mean_step_ms"):
        table.add_row(key.replace("_", " "), f"{report[key]:.1f}")
    for stage, times in report["stages"].items():
        cells = [f"{name[:-2]} {value:.2f} s" for name, value in times.items()]
        bubble = report["bubbles"][stage]
        idle = f"idle {bubble['measured']:.1%} (in theory {bubble['theory']:.1%})"
        table.add_row(f"stage {stage}", ", ".join([*cells, idle]))
    for phase, everyone in report.get("trace_ms_per_step", {}).items():
        for who, means in everyone.items():
            cells = [f"{name} {value:.2f}" for name, value in means.items()]
            table.add_row(f"{who}, ms a {phase} step", ", ".join(cells))
    console.print(table)


def _fitted(settings: Settings, plan: BenchPlan) -> Settings:
    """Settings whose cache holds the whole batch, without the prefix cache."""
    columns = settings.gang.expert_parallel
    each = -(-(plan.prompt + plan.output) // 64) * 64
    needed = max(128, each * -(-plan.batch // columns) + 64)
    config = ModelConfig.from_directory(settings.model.directory)
    if plan.prompt + plan.output > config.max_position_embeddings:
        raise UsageError(f"the model holds {config.max_position_embeddings} tokens at most")
    gang = settings.gang.model_copy(update={"cache_tokens": needed})
    engine = settings.engine.model_copy(update={"prefix_cache": False})
    return settings.model_copy(update={"gang": gang, "engine": engine})


async def _measure(
    settings: Settings, plan: BenchPlan, recorder: _Recorder, trace: bool
) -> dict[str, Any]:
    vocabulary = ModelConfig.from_directory(settings.model.directory).vocab_size
    numbers = random.Random(plan.seed)
    prompts = [
        [numbers.randrange(vocabulary) for _ in range(plan.prompt)] for _ in range(plan.batch)
    ]
    async with local_engine(settings, observer=recorder, trace=trace) as engine:
        await _run(engine, prompts[:1], 2, "warm-up")
        prefill = await _run(engine, prompts, 1, "prefill")
        recorder.reset()
        decode = await _run(engine, prompts, plan.output, "decode")
    started = decode.first_all
    tokens = sum(1 for c in decode.completions for at in c.times if at > started)
    seconds = decode.ended - started
    return {
        "prefill_tokens_per_second": plan.batch * plan.prompt / (prefill.ended - prefill.started),
        "decode_tokens_per_second": tokens / seconds if tokens else 0.0,
        "time_to_first_token_s": prefill.ended - prefill.started,
        "bubbles": recorder.bubbles(decode.ended - decode.started),
        "total_tokens_per_second": (plan.prompt + plan.output)
        * plan.batch
        / (decode.ended - decode.started),
    }


@dataclass(frozen=True, slots=True)
class _Run:
    started: float
    completions: list[Completion]

    @property
    def first_all(self) -> float:
        return max(completion.times[0] for completion in self.completions)

    @property
    def ended(self) -> float:
        return max(completion.times[-1] for completion in self.completions)


async def _run(engine: LocalEngine, prompts: list[list[int]], output: int, name: str) -> _Run:
    greedy = SamplingParams(temperature=0.0)
    requests = [
        Request(id=f"{name}-{i}", prompt=prompt, max_tokens=output, sampling=greedy)
        for i, prompt in enumerate(prompts)
    ]
    started = time.monotonic()
    return _Run(started, await engine.generate(requests))

"""The Lite model with random weights, run by the engine's own scheduler and worker in one process.

No gang and no wire: what is measured is the engine's step, from plan to tokens.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loadtest.gpu.figure import EAGER, MANY_STREAMS, ONE_STREAM, OURS_64, PREFILL, Figure
from loadtest.gpu.timing import synchronize
from model.cache import PAGE_TOKENS, LatentCache
from model.config import ModelConfig
from model.graphs import Capture
from model.layout import Cell, Layout, attention_parameters, expert_parameters
from model.moe import LocalExchange
from model.random_checkpoint import SHAPES, random_cell
from model.sampling_params import SamplingParams
from model.stage import Stage
from serving.engine.plan import StepResult
from serving.engine.request import Request
from serving.engine.scheduler import EngineLimits, Scheduler
from serving.gang.decode import decode_graphs
from serving.gang.memory import CudaMemory, measure_steps, pages_that_fit
from serving.gang.worker import Worker

_CELL = Cell(0, 0)
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run; `context` tokens are reached in the middle of an answer."""

    shape: str
    layers: int
    step_tokens: int
    context: int
    answer: int
    streams: int
    peer_streams: int
    peer_prompt: int

    @property
    def prompt(self) -> int:
        return self.context - self.answer // 2

    @property
    def longest(self) -> int:
        return 2 * self.context

    @property
    def pages(self) -> int:
        return self.streams * -(-(self.prompt + self.answer) // PAGE_TOKENS) + 1


FULL = Scale("lite", 27, 8192, 1024, 128, 256, 64, 256)
TINY = Scale("nano", 2, 128, 32, 8, 4, 3, 8)


@dataclass(frozen=True, slots=True)
class Step:
    """One step that was run."""

    decode: bool
    rows: int
    samples: int
    seconds: float


def config_of(scale: Scale) -> ModelConfig:
    """The shape's configuration, cut to the scale's layers."""
    raw = SHAPES[scale.shape] | {"num_hidden_layers": scale.layers}
    return ModelConfig.from_dict(raw, source=scale.shape)


class LiteEngine:
    """A loaded model, and one worker after the other over it."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device, self.config = scale, device, config_of(scale)
        layout = Layout(self.config, 1, 1)
        self.stage = Stage(self.config, layout, _CELL, torch.bfloat16, device, LocalExchange())
        for name, tensor in random_cell(self.config, layout, _CELL, torch.bfloat16, device):
            self.stage.load_tensor(name, tensor)
        self.stage.finalize()
        self.cache = LatentCache(self.config, scale.layers, scale.pages, torch.bfloat16, device)

    def worker(self, buckets: Sequence[int] = (), capture: Capture | None = None) -> Worker:
        """A worker whose decode steps of these sizes come from graphs."""
        graphs = None
        if buckets:
            graphs = decode_graphs(
                self.config, self.stage, self.cache, None, buckets, self.scale.longest, capture
            )
            assert graphs is not None, "without an exchange everything can be recorded"
            graphs.record()
        hidden = self.config.hidden_size
        return Worker(_CELL, self.stage, self.cache, None, None, hidden, graphs=graphs)

    def run(self, worker: Worker, streams: int, prompt: int, answer: int) -> list[Step]:
        """So many greedy requests of random tokens at once, to their ends."""
        scheduler = Scheduler(
            EngineLimits(
                stages=1,
                columns=1,
                pages_per_column=self.scale.pages,
                max_step_tokens=self.scale.step_tokens,
                max_sequences=self.scale.streams,
                max_model_len=self.scale.longest,
                prefix_cache=False,
                vocab_size=self.config.vocab_size,
            )
        )
        numbers = torch.Generator().manual_seed(streams)
        for place in range(streams):
            ids = torch.randint(self.config.vocab_size, (prompt,), generator=numbers).tolist()
            scheduler.add(Request(f"r{place}", ids, answer, _GREEDY))
        synchronize(self.device)
        steps: list[Step] = []
        began = time.perf_counter()
        while (plan := scheduler.schedule()) is not None:
            result = worker.step(plan.columns[0])
            scheduler.complete(StepResult(plan.step, [result]))
            failed = [sample.error for sample in result.samples if sample.error is not None]
            if failed:
                raise RuntimeError(failed[0])
            ended = time.perf_counter()
            steps.append(
                Step(plan.columns[0].decode, plan.rows, len(result.samples), ended - began)
            )
            began = ended
        return steps


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Everything that is asked of the Lite model; on CPUs a replay is the step itself."""
    capture: Capture | None = None if device.type == "cuda" else lambda call: call
    scale = TINY if tiny else FULL
    started = time.perf_counter()
    engine = LiteEngine(scale, device)
    synchronize(device)
    yield Figure("Lite bf16, random weights made", time.perf_counter() - started, "s")
    yield from _prefill(engine)
    started = time.perf_counter()
    worker = engine.worker((1, scale.peer_streams, scale.streams), capture)
    yield Figure("Lite bf16, three graphs recorded", time.perf_counter() - started, "s")
    yield from _decode(engine, worker)
    del worker  # it holds the cache, whose room is asked for now
    if device.type == "cuda":
        yield _pages(engine)


def _prefill(engine: LiteEngine) -> Iterator[Figure]:
    """Steps of nothing but prompts, as many as fill one, in FLOP of the layers' products."""
    scale, worker = engine.scale, engine.worker()
    prompts = scale.step_tokens // scale.context
    engine.run(worker, prompts, scale.context, 1)
    steps = [engine.run(worker, prompts, scale.context, 1)[0] for _ in range(3)]
    seconds = sorted(step.seconds for step in steps)[1]
    flops = prompt_flops(engine.config, scale.context) * prompts
    yield Figure(PREFILL, flops / seconds / 1e12, "TFLOP/s")
    yield Figure(f"{PREFILL}, tokens", steps[0].rows / seconds, "tok/s")


def _decode(engine: LiteEngine, worker: Worker) -> Iterator[Figure]:
    scale = engine.scale
    eager = engine.worker()
    for name, runner in ((ONE_STREAM, worker), (EAGER, eager)):
        engine.run(runner, 1, scale.prompt, 4)
        steps = engine.run(runner, 1, scale.prompt, scale.answer)
        yield Figure(name, decode_rate(steps, 1), "tok/s")
    streams, prompt, answer = scale.peer_streams, scale.peer_prompt, scale.answer // 2
    engine.run(worker, streams, prompt, 2)
    seconds = sum(step.seconds for step in engine.run(worker, streams, prompt, answer))
    yield Figure(OURS_64, streams * answer / seconds, "tok/s")
    steps = engine.run(worker, scale.streams, scale.prompt, scale.answer)
    yield Figure(MANY_STREAMS, decode_rate(steps, scale.streams), "tok/s")


def _pages(engine: LiteEngine) -> Figure:
    """Cache tokens that the device would hold."""
    scale, memory = engine.scale, CudaMemory()
    del engine.cache
    gc.collect()
    steps = measure_steps(
        engine.config, engine.stage, None, memory, scale.step_tokens, scale.streams
    )
    pages = pages_that_fit(engine.config, scale.layers, torch.bfloat16, memory, 0.9, steps)
    return Figure("Lite bf16, cache", float(pages * PAGE_TOKENS), "tokens")


def decode_rate(steps: Sequence[Step], streams: int) -> float:
    """Tokens a second while all streams answer; the first such step has the prompts in its wake."""
    full = [step for step in steps if step.decode and step.samples == streams][1:]
    return streams * len(full) / sum(step.seconds for step in full)


def prompt_flops(config: ModelConfig, tokens: int) -> float:
    """Products of a prompt of so many tokens, in all layers: each weight that a token meets twice,
    and causal attention in its expanded form."""
    routed = config.num_experts_per_tok + config.n_shared_experts
    weights = 0
    for layer in range(config.num_hidden_layers):
        weights += attention_parameters(config)
        if config.is_dense(layer):
            weights += 3 * config.hidden_size * config.intermediate_size
        else:
            weights += routed * expert_parameters(config)
            weights += config.n_routed_experts * config.hidden_size
    each = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = config.num_hidden_layers * each * tokens * (tokens + 1)  # half of all pairs, twice
    return 2.0 * weights * tokens + float(attention)

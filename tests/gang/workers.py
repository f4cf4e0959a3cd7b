"""Workers in the threads of a test, fed by a real scheduler: an engine without processes."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch

from model.cache import LatentCache
from model.graphs import Capture, bucket_sizes
from model.layout import Layout
from model.moe import LocalExchange
from model.sampling_params import SamplingParams
from model.stage import Stage
from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import Finish, Output, Request, TokenOutput
from serving.engine.scheduler import EngineLimits, Scheduler
from serving.gang.decode import decode_graphs
from serving.gang.exchange import EXCHANGES
from serving.gang.fabric import Fabric
from serving.gang.worker import Worker
from tests.gang.gloo import shared_memory_group, together
from tests.model.harness import CPU, load
from tests.model.oracle import oracle

GREEDY = SamplingParams(temperature=0.0)
PAGES = 40
LONGEST = 1024


def call_again(call: Callable[[], None]) -> Callable[[], None]:
    """Records nothing: a replay is the call itself, over the same buffers."""
    return call


@dataclass
class Engine:
    """A scheduler over `stages` × `ranks` workers of nano, in fp32."""

    stages: int = 1
    ranks: int = 1
    exchange: str = "gather"
    capture: Capture | None = None
    rows: int = 8  # of the largest graph
    max_step_tokens: int = 64
    device: torch.device = CPU
    reserve: dict[tuple[int, int], Callable[[int], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = oracle("nano")
        self.scheduler = Scheduler(
            EngineLimits(
                stages=self.stages,
                columns=self.ranks,
                pages_per_column=PAGES,
                max_step_tokens=self.max_step_tokens,
                max_sequences=self.rows,
                max_model_len=LONGEST,
            )
        )
        layout = Layout(model.config, self.stages, self.ranks)
        columns = self._groups(self.ranks, self.stages)
        peers = self._groups(self.stages, self.ranks)
        self.cells = list(layout.cells)

        def worker(index: int) -> Worker:
            cell = self.cells[index]
            group = peers[cell.stage][cell.rank]
            experts = model.config.n_routed_experts
            exchange = EXCHANGES[self.exchange](group, experts) if group is not None else None
            held = exchange or LocalExchange()
            stage = Stage(model.config, layout, cell, torch.float32, self.device, held)
            load(stage, model.tensors)
            cache = LatentCache(
                model.config, len(layout.layers(cell.stage)), PAGES, torch.float32, self.device
            )
            graphs = None
            if self.capture is not None:
                graphs = decode_graphs(
                    model.config,
                    stage,
                    cache,
                    exchange,
                    bucket_sizes(self.rows),
                    1024,
                    self.capture,
                )
            return Worker(
                cell, stage, cache, columns[cell.rank][cell.stage], exchange,
                model.config.hidden_size, graphs=graphs,
                reserve=self.reserve.get((cell.stage, cell.rank)),
            )  # fmt: skip

        self.workers = together(len(self.cells), worker)

    def _groups(self, groups: int, size: int) -> list[Sequence[Fabric | None]]:
        if size == 1:
            return [[None]] * groups
        return [shared_memory_group(size) for _ in range(groups)]

    def step(self) -> tuple[StepPlan, StepResult, list[Output]] | None:
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        received = [deepcopy(plan.columns[cell.rank]) for cell in self.cells]
        results = together(len(self.cells), lambda index: self.workers[index].step(received[index]))
        result = StepResult(plan.step, results)
        return plan, result, self.scheduler.complete(result)

    def generate(self, requests: Sequence[Request]) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Tokens of each request, and what those were told that failed."""
        tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        errors: dict[str, str] = {}
        for request in requests:
            self.scheduler.add(request)
        while (done := self.step()) is not None:
            for output in done[2]:
                if isinstance(output, TokenOutput):
                    tokens[output.request_id].append(output.token)
                elif isinstance(output, Finish):
                    errors[output.request_id] = output.message
        self.scheduler.check_integrity()
        return tokens, errors


def requests(count: int, output: int = 6) -> list[Request]:
    """Prompts of different lengths, some over a page, of nano's vocabulary."""
    numbers = torch.Generator().manual_seed(3)
    return [
        Request(
            f"r{i}",
            torch.randint(4000, (5 + 29 * i,), generator=numbers).tolist(),
            output + i,
            GREEDY,
        )
        for i in range(count)
    ]

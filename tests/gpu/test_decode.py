"""What only a GPU shows: recorded steps, the exchange inside them, and measured memory."""

import pytest
import torch

from model.graphs import CudaCapture
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.stage import Stage
from serving.gang.exchange import GatherExchange
from serving.gang.memory import CudaMemory, StepMemory, measure_steps, pages_that_fit
from tests.gang.gloo import nccl_group
from tests.gang.test_exchange import experts_of
from tests.gang.workers import Engine, requests
from tests.model.harness import load
from tests.model.oracle import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")


def test_recorded_steps_give_the_tokens_of_eager_ones() -> None:
    eager = Engine(device=CUDA)
    recorded = Engine(device=CUDA, capture=CudaCapture())
    assert recorded.generate(requests(5)) == eager.generate(requests(5))


def test_the_exchange_goes_into_a_graph() -> None:
    """With one rank, whose NCCL sends to itself."""
    config = oracle("like-236b").config
    fabric = nccl_group(1)[0]
    exchange = GatherExchange(fabric, config.n_routed_experts)
    exchange.begin([4])
    experts = experts_of(config, range(config.n_routed_experts), "cuda")
    with torch.device(CUDA), torch.inference_mode():
        hidden = torch.randn(4, config.hidden_size)
        ids = torch.stack([torch.randperm(config.n_routed_experts)[:4] for _ in range(4)])
        weights = torch.rand(4, 4)
        out = torch.empty_like(hidden)

        def call() -> None:
            out.copy_(exchange(hidden, ids, weights, experts))

        replay = CudaCapture()(call)
        hidden.copy_(torch.randn(4, config.hidden_size))
        out.fill_(float("nan"))
        replay()
        torch.testing.assert_close(out, experts(hidden, ids, weights), rtol=1e-5, atol=1e-5)
    fabric.check()
    fabric.abort()


def test_pages_are_measured_and_can_be_allocated() -> None:
    model = oracle("nano")
    layout = Layout(model.config, 1, 1)
    stage = Stage(model.config, layout, Cell(0, 0), torch.bfloat16, CUDA, LocalExchange())
    load(stage, model.tensors)
    memory = CudaMemory()
    steps = measure_steps(model.config, stage, None, memory, step_tokens=512, sequences=8)
    assert 0 < steps.least < steps.most
    pages = pages_that_fit(model.config, 5, torch.bfloat16, memory, 0.5, steps)
    cache = torch.empty(5, pages, 64, model.config.latent_dim, dtype=torch.bfloat16, device=CUDA)
    assert memory.free() < 0.55 * memory.total()
    del cache
    steps.reserve(512, memory, CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        StepMemory(0, 2**50, 1).reserve(1, memory, CUDA)

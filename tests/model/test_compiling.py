"""torch.compile for what is dense: the same numbers, and a clear word where it cannot be had."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from model.attention import Projections
from model.compiling import NotCompiled, compile_dense
from model.layers import MLP
from model.stage import Stage
from tests.model.harness import Gang
from tests.model.oracle import oracle

STEPS = (20, 1, 7, 1)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gang(**options: Any) -> tuple[Gang, Stage]:
    model = oracle("nano")
    made = Gang(model.config, model.tensors, **options)
    return made, next(iter(made._cells.values()))


def logits(model: Gang) -> Tensor:
    live = model.open(list(range(100, 140)))
    return torch.stack([model.advance({live: count})[live] for count in STEPS])


def test_a_compiled_stage_computes_what_an_eager_one_does_from_little_shared_code() -> None:
    graphs: list[int] = []

    def counted(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(1)
        return aot_eager(module, inputs)

    model, stage = gang()
    dense = [part for part in stage.modules() if isinstance(part, Projections | MLP)]
    assert compile_dense(stage, backend=counted) == len(dense) == 10
    assert all("forward" in vars(part) for part in dense)
    compiled = len(graphs)
    assert compiled <= 2 * 3  # one row and several; projections, the dense MLP and the shared ones
    torch.testing.assert_close(logits(model), logits(gang()[0]), rtol=1e-5, atol=1e-4)
    assert len(graphs) == compiled


def test_the_real_compiler_gives_the_same_numbers() -> None:
    """One feed-forward, for time's sake."""
    _, stage = gang()
    part = next(part for part in stage.modules() if isinstance(part, MLP))
    x = torch.randn(3, stage.width)
    with torch.inference_mode():
        expected = part(x)
        found = torch.compile(type(part).forward, dynamic=True, fullgraph=True)(part, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_compiler_that_fails_changes_nothing() -> None:
    model, stage = gang()
    expected = logits(model)

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        raise OSError("no C++ compiler")

    with pytest.raises(NotCompiled, match="no C\\+\\+ compiler"):
        compile_dense(stage, backend=backend)
    assert not any("forward" in vars(part) for part in stage.modules())
    assert torch.equal(logits(gang()[0]), expected)


def test_weights_in_a_form_of_their_own_are_left_alone() -> None:
    _, stage = gang(quantize="fp8", keep_fp8=True)
    with pytest.raises(NotCompiled, match="8-bit floats"):
        compile_dense(stage, backend="eager")

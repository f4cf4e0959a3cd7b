"""torch.compile for what is dense in a stage: outside attention, experts and their exchange.

Two kinds of parts are compiled, each as a whole: what makes queries and cache rows of hidden states
(products, norms, rotation), and the gated feed-forwards. They are traced with the reference of each
operation, which is plain torch, so that the compiler may fuse it; hooks around them stay as they
are. Numbers of rows stay symbols; one row is a case of its own. The last bits of results are not
those of the kernels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Projections
from model.layers import MLP, Linear
from model.stage import Stage

_ROWS = (1, 2)  # compiled for in advance: the others share code with the latter


class NotCompiled(Exception):
    """Why a stage computes as it did before."""


def compile_dense(stage: Stage, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles the dense parts of a loaded stage; how many that are.

    Args:
        backend: of torch.compile.

    Raises:
        NotCompiled: nothing could be compiled, and nothing has changed.
    """
    parts = [part for part in stage.modules() if isinstance(part, Projections | MLP)]
    plain = [part for part in parts if _plain(part)]
    if not plain:
        raise NotCompiled(
            "the weights have a form that only kernels of their own read: 8-bit floats, or packed "
            "for CPUs"
            if parts
            else "the stage has no layer"
        )
    compiled = {
        kind: torch.compile(kind.forward, backend=backend, dynamic=True, fullgraph=True)
        for kind in (Projections, MLP)
    }
    try:
        for part in plain:  # parts of one kind share what is compiled: weights are arguments
            part.__dict__["forward"] = partial(compiled[type(part)], part)
        _compile_now(stage, plain)
    except RuntimeError as error:  # all that the compiler raises: no C++ compiler, no Triton
        for part in plain:
            del part.__dict__["forward"]
        cause = getattr(error, "inner_exception", error)
        raise NotCompiled(f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}") from error
    return len(plain)


def _plain(part: nn.Module) -> bool:
    """Whether all its matrices are as torch has them."""
    weights = [module.weight for module in part.modules() if isinstance(module, Linear)]
    return all(isinstance(w, Tensor) and w.dim() == 2 and not w.is_mkldnn for w in weights)


@torch.inference_mode()
def _compile_now(stage: Stage, parts: Sequence[Projections | MLP]) -> None:
    """Runs every part once for each case, so that no step has to wait for the compiler."""
    device = next(stage.parameters()).device
    for rows in _ROWS:
        rotation = stage.rope(torch.zeros(rows, dtype=torch.int64, device=device))
        for part in parts:
            x = torch.zeros(rows, stage.width, dtype=stage.dtype, device=device)
            part(x, rotation) if isinstance(part, Projections) else part(x)

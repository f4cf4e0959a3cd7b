"""The plain layers, and how checkpoint tensors find their way into them.

Layers are built on torch's current default device, with uninitialized weights. Each says by
`slots` where the tensors of a checkpoint go.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import ops

# Checkpoint name, then the views that take the tensor's rows in turn.
Slot = tuple[str, tuple[Tensor, ...]]


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized weight that is never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """x [T, inputs] times the transpose of weight [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(outputs, inputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)

    def pack(self) -> None:
        """Brings the weight into the device's favourite form; nothing can be loaded then."""
        self.weight = nn.Parameter(ops.pack(self.weight), requires_grad=False)

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", (self.weight,)


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight for each dimension."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(dim, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and that normed."""
        return ops.add_rms_norm(x, delta, self.weight, self.eps)

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", (self.weight,)


class MLP(nn.Module):
    """SiLU-gated feed-forward; gate and up are one product."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner, dtype)
        self.down = Linear(inner, hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))

    def slots(self, name: str) -> Iterator[Slot]:
        gate, up = self.gate_up.weight.chunk(2)
        yield f"{name}.gate_proj.weight", (gate,)
        yield f"{name}.up_proj.weight", (up,)
        yield from self.down.slots(f"{name}.down_proj")

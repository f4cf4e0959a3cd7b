"""The plain layers.

They are built on torch's current default device, without weights. Each says by `slots` where the
tensors of a checkpoint go, see `model.weights`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import ops
from model.weights import Matrix, Rows, Slot, Value, WeightFormat, weight


class Linear(nn.Module):
    """x [T, inputs] times the transpose of weight [outputs, inputs].

    Attributes:
        matrix: the weight while it is loaded, of one or more `parts`.
        weight: as `ops.linear` takes it, once `pack` was called.
    """

    weight: Value

    def __init__(self, inputs: int, outputs: int, form: WeightFormat, parts: int = 1) -> None:
        super().__init__()
        self.matrix = Matrix(outputs, inputs, form, parts)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)

    def pack(self) -> None:
        """Brings the weight into the device's favourite form; nothing can be loaded then."""
        self.weight = ops.pack(self.matrix.take())

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", self.matrix.place()


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
        yield f"{name}.weight", Rows([self.weight])


class MLP(nn.Module):
    """SiLU-gated feed-forward; gate and up are one product."""

    def __init__(self, hidden: int, inner: int, form: WeightFormat) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner, form, parts=2)
        self.down = Linear(inner, hidden, form)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.gate_proj.weight", self.gate_up.matrix.place(0)
        yield f"{name}.up_proj.weight", self.gate_up.matrix.place(1)
        yield from self.down.slots(f"{name}.down_proj")

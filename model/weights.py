"""How the tensors of a checkpoint become the weights of a stage.

A module says by its *slots* where each tensor of the checkpoint goes: a name, and a place that
takes the tensor. Small and odd weights lie ready, and are copied to (`Rows`). The matrices that
make up nearly all of a model (`Matrix`) take the form in which they come, 8-bit floats or not, and
take memory only when they come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import CheckpointError
from model.quantize import BLOCK, Fp8Weight, by_block, fp8_per_block, fp8_per_tensor, from_fp8

# A weight as a checkpoint has it, and as a matrix is computed with.
Value = Tensor | Fp8Weight

_MIXED = "of matrices that are computed with as one, some are in 8-bit floats, some not"
_QUANTIZERS = {"fp8": fp8_per_block, "fp8_tensor": fp8_per_tensor}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """In which form a stage holds its matrices.

    Attributes:
        dtype: of the computation, and of weights that are not quantized.
        quantize: None; "fp8": 8-bit floats by block; "fp8_tensor": by matrix; "int8": routed
            experts in whole numbers.
        keep_fp8: whether weights in 8-bit floats stay what they are. Else they have the error of
            8 bits, but `dtype`.
    """

    dtype: torch.dtype
    quantize: str | None = None
    keep_fp8: bool = False


class Place(Protocol):
    """Where one tensor of a checkpoint goes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the tensor must be."""
        ...

    def put(self, value: Value) -> None:
        """Takes the tensor, which may be kept as it is: nobody may change it afterwards."""
        ...


Slot = tuple[str, Place]


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized weight that is never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


@dataclass(frozen=True, slots=True)
class Rows(Place):
    """Views that take the tensor's rows in turn, each as many as it has."""

    views: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(map(len, self.views)), *self.views[0].shape[1:]

    def put(self, value: Value) -> None:
        rows = value if isinstance(value, Tensor) else from_fp8(value, self.views[0].dtype)
        sizes = [len(view) for view in self.views]
        for view, some in zip(self.views, rows.split(sizes), strict=True):
            view.copy_(some)


class Matrix:
    """A matrix [outputs, inputs], or `count` of them, whose rows are those of `parts` tensors.

    Parts go straight to their rows of [outputs, inputs] or [count, outputs, inputs]; in 8-bit
    floats, those of one matrix are gathered first. A lone matrix of one part is not copied at all.
    Lives on the device that is torch's default when it is made.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        form: WeightFormat,
        parts: int = 1,
        count: int | None = None,
    ) -> None:
        self._part = (outputs // parts, inputs)
        self._parts, self._count, self._form = parts, count, form
        self._device = torch.get_default_device()
        self._lone = count is None and parts == 1
        # Parts that do not end where a block does cannot share a matrix in 8-bit floats.
        self._keep = form.keep_fp8 and (parts == 1 or self._part[0] % BLOCK == 0)
        self._waiting: dict[int, dict[int, Value]] = {}
        self._value: Value | None = None

    def place(self, part: int = 0, index: int = 0) -> Place:
        """Of one part of one matrix."""
        return _Part(self, index, part, self._part)

    def take(self) -> Value:
        """The whole, once; all parts are there.

        Returns:
            [outputs, inputs], or [count, outputs, inputs].

        Raises:
            CheckpointError: some parts were in 8-bit floats, others not.
        """
        if self._waiting:
            raise CheckpointError(_MIXED)
        assert self._value is not None
        value, self._value = self._value, None
        return value

    def put(self, index: int, part: int, value: Value) -> None:
        """Takes one part of one matrix.

        Raises:
            CheckpointError: some of several matrices are in 8-bit floats, others are not.
        """
        value = self._formed(value)
        if isinstance(value, Tensor) and not self._lone:
            self._copy(index, part, value)
            return
        parts = self._waiting.setdefault(index, {})
        parts[part] = value
        if len(parts) < self._parts:
            return
        del self._waiting[index]
        whole = _joined([parts[number] for number in range(self._parts)])
        if self._count is None:
            self._value = whole
            return
        if self._value is None:
            self._value = _room(self._count, whole)
        _store(self._value, index, whole)

    def _copy(self, index: int, part: int, value: Tensor) -> None:
        """Puts one part straight to its rows."""
        rows, inputs = self._part
        if self._value is None:
            self._value = value.new_empty(self._count or 1, self._parts * rows, inputs)
            if self._count is None:
                self._value = self._value[0]
        if not isinstance(self._value, Tensor):
            raise CheckpointError(_MIXED)
        whole = self._value if self._count is None else self._value[index]
        whole[part * rows : (part + 1) * rows] = value

    def _formed(self, value: Value) -> Value:
        """On the device, and in the form that the matrix is held in."""
        if isinstance(value, Tensor):
            value = value.to(self._device, self._form.dtype)
            quantize = _QUANTIZERS.get(self._form.quantize or "")
            if quantize is None or (self._form.keep_fp8 and not self._keep):
                return value
            value = quantize(value)
        value = Fp8Weight(*(tensor.to(self._device) for tensor in value))
        return value if self._keep else from_fp8(value, self._form.dtype)


@dataclass(frozen=True, slots=True)
class _Part(Place):
    matrix: Matrix
    index: int
    part: int
    shape: tuple[int, ...]

    def put(self, value: Value) -> None:
        self.matrix.put(self.index, self.part, value)


def _joined(parts: list[Value]) -> Value:
    """The matrix of these rows; several are all in 8-bit floats."""
    if len(parts) == 1:
        return parts[0]
    blocks = [by_block(part) for part in parts if isinstance(part, Fp8Weight)]
    return Fp8Weight(*(torch.cat(tensors) for tensors in zip(*blocks, strict=True)))


def _room(count: int, like: Value) -> Value:
    if isinstance(like, Tensor):
        return like.new_empty(count, *like.shape)
    return Fp8Weight(*(tensor.new_empty(count, *tensor.shape) for tensor in like))


def _store(room: Value, index: int, value: Value) -> None:
    """Puts a value to its place among several of its form."""
    if isinstance(room, Tensor) and isinstance(value, Tensor):
        room[index] = value
    elif isinstance(room, Fp8Weight) and isinstance(value, Fp8Weight):
        room.data.view(torch.uint8)[index] = value.data.view(torch.uint8)
        room.scale[index] = value.scale
    else:
        raise CheckpointError(_MIXED)

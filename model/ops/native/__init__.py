"""bf16 operations in C++ for CPUs with AVX-512 BF16 or AVX2, compiled on first use.

With few rows a product is bound by reading its weight. oneDNN reaches half of what one thread
can read here, and two OpenMP threads of it hardly more; these kernels read a weight as one
stream. Weights are kept as *panels* of 64 output columns, see `panels.h`. CPUs without AVX-512
BF16 multiply in fp32 what is stored in bf16; torch has no quick way for that.

They are an option: `available` says whether there are any, and `model.ops.cpu` has for every
operation something that runs everywhere.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.native.build import Needs, instruction_sets, library
from model.quantize import int8

_PANEL = 64
_LATENT_STEP, _MOST_VALUES, _HEADS_STEP = 32, 512, 4  # of attend_pages
_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "linear": [_pointer, _long, _pointer, *[_int] * 4, _pointer, _long, _int],
    "rms_norm": [_pointer, _long, _pointer, _int, _int, _float, _pointer],
    "silu_mul": [_pointer, _long, _int, _int, _pointer],
    "rotate": [_pointer, _long, _long, _pointer, _pointer, _int, _int, _int],
    "route": [_pointer, *[_int] * 5, _float, _pointer, _pointer],
    "attend_chunk": [*[_pointer, _long] * 4, *[_int] * 6, _float, _int, _pointer, _pointer, _int],
    "attend_pages": [*[_pointer] * 4, *[_int] * 5, _float, _pointer, _int],
    "weighted_experts": [*[_pointer] * 3, *[_int] * 6, *[_pointer] * 7, _int],
}


def load(needs: Needs) -> ctypes.CDLL | None:
    """The kernels for an instruction set, such that they can be called."""
    kernels = library(needs)
    for name, arguments in _ARGUMENTS.items() if kernels is not None else ():
        getattr(kernels, name).argtypes = arguments
        getattr(kernels, name).restype = None
    return kernels


_kernels = load(instruction_sets()[0]) if instruction_sets() else None
LOADED = _kernels is not None


def available(tensor: Tensor) -> bool:
    """Whether there are kernels here for tensors like this one."""
    return LOADED and tensor.dtype == torch.bfloat16


def _call(name: str, *arguments: object) -> None:
    getattr(_kernels, name)(*arguments)


def panels(weight: Tensor, group: int = 2) -> Tensor | None:
    """Weights [..., outputs, inputs] as [..., outputs / 64, inputs / group, 64, group].

    None where the sizes are no multiples of 64 and `group`.
    """
    *_, outputs, inputs = weight.shape
    if outputs % _PANEL or inputs % group:
        return None
    by_panel = weight.unflatten(-1, (-1, group)).unflatten(-3, (-1, _PANEL))
    return by_panel.transpose(-3, -2).contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times the transpose of a weight as panels: [T, out]."""
    return linear_heads(x[:, None], weight[None])[:, 0]


def linear_heads(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, heads, in] times the transposes of heads weights as panels: [T, heads, out]."""
    x = _head_after_head(x)
    rows, heads, inputs = x.shape
    outputs = weight.shape[1] * _PANEL
    out = x.new_empty(rows, heads, outputs)
    _call("linear", x.data_ptr(), x.stride(0), weight.data_ptr(), rows, heads, inputs, outputs,
          out.data_ptr(), heads * outputs, torch.get_num_threads())  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] % 16:
        return None
    out = x.new_empty(x.shape)
    _call("rms_norm", x.data_ptr(), x.stride(0), weight.data_ptr(), *x.shape, eps, out.data_ptr())
    return out


def silu_mul(gate_up: Tensor) -> Tensor | None:
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 32:
        return None
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    _call("silu_mul", gate_up.data_ptr(), gate_up.stride(0), rows, both // 2, out.data_ptr())
    return out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """False where the shape is not for the kernel, and nothing was done."""
    if x.stride(-1) != 1 or x.shape[-1] % 32 or not (cos.is_contiguous() and sin.is_contiguous()):
        return False
    strides = x.stride()[:2]
    _call("rotate", x.data_ptr(), *strides, cos.data_ptr(), sin.data_ptr(), *x.shape)
    return True


def route(
    logits: Tensor, top_k: int, groups: int, groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    rows, experts = logits.shape
    ids = logits.new_empty(rows, top_k, dtype=torch.int64)
    weights = logits.new_empty(rows, top_k)
    _call("route", logits.data_ptr(), rows, experts, top_k, groups, groups_kept, scale,
          ids.data_ptr(), weights.data_ptr())  # fmt: skip
    return ids, weights


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor] | None:
    (queries, heads, _), (keys, shared) = query.shape, shared_key.shape
    own, values = key.shape[-1], value.shape[-1]
    if own % 2 or shared % 2 or values % _PANEL:
        return None
    tensors = [_head_after_head(each) for each in (query, key, value)]
    shared_key = shared_key if shared_key.stride(1) == 1 else shared_key.contiguous()
    tensors.insert(2, shared_key)
    places = [part for each in tensors for part in (each.data_ptr(), each.stride(0))]
    out = query.new_empty(queries, heads, values)
    lse = query.new_empty(queries, heads, dtype=torch.float32)
    _call("attend_chunk", *places, queries, keys, heads, own, shared, values, scale, causal,
          out.data_ptr(), lse.data_ptr(), torch.get_num_threads())  # fmt: skip
    return out, lse


def _head_after_head(x: Tensor) -> Tensor:
    """[tokens, heads, D] such that a token's heads lie one after the other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor | None:
    batch, heads, latent = query.shape
    fits = heads % _HEADS_STEP == latent % _LATENT_STEP == value_dim % _LATENT_STEP == 0
    if not fits or value_dim > _MOST_VALUES or cache.dtype != query.dtype:
        return None
    out = query.new_empty(batch, heads, value_dim)
    _call("attend_pages", query.contiguous().data_ptr(), cache.data_ptr(), pages.data_ptr(),
          lengths.data_ptr(), batch, pages.shape[1], heads, latent, value_dim, scale,
          out.data_ptr(), torch.get_num_threads())  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Stack:
    """One weight of many experts, [experts, outputs, inputs], as panels.

    Attributes:
        scales, sums: of int8, [experts, outputs]: what a number is worth (fp32), and the sum of
            a row's numbers (int32).
    """

    numbers: Tensor
    scales: Tensor | None = None
    sums: Tensor | None = None

    @property
    def pointers(self) -> list[int | None]:
        tensors = (self.numbers, self.scales, self.sums)
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@dataclass(frozen=True, slots=True)
class PanelExperts:
    """Routed experts as panels; one of gate and up holds 32 rows of either."""

    gate_up: Stack
    down: Stack
    inner: int


def pack_experts(gate_up: Tensor, down: Tensor, quantize: str | None) -> PanelExperts | None:
    """None where the sizes are not for the kernel."""
    experts, both, width = gate_up.shape
    if width % _PANEL or both % (2 * _PANEL):
        return None
    mixed = gate_up.view(experts, 2, -1, _PANEL // 2, width).transpose(1, 2)
    return PanelExperts(
        _stack(mixed.reshape(gate_up.shape), quantize), _stack(down, quantize), both // 2
    )


def _stack(weights: Tensor, quantize: str | None) -> Stack:
    if quantize is None:
        packed = panels(weights)
        assert packed is not None
        return Stack(packed)
    numbers, scales = int8(weights)
    packed = panels(numbers, group=4)
    assert packed is not None
    return Stack(packed, scales, numbers.sum(-1, dtype=torch.int32))


def weighted_experts(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: PanelExperts, first: int
) -> Tensor:
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    (rows, width), top_k = hidden.shape, ids.shape[1]
    out = torch.empty_like(hidden)
    _call("weighted_experts", hidden.data_ptr(), ids.data_ptr(), weights.data_ptr(), rows, top_k,
          first, len(experts.gate_up.numbers), width, experts.inner, *experts.gate_up.pointers,
          *experts.down.pointers, out.data_ptr(), torch.get_num_threads())  # fmt: skip
    return out

"""Which implementation of an operation runs on a device.

Implementations come in *kinds*: "reference" is plain torch, "cpu" what CPUs do faster, "triton"
our own kernels for GPUs; "library" these but for what torch's libraries do too, "flash_mla" and
"flashinfer" these but for decode by the packages of those names. A kind is a few modules, and lacks
some operations; for those the reference is taken. A device has kinds that it prefers; another one
can be forced, for some operations or for all.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Collection
from functools import cache
from types import ModuleType
from typing import Any

Implementation = Callable[..., Any]

OPERATIONS = (
    "pack",
    "pack_heads",
    "pack_experts",
    "linear",
    "linear_heads",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "rotate_",
    "write_rows",
    "read_rows",
    "attend",
    "attend_latents",
    "plan_pages",
    "attend_pages",
    "merge",
    "route",
    "weighted_experts",
    "draw",
)

REFERENCE = "reference"

# Of a kind's modules, the first that has an operation does it.
_TRITON = (
    "triton_attention",
    "triton_latents",
    "triton_cache",
    "triton_linear",
    "triton_experts",
    "triton_rows",
    "triton_gate",
    "triton_sampling",
)
_MODULES = {
    REFERENCE: ("reference",),
    "cpu": ("cpu",),
    "triton": _TRITON,
    "library": ("library", "library_attention", "library_flash_mla", *_TRITON),
    "flash_mla": ("library_flash_mla", *_TRITON),
    "flashinfer": ("library_flashinfer", *_TRITON),
}
_PACKAGES = {"triton", "flash_mla", "flashinfer"}  # which are called as their kinds
_PREFERRED = {"cpu": ("cpu",), "cuda": ("triton",)}

_log = logging.getLogger("expertline.ops")
_forced: dict[tuple[str, str], str] = {}


def choose(device: str, kind: str, operations: Collection[str] = OPERATIONS) -> None:
    """Forces a kind of implementation for these operations on a device; "auto" leaves it again.

    An operation that the kind lacks is the reference's. For the start of a process: weights
    packed by one kind cannot be read by another.

    Raises:
        ValueError: there is no such kind or operation, or the kind cannot run on the device.
        ModuleNotFoundError: the kind needs a package that is not installed.
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise ValueError(f"no operation is called {', '.join(sorted(unknown))}")
    if kind != "auto":
        modules_of(kind)
        if not installed(kind):
            raise ModuleNotFoundError(f"the package {kind} is not installed")
    if kind == "triton" and device == "cpu" and not _interpreted():
        raise ValueError("Triton runs on CPUs only with TRITON_INTERPRET=1, and slowly")
    for operation in operations:
        _forced.pop((device, operation), None)
        if kind != "auto":
            _forced[device, operation] = kind
    implementations.cache_clear()


def _interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@cache
def implementations(device: str) -> dict[str, Implementation]:
    """What runs on a device, by operation; logged when it is decided, which is on first use."""
    chosen = {operation: chosen_for(operation, device) for operation in OPERATIONS}
    by_kind: dict[str, list[str]] = {}
    for operation, (kind, _) in chosen.items():
        by_kind.setdefault(kind, []).append(operation)
    words = [f"{kind}={','.join(names)}" for kind, names in by_kind.items()]
    _log.info("ops.chosen device=%s %s", device, " ".join(words))
    return {operation: implementation for operation, (_, implementation) in chosen.items()}


def chosen_for(operation: str, device: str) -> tuple[str, Implementation]:
    """The kind that runs for an operation on a device, and what it runs."""
    forced = _forced.get((device, operation))
    kinds = _preferred(device) if forced is None else (forced,)
    for kind in (*kinds, REFERENCE):
        if (implementation := offered(kind, operation)) is not None:
            return kind, implementation
    raise NotImplementedError(operation)


def offered(kind: str, operation: str) -> Implementation | None:
    """What a kind has for an operation."""
    for module in modules_of(kind):
        implementation: Implementation | None = getattr(module, operation, None)
        # What a module has imported for its own use it does not offer.
        own = kind == REFERENCE or getattr(implementation, "__module__", "") == module.__name__
        if implementation is not None and own:
            return implementation
    return None


def installed(kind: str) -> bool:
    """Whether the package that a kind is named for is there; others need none."""
    return kind not in _PACKAGES or importlib.util.find_spec(kind) is not None


@cache
def _preferred(device: str) -> tuple[str, ...]:
    kinds = _PREFERRED.get(device, ())
    if "triton" not in kinds or importlib.util.find_spec("triton") is not None:
        return kinds
    _log.warning("ops.no_triton device=%s", device)
    return tuple(kind for kind in kinds if kind != "triton")


def modules_of(kind: str) -> tuple[ModuleType, ...]:
    """A kind's modules, imported only when somebody wants them.

    Raises:
        ValueError: there is no such kind.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    if kind not in _MODULES:
        raise ValueError(f"no implementation is called {kind}: {', '.join(_MODULES)}")
    return tuple(importlib.import_module(f"model.ops.{name}") for name in _MODULES[kind])

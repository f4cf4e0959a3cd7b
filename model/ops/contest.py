"""Which of several kinds is the fastest for an operation here: measured once, at the start.

A challenger takes an operation over if it gives the same results, and is faster at every size that
is tried. One that fails, for whatever reason, has lost.
"""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.choice import Implementation, choose, chosen_for, installed, offered

_FASTER = 0.97  # of the time: what is gained must be more than what was measured by chance
_NEAR = 2e-2  # of the largest magnitude: bf16's own error, twice
_REPEATS = 9

# The least and the last major version of CUDA's compute capability that a kind's kernels run on.
_CAPABILITIES = {"library": (8, 99), "flash_mla": (9, 9), "flashinfer": (8, 99)}

_log = logging.getLogger("expertline.ops")

Call = Callable[[], Tensor]
Seconds = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Size:
    """One size to try.

    Attributes:
        call: gives what computes it with implementations, in the order of the contest's
            operations.
    """

    name: str
    call: Callable[[Sequence[Implementation]], Call]


@dataclass(frozen=True, slots=True)
class Contest:
    """Operations that go to one kind together, who asks for them, and at which sizes.

    Attributes:
        operations: the one that is measured, and those that belong to it.
    """

    operations: tuple[str, ...]
    challengers: tuple[str, ...]
    sizes: tuple[Size, ...]


def hold(contest: Contest, device: torch.device, seconds: Seconds | None = None) -> str:
    """Lets the fastest kind have the operations on a device from now on, and tells which it is.

    Args:
        seconds: how long a call takes; by default as measured.
    """
    operation = contest.operations[0]
    holder, _ = chosen_for(operation, device.type)
    timed = seconds or (lambda call: measured(call, device))
    own = [chosen_for(each, device.type)[1] for each in contest.operations]
    calls = [size.call(own) for size in contest.sizes]
    expected = [call() for call in calls]
    best, winner = [timed(call) for call in calls], holder
    words = [f"{holder}={_listed(best)}"]
    for kind in contest.challengers:
        if (reason := unfit(kind, device)) is not None:
            words.append(f"{kind}={reason}")
            continue
        try:
            found = _times(contest, kind, expected, timed)
        except Exception as error:  # somebody else's library: it may fail in any way
            words.append(f"{kind}=failed:{type(error).__name__}")
            continue
        words.append(f"{kind}={_listed(found) if found else 'wrong_results'}")
        if found and all(its < _FASTER * b for its, b in zip(found, best, strict=True)):
            best, winner = found, kind
    if winner != holder:
        choose(device.type, winner, contest.operations)
    names = ",".join(size.name for size in contest.sizes)
    text = "ops.contest operation=%s sizes=%s unit=us %s chosen=%s"
    _log.info(text, operation, names, " ".join(words), winner)
    return winner


def unfit(kind: str, device: torch.device) -> str | None:
    """Why a kind cannot compete on a device, in one word; None if it can."""
    if not installed(kind):
        return "not_installed"
    if device.type == "cuda":
        least, last = _CAPABILITIES[kind]
        if not least <= torch.cuda.get_device_capability(device)[0] <= last:
            return "not_for_this_device"
    return None


def _times(
    contest: Contest, kind: str, expected: Sequence[Tensor], timed: Seconds
) -> list[float] | None:
    """Seconds of a kind at each size; None if it does not compute the same."""
    implementations = [_offered(kind, each) for each in contest.operations]
    calls = [size.call(implementations) for size in contest.sizes]
    for call, wanted in zip(calls, expected, strict=True):
        off = (call().float() - wanted.float()).abs().max()
        if not bool(off <= _NEAR * wanted.float().abs().max()):
            return None
    return [timed(call) for call in calls]


def _offered(kind: str, operation: str) -> Implementation:
    implementation = offered(kind, operation) or offered("reference", operation)
    assert implementation is not None
    return implementation


def _listed(times: Sequence[float]) -> str:
    return ",".join(f"{1e6 * each:.0f}" for each in times)


def measured(call: Call, device: torch.device) -> float:
    """The median of a few calls, each waited for; in seconds."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(_REPEATS))

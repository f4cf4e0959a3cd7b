"""What these files have in common: they run in processes of their own, see test_kernels.py.

Triton is imported late: pytest reads this file in the process of all other tests too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

HOPPER = ("cuda", 90, 32)
SHARED_BYTES = 232_448  # what a program may have of a Hopper multiprocessor


@pytest.fixture(autouse=True)
def _every_element_must_be_written() -> Iterator[None]:
    """New tensors begin as NaN, or as the largest number of their dtype."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class _NoDevice:
    """As much of Triton's driver as compiling takes, for a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*HOPPER)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a test launches is compiled for a Hopper GPU instead of run, and is kept here."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _NoDevice())
    yield kernels
    assert kernels
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_BYTES, kernel.name

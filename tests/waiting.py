"""Waiting for what other tasks or processes bring about."""

import asyncio
import time
from collections.abc import Callable

_POLL_S = 0.02


async def until(
    condition: Callable[[], bool], timeout_s: float = 60.0, poll_s: float = _POLL_S
) -> None:
    """Returns once the condition holds; TimeoutError if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come to hold")
        await asyncio.sleep(poll_s)

"""Waiting for a condition, never without a bound."""

import asyncio
import time
from collections.abc import Awaitable, Callable

_POLL_S = 0.1  # what is asked costs the machine that is measured


class ChaosError(Exception):
    """A scenario cannot go on; the message says why."""


async def until(
    condition: Callable[[], bool | Awaitable[bool]], within_s: float, what: str
) -> float:
    """Seconds until the condition held.

    Raises:
        ChaosError: it did not within `within_s`; the message names `what`.
    """
    started = time.monotonic()
    while True:
        held = condition()
        if not isinstance(held, bool):
            held = await held
        if held:
            return time.monotonic() - started
        if time.monotonic() > started + within_s:
            raise ChaosError(f"not within {within_s:.0f} s: {what}")
        await asyncio.sleep(_POLL_S)

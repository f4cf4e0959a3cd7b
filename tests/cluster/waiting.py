"""Waiting for what a server brings about: not looked at often, since that takes its time away."""

from collections.abc import Callable

from tests import waiting

_POLL_S = 0.2


async def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Returns once the condition holds; TimeoutError if it does not in time."""
    await waiting.until(condition, timeout_s, _POLL_S)

"""What a token costs on its way out, in all processes between the ranks and the client."""

import asyncio

from loadtest.costs.client import StreamClient
from loadtest.costs.processes import CLIENT, OTHERS, SERVING, Usage
from loadtest.costs.result import Result
from loadtest.costs.server import PacedServer

TARGET_US = 80.0
_PACE_MS = 20  # 50 tokens a second
_SETTLE_S = 2.0
_BEGIN_S = 30.0
_MOST_TOKENS = 4096
_FOREIGN_SHARE = 0.1  # of a core
_PACE_KEPT = 0.95


async def measure(server: PacedServer, streams: int = 64, seconds: float = 10.0) -> Result:
    """CPU per token while all streams run: no request begins or ends in between."""
    client = StreamClient(server.port)
    requests = [server.request(number, _PACE_MS, _MOST_TOKENS) for number in range(streams)]
    try:
        await client.open(requests, rate=streams, timeout_s=_BEGIN_S)
        await asyncio.sleep(_SETTLE_S)
        before, events = Usage.now(), client.events
        gaps = await client.watch(seconds)
        after, tokens = Usage.now(), client.events - events
    finally:
        await client.close()
    await asyncio.sleep(_SETTLE_S)
    resting = Usage.now()
    await asyncio.sleep(seconds)
    idle, busy = Usage.now().since(resting), after.since(before)
    wall_s = after.at - before.at
    return summary(busy, idle, tokens, streams, wall_s, sum(gaps) / max(1, len(gaps)))


def summary(
    busy: dict[str, float],
    idle: dict[str, float],
    tokens: int,
    streams: int,
    wall_s: float,
    mean_gap_s: float,
) -> Result:
    """The figure: CPU of the serving processes over tokens, what they use at rest included.

    Args:
        busy: CPU seconds by role while the tokens came.
        idle: the same of as long a time without any.
    """
    serving_s = sum(busy.get(name, 0.0) for name in SERVING)
    at_rest_s = sum(idle.get(name, 0.0) for name in SERVING)
    kept = tokens * _PACE_MS / 1000 / (streams * wall_s)
    doubts = []
    if busy[OTHERS] > _FOREIGN_SHARE * wall_s:
        doubts.append(f"other processes of the machine took {busy[OTHERS] / wall_s:.0%} of a core")
    if kept < _PACE_KEPT:
        doubts.append(f"only {kept:.0%} of the tokens came at their pace, or came several at once")
    return Result(
        name="tokens",
        title=f"serving CPU of a token ({streams} streams at {1000 / _PACE_MS:g} tok/s)",
        value=1e6 * serving_s / tokens,
        unit="µs",
        target=TARGET_US,
        details={
            "tokens": tokens,
            "seconds": wall_s,
            "mean_gap_ms": 1e3 * mean_gap_s,
            "cpu_us_per_token": {name: 1e6 * spent / tokens for name, spent in busy.items()},
            "idle_cpu_ms_per_second": {name: 1e3 * s / wall_s for name, s in idle.items()},
            "without_idle_us": 1e6 * (serving_s - at_rest_s) / tokens,
            "client_share_of_a_core": busy.get(CLIENT, 0.0) / wall_s,
        },
        doubts=doubts,
    )

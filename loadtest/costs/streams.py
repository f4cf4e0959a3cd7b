"""How many streams one ingress on one core holds at a reader's pace."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtest.costs.client import ClientError, StreamClient
from loadtest.costs.processes import CLIENT, OTHERS, Usage, pinned
from loadtest.costs.result import Result
from loadtest.costs.server import PacedServer
from loadtest.report import Distribution

TARGET = 500.0
LEVELS = tuple(range(100, 1001, 100))
_PACE_MS = 50  # 20 tokens a second
_LONGEST_GAP_MS = 2.0 * _PACE_MS
_RATE = 100.0  # streams begun a second
_SETTLE_S = 1.0
_BEGIN_S = 30.0
_MOST_TOKENS = 8000
_ATTEMPTS = 2  # a level fails if it does so twice: others may have used the machine
_FULL = 0.9  # of a core


@dataclass(frozen=True, slots=True)
class Level:
    """So many streams at once, and what was seen of them."""

    streams: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    tokens_per_second: float
    cpu: dict[str, float]  # by role, in cores

    @property
    def holds(self) -> bool:
        """Hardly a reader waits for twice the pace, and no token is late on the whole."""
        return self.gap_p99_ms <= _LONGEST_GAP_MS


async def measure(
    server: PacedServer, levels: Sequence[int] = LEVELS, seconds: float = 3.0
) -> Result:
    """Adds streams level by level until a level does not hold any more."""
    client, seen = StreamClient(server.port), list[Level]()
    ingress = Usage.now().pids("ingress")[0]
    with pinned(ingress) as alone:
        try:
            for level in levels:
                more = range(len(client), level)
                requests = [server.request(number, _PACE_MS, _MOST_TOKENS) for number in more]
                await client.open(requests, _RATE, _BEGIN_S)
                await asyncio.sleep(_SETTLE_S)
                for _ in range(_ATTEMPTS):
                    seen.append(await _level(client, seconds))
                    if seen[-1].holds:
                        break
                else:
                    break
        except ClientError as error:
            return summary(seen, alone, [str(error)])
        finally:
            await client.close()
    return summary(seen, alone, [])


async def _level(client: StreamClient, seconds: float) -> Level:
    before = Usage.now()
    gaps = Distribution.of(1e3 * gap for gap in await client.watch(seconds))
    after = Usage.now()
    wall_s = after.at - before.at
    return Level(
        streams=len(client),
        gap_p50_ms=gaps.p50,
        gap_p99_ms=gaps.p99,
        gap_max_ms=gaps.max,
        tokens_per_second=gaps.count / seconds,
        cpu={name: spent / wall_s for name, spent in after.since(before).items()},
    )


def summary(seen: Sequence[Level], alone: bool, doubts: list[str]) -> Result:
    """The figure: the highest level that held.

    Args:
        alone: the ingress had a core for itself.
        doubts: what ended the measurement too early, if anything did.
    """
    held = max((level.streams for level in seen if level.holds), default=0)
    if not alone:
        doubts = [*doubts, "the ingress shared the one core with all others"]
    if seen:
        doubts = [*doubts, *_bottlenecks(seen[-1])]
        if seen[-1].holds and not doubts:
            doubts = [*doubts, "the highest level held as well: there may be room for more"]
    return Result(
        name="streams",
        title=f"streams of an ingress on one core ({1000 / _PACE_MS:g} tok/s, p99 gap ≤ "
        f"{_LONGEST_GAP_MS:g} ms)",
        value=held,
        unit="streams",
        target=TARGET,
        higher_is_better=True,
        details={"ingress_alone_on_its_core": alone, "levels": [asdict(level) for level in seen]},
        doubts=doubts,
    )


def _bottlenecks(level: Level) -> list[str]:
    """What besides the ingress was at its end at a level."""
    cpu = level.cpu
    if cpu.get("ingress", 0.0) >= _FULL:
        return []
    found: list[str] = []
    if cpu.get(CLIENT, 0.0) >= _FULL:
        found.append("the client was at its end before the ingress: there may be room for more")
    elif sum(cpu.values()) - cpu.get("ingress", 0.0) >= _FULL:
        share = ", ".join(f"{name} {used:.0%}" for name, used in sorted(cpu.items()) if used > 0.05)
        found.append(f"the core beside the ingress was full at {level.streams} streams ({share})")
    if cpu.get(OTHERS, 0.0) >= 1 - _FULL:
        found.append(f"other processes of the machine took {cpu[OTHERS]:.0%} of a core")
    return found

"""What a server holds when nothing is asked of it, and what it has not given back."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

from loadtest.chaos.census import Census
from loadtest.chaos.processes import SERVING
from loadtest.chaos.server import Server
from loadtest.chaos.waiting import ChaosError, until

IDLE = {
    "expertline_pages": {"state": "held"},
    "expertline_requests_running": {},
    "expertline_requests_waiting": {},
    "expertline_reserved_tokens": {},
    "expertline_streams_open": {},
    "expertline_queue_requests": {},
}  # metrics that are zero when nothing is asked, and the labels that are meant
TASKS = "expertline_asyncio_tasks"
_MORE_FILES = 12  # of a process: connections that stay open between requests
_MORE_TASKS = 6  # of all processes
Samples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of one moment. `files` is by role, the most that one of its processes has open."""

    busy: dict[str, float]
    tasks: float
    files: dict[str, int]
    processes: Counter[str]
    actors: dict[str, int]
    groups: dict[str, int]


async def holdings(server: Server, client: httpx.AsyncClient, census: Census) -> Holdings:
    """What there is now.

    Raises:
        ChaosError: the cluster or the server does not tell.
    """
    metrics = await server.metrics(client)
    if TASKS not in metrics:
        raise ChaosError("the server tells no metrics")
    files: dict[str, int] = {}
    processes: Counter[str] = Counter()
    for process in server.processes(*SERVING):
        processes[process.role] += 1
        files[process.role] = max(files.get(process.role, 0), process.files)
    counted = await census.count()
    return Holdings(
        busy={name: total(metrics, name, **labels) for name, labels in IDLE.items()},
        tasks=total(metrics, TASKS),
        files=files,
        processes=processes,
        actors=counted["actors"],
        groups=counted["groups"],
    )


def total(metrics: Samples, name: str, **labels: str) -> float:
    """Sum of a metric over all processes."""
    return float(sum(s["value"] for s in metrics.get(name, ()) if labels.items() <= s.items()))


def kept(before: Holdings, now: Holdings) -> list[str]:
    """What is not as it was before, in words; empty if all has been given back."""
    found = [f"{name.removeprefix('expertline_')}: {v:g}" for name, v in now.busy.items() if v]
    if now.tasks > before.tasks + _MORE_TASKS:
        found.append(f"tasks: {now.tasks:g}, before {before.tasks:g}")
    for role, count in now.files.items():
        if count > before.files.get(role, 0) + _MORE_FILES:
            found.append(f"descriptors of a {role}: {count}, before {before.files.get(role, 0)}")
    for what in ("processes", "actors", "groups"):
        was, is_now = dict(getattr(before, what)), dict(getattr(now, what))
        if was != is_now:
            found.append(f"{what}: {_changes(was, is_now)}")
    return found


def _changes(was: dict[str, int], is_now: dict[str, int]) -> str:
    names = sorted(was.keys() | is_now.keys())
    changed = [n for n in names if was.get(n, 0) != is_now.get(n, 0)]
    return ", ".join(f"{n} {is_now.get(n, 0)} instead of {was.get(n, 0)}" for n in changed)


async def settled(
    before: Holdings, server: Server, client: httpx.AsyncClient, census: Census, within_s: float
) -> list[str]:
    """Waits until all is given back; what is not, if it does not happen in time."""
    left = ["nothing could be asked"]

    async def given_back() -> bool:
        nonlocal left
        try:
            left = kept(before, await holdings(server, client, census))
        except ChaosError as error:
            left = [str(error)]
        return not left

    try:
        await until(given_back, within_s, "all given back")
    except ChaosError:
        return left
    return []

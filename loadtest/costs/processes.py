"""CPU time of this process and all that it started, by what they are for (Linux)."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.peers.process import descendants

CLIENT = "client"
OTHERS = "others"  # of the machine: nothing of the measurement
SERVING = ("haproxy", "proxy", "ingress", "engine", "router")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# What a command line holds, the more special first. Serve's own proxies are never on the way of
# a token behind HAProxy, but they are there.
_ROLES = (
    ("ray::ServeReplica:expertline:Ingress", "ingress"),
    ("ray::ServeReplica:expertline:Engine", "engine"),
    ("ray::ServeReplica:expertline:Router", "router"),
    ("ray::PacedRank", "paced rank"),
    ("ray::ServeController", "controller"),
    ("ray::HAProxyManager", "proxy"),
    ("ray::ProxyActor", "proxy"),
    ("haproxy", "haproxy"),
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used until a moment, in seconds."""

    at: float
    cpu_s: dict[int, float]  # by process
    roles: dict[int, str]
    machine_s: float  # of all processes of the machine

    @classmethod
    def now(cls) -> "Usage":
        pids = {os.getpid(), *descendants(os.getpid())}
        cpu = {pid: seconds for pid in pids if (seconds := cpu_s(pid)) is not None}
        return cls(time.perf_counter(), cpu, {pid: role(pid) for pid in cpu}, _machine_s())

    def since(self, earlier: "Usage") -> dict[str, float]:
        """CPU seconds of each role, of `OTHERS` too. What has ended in between is left out."""
        spent: dict[str, float] = {}
        for pid, seconds in self.cpu_s.items():
            name = self.roles[pid]
            spent[name] = spent.get(name, 0.0) + seconds - earlier.cpu_s.get(pid, 0.0)
        whole = self.machine_s - earlier.machine_s
        spent[OTHERS] = max(0.0, whole - sum(spent.values()))
        return spent

    def pids(self, name: str) -> list[int]:
        """The processes of a role."""
        return [pid for pid, each in self.roles.items() if each == name]


def cpu_s(pid: int) -> float | None:
    """CPU seconds of a process until now, to a tick of 10 ms; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before them may hold anything
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def role(pid: int) -> str:
    """What a process is for: one of `SERVING`, `CLIENT` or another part of the cluster."""
    if pid == os.getpid():
        return CLIENT
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = ""
    return next((name for words, name in _ROLES if words in command), "ray")


@contextmanager
def pinned(alone: int) -> Iterator[bool]:
    """One process on the last core for the body, all others and this one on the rest.

    Yields whether there are cores enough to do so.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        yield False
        return
    for pid in {os.getpid(), *descendants(os.getpid())}:
        _pin(pid, cores[-1:] if pid == alone else cores[:-1])
    try:
        yield True
    finally:
        for pid in {os.getpid(), *descendants(os.getpid())}:
            _pin(pid, cores)


def _pin(pid: int, cores: list[int]) -> None:
    """All threads: a process's own number stands for its first one only."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue  # it has ended


def _machine_s() -> float:
    """CPU seconds that all processes of the machine have had."""
    line = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
    user, nice, system, _idle, _waiting, interrupts, soft = map(int, line.split()[1:8])
    return (user + nice + system + interrupts + soft) * _TICK_S

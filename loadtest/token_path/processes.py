"""Which processes a server consists of, by what they do, and the CPU time that each has used."""

import os
from collections import defaultdict

import psutil

from loadtest.peers.process import descendants

_ROLES = {
    "ServeReplica:expertline:Ingress": "ingress",
    "ServeReplica:expertline:Engine": "engine",
    "ServeReplica:expertline:Router": "router",
    "ServeController": "controller",
    "HAProxyManager": "proxy actor",
    "ProxyActor": "proxy actor",
    "haproxy": "haproxy",
    "raylet": "raylet",
    "gcs_server": "gcs",
}
OTHER = "other"


def by_role() -> dict[str, list[psutil.Process]]:
    """This process's children, theirs and so on; `other` for those without a part in serving."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    for pid in descendants(os.getpid()):
        try:
            process = psutil.Process(pid)
            title = " ".join([process.name(), *process.cmdline()])
        except psutil.NoSuchProcess:
            continue
        role = next((role for mark, role in _ROLES.items() if mark in title), OTHER)
        found[role].append(process)
    return found


def cpu_s(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """User and system CPU seconds so far, by role."""
    return {role: sum(map(_used, members)) for role, members in processes.items()}


def _used(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)

"""Who is who among the processes of a server under test, and what each holds open.

A server's processes are known by a mark in their environment, which they inherit from the
command that started them; nobody else's process is ever touched.
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROLES = {
    "rank": "ray::Rank",
    "engine": "ray::ServeReplica:expertline:Engine",
    "router": "ray::ServeReplica:expertline:Router",
    "ingress": "ray::ServeReplica:expertline:Ingress",
    "controller": "ray::ServeController",
    "raylet": "/raylet/raylet ",
    "gcs": "/gcs/gcs_server ",
    "haproxy": "/haproxy ",
}
SERVING = ("rank", "engine", "router", "ingress")  # processes with code of this project
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as `/proc` shows it."""

    pid: int
    role: str

    @property
    def files(self) -> int:
        """Open descriptors; 0 if it has ended."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return 0

    @property
    def resident_bytes(self) -> int:
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()
        except OSError:
            return 0
        return int(fields[1]) * _PAGE_BYTES


def marked(mark: str) -> list[Process]:
    """Processes whose environment holds `mark` ("NAME=value") and that have a role."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended in the meantime
        role = role_of(title)
        if role is not None:
            found.append(Process(int(entry.name), role))
    return sorted(found, key=lambda process: process.pid)


def role_of(title: str) -> str | None:
    """The role that a command line tells; None for all others."""
    for role, sign in ROLES.items():
        if title.startswith(sign) or (sign.startswith("/") and sign in f"{title} "):
            return role
    return None


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """A signal to each that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"

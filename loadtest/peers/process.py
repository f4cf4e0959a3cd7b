"""Child processes with a time limit, ended with everything that they started.

Servers start daemons, and daemons workers in sessions of their own, so a process group is not
enough: what is left of the family is found by its parents. Orphans are handed to this process
(`adopt_orphans`), so that a daemon whose parent went first still has one to be found by.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 40.0  # for a server to end by itself after SIGINT
_KILL_S = 10.0
_POLL_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36


class PeerFailed(Exception):
    """A candidate cannot be set up or measured; the message says why, in one line."""


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process for the body of the `with`; afterwards it and its family are gone."""
    earlier = descendants(os.getpid())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end(process, earlier)


def output_of(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    limit_s: float,
    stdin: str = "",
) -> str:
    """What a command printed on its standard output; the rest goes to `log`.

    Raises:
        PeerFailed: it failed, or took longer than `limit_s`.
    """
    earlier = descendants(os.getpid())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(stdin, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"took longer than {limit_s:.0f} s") from None
        finally:
            end(process, earlier, grace_s=0.0)
    with log.open("a") as errors:
        errors.write(said)
    if process.returncode:
        raise PeerFailed(last_words(log) or f"exit code {process.returncode}")
    return said


def last_words(log: Path, length: int = 200) -> str:
    """The line of a log that most likely says what went wrong: its last error, or its last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if "Error" in line or line.startswith("ERROR")]
    return (errors or lines or [""])[-1][:length]


def end(
    process: "subprocess.Popen[bytes] | subprocess.Popen[str]",
    earlier: set[int],
    grace_s: float = STOP_S,
) -> None:
    """Asks the process to stop, then kills what is left of its family.

    Args:
        earlier: descendants of this process that have nothing to do with it.
    """
    family = descendants(process.pid)
    if process.poll() is None and grace_s:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        family |= descendants(os.getpid()) - earlier
        left = {pid for pid in family if _alive(pid)}
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        for pid in family - {process.pid}:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left:
            return
        time.sleep(_POLL_S)


def descendants(pid: int) -> set[int]:
    """Children of a process, their children and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        fresh = [child for child in children.get(waiting.pop(), []) if child not in found]
        found.update(fresh)
        waiting.extend(fresh)
    return found


def _parent(entry: Path) -> int | None:
    fields = _stat(entry)
    return int(fields[1]) if fields else None


def _alive(pid: int) -> bool:
    fields = _stat(Path("/proc") / str(pid))
    return bool(fields) and fields[0] != "Z"


def _stat(entry: Path) -> list[str]:
    """State, parent and so on; what stands before them may hold spaces and brackets."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []  # it ended in the meantime

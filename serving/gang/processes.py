"""Ranks as plain processes of this machine: for offline use and tests, without Ray.

python -m serving.gang.processes        (RankSpec as JSON on stdin, secret as its hex)
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process

from serving.gang.members import Cell
from serving.gang.messages import RankSpec

_GRACE_S = 5.0


class ProcessLauncher:
    """Starts each rank with this interpreter; ends those it started, and no others."""

    def __init__(self) -> None:
        self._processes: dict[Cell, Process] = {}
        self._waits: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Queue[tuple[Cell, Process]] = asyncio.Queue()

    @property
    def pids(self) -> dict[Cell, int]:
        """Of each rank's process."""
        return {cell: process.pid for cell, process in self._processes.items()}

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        for spec in specs:
            cell = (spec.stage, spec.rank)
            earlier = self._processes.pop(cell, None)
            if earlier is not None:
                _signal(earlier, signal.SIGKILL)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "serving.gang.processes", stdin=PIPE, start_new_session=True
            )
            self._processes[cell] = process
            wait = asyncio.create_task(self._wait(cell, process))
            self._waits.add(wait)
            wait.add_done_callback(self._waits.discard)
            message = {"spec": dataclasses.asdict(spec), "secret": secret.hex()}
            assert process.stdin is not None
            process.stdin.write(json.dumps(message).encode())
            process.stdin.close()

    async def watch(self) -> tuple[Cell, str]:
        while True:
            cell, process = await self._ended.get()
            if self._processes.get(cell) is process:  # else it has been replaced
                return cell, f"rank process {process.pid} ended with code {process.returncode}"

    async def stop(self) -> None:
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
            _signal(process, signal.SIGCONT)  # one that stands still would not hear the first
        for process in self._processes.values():
            try:
                await asyncio.wait_for(process.wait(), _GRACE_S)
            except TimeoutError:
                _signal(process, signal.SIGKILL)
                await process.wait()
        await asyncio.gather(*self._waits)

    async def _wait(self, cell: Cell, process: Process) -> None:
        await process.wait()
        self._ended.put_nowait((cell, process))


def _signal(process: Process, number: signal.Signals) -> None:
    """Not by `Process.kill`, which takes the exit code from the one who waits for it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def main() -> None:
    from serving.gang.resident import run_rank
    from serving.telemetry.logs import setup_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a rank ends
    message = json.loads(sys.stdin.read())
    spec = RankSpec(**message["spec"])
    setup_logging(spec.log_level)
    run_rank(spec, bytes.fromhex(message["secret"]))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's and torch's threads have nothing left to say

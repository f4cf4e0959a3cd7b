"""Ranks as plain processes of this machine: for offline use and tests, without Ray.

python -m serving.gang.processes        (RankSpec as JSON on stdin, secret as its hex)
"""

import asyncio
import dataclasses
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process

from serving.gang.messages import RankSpec

_GRACE_S = 5.0


class ProcessLauncher:
    """Starts each rank with this interpreter; ends those it started, and no others."""

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._started = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        for spec in specs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "serving.gang.processes", stdin=PIPE, start_new_session=True
            )
            self._processes.append(process)
            message = {"spec": dataclasses.asdict(spec), "secret": secret.hex()}
            assert process.stdin is not None
            process.stdin.write(json.dumps(message).encode())
            process.stdin.close()
        self._started.set()

    async def watch(self) -> str:
        await self._started.wait()
        waits = [asyncio.create_task(process.wait()) for process in self._processes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        codes = [process.returncode for process in self._processes]
        index = next(i for i, code in enumerate(codes) if code is not None)
        return f"rank process {self._processes[index].pid} ended with code {codes[index]}"

    async def stop(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.terminate()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), _GRACE_S)
            except TimeoutError:
                process.kill()
                await process.wait()


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

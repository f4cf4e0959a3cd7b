"""Actors and placement groups of a cluster: `python -m loadtest.chaos.census` in its environment.

A process of its own, since a process can join one cluster only, and costs what Ray costs. It
answers every line on its input with one line of JSON.
"""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from loadtest.chaos.server import Server
from loadtest.chaos.waiting import ChaosError

_ANSWER_S = 60.0
_GONE = ("DEAD", "REMOVED")


class Census:
    """A resident census process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def count(self) -> dict[str, dict[str, int]]:
        """Living actors by class, and placement groups by state.

        Raises:
            ChaosError: the cluster does not answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._process.stdin.write(b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
            answer: dict[str, dict[str, int]] = json.loads(line)
        except (TimeoutError, ConnectionError, ValueError) as error:
            raise ChaosError(f"the cluster tells no actors: {type(error).__name__}") from error
        return answer


@asynccontextmanager
async def census(server: Server) -> AsyncIterator[Census]:
    """A census of a server's cluster."""
    process = await asyncio.create_subprocess_exec(
        *server.prefix,
        sys.executable,
        "-m",
        "loadtest.chaos.census",
        env=dict(server.variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield Census(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    """Answers until its input ends."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    for _ in sys.stdin:
        print(json.dumps(_counted()), flush=True)


def _counted() -> dict[str, Any]:
    from ray._private.state import actors
    from ray.util import placement_group_table

    living = [a["ActorClassName"] for a in actors().values() if a["State"] not in _GONE]
    groups = [group["state"] for group in placement_group_table().values()]
    return {
        "actors": Counter(living),
        "groups": Counter(state for state in groups if state not in _GONE),
    }


if __name__ == "__main__":
    main()

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

_ANSWER_S = 120.0
_GONE = ("DEAD", "REMOVED")
_PROXIES = ("HAProxyManager", "ProxyActor")  # one on each node that happens to have replicas


class Census:
    """A resident census process of a server's cluster, started when it is first asked and anew
    when it has died with the node that it ran on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._process: asyncio.subprocess.Process | None = None

    async def count(self) -> dict[str, dict[str, int]]:
        """Living actors by class, proxies left out, and placement groups by state.

        Raises:
            ChaosError: the cluster does not answer.
        """
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_S):
                process.stdin.write(b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            answer: dict[str, dict[str, int]] = json.loads(line)
        except (TimeoutError, ConnectionError, ValueError) as error:
            await self.close()
            raise ChaosError(f"the cluster tells no actors: {type(error).__name__}") from error
        return answer

    async def close(self) -> None:
        """Ends the process; the next count starts another."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *self._server.prefix,
                sys.executable,
                "-m",
                "loadtest.chaos.census",
                env=dict(self._server.variables),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        return self._process


@asynccontextmanager
async def census(server: Server) -> AsyncIterator[Census]:
    """A census of a server's cluster for the body."""
    counter = Census(server)
    try:
        yield counter
    finally:
        await counter.close()


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
    counted = Counter(name for name in living if name not in _PROXIES)
    groups = [group["state"] for group in placement_group_table().values()]
    return {
        "actors": counted,
        "groups": Counter(state for state in groups if state not in _GONE),
    }


if __name__ == "__main__":
    main()

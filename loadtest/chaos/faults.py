"""What is done to a server: kill, freeze, wedge, starve.

A fault strikes processes of the server under test and nobody else's, and is over when `strike`
returns; `recovered` then says when the server is whole again.
"""

import asyncio
import errno
import random
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

import httpx

from loadtest.chaos.processes import SERVING, alive, send
from loadtest.chaos.server import Server
from loadtest.chaos.waiting import ChaosError, until

FREEZE_S = 10.0
_HOLD_S = 3.0
_NOTICED_S = 60.0  # for a wedged rank to be done away with
_HOARD_S = 30.0
_BLOCK = b"\0" * 65536


@dataclass
class Fault(ABC):
    """One kind of fault. Not to be used for two servers, nor twice at once."""

    rng: random.Random

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def excuses(self) -> bool:
        """Connections that broke are its very meaning; known once it has struck."""
        return False

    def refusal(self, server: Server) -> str | None:
        """Why it cannot be done to this server; None if it can."""
        return None

    @abstractmethod
    async def strike(self, server: Server) -> None:
        """Does it, and undoes what has to be undone.

        Raises:
            ChaosError: there is nothing to strike, or the server never reacted.
        """

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        """Whether every process is there that there should be, and a request would be served."""
        found = Counter(process.role for process in server.processes(*SERVING))
        return found == expected(server) and await server.is_ready(client)

    def _victim(self, server: Server, role: str) -> int:
        pids = server.pids(role)
        if not pids:
            raise ChaosError(f"there is no {role} to strike")
        return self.rng.choice(pids)


def expected(server: Server) -> Counter[str]:
    """How many processes of each serving role the server's layout has."""
    layout = server.layout
    return Counter(
        rank=layout.engines * layout.stages * layout.ranks,
        engine=layout.engines,
        router=1,
        ingress=layout.ingresses,
    )


@dataclass
class Kill(Fault):
    """SIGKILL to one process of a role."""

    role: str = "rank"
    _victims: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"kill {self.role}"

    @property
    def excuses(self) -> bool:
        return self.role == "ingress"

    async def strike(self, server: Server) -> None:
        victim = self._victim(server, self.role)
        self._victims.add(victim)
        send([victim], signal.SIGKILL)

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        pids = server.pids(self.role)
        if not pids or self._victims.intersection(pids):
            return False
        return await super().recovered(server, client)


@dataclass
class Freeze(Fault):
    """SIGSTOP to one process of a role for some seconds."""

    role: str = "rank"

    @property
    def name(self) -> str:
        return f"freeze {self.role}"

    async def strike(self, server: Server) -> None:
        victim = self._victim(server, self.role)
        send([victim], signal.SIGSTOP)
        try:
            await asyncio.sleep(FREEZE_S)
        finally:
            send([victim], signal.SIGCONT)


@dataclass
class Wedge(Fault):
    """A rank that stands still in the midst of a step, until the server does away with it."""

    name = "wedge a collective"

    async def strike(self, server: Server) -> None:
        victim = self._victim(server, "rank")
        send([victim], signal.SIGSTOP)
        try:
            await until(lambda: not alive(victim), _NOTICED_S, "a wedged rank was done away with")
        finally:
            send([victim], signal.SIGCONT)


@dataclass
class FullDisk(Fault):
    """No byte is left where logs are written."""

    name = "full disk"

    def refusal(self, server: Server) -> str | None:
        return None if server.own_disk else "no file system of its own could be mounted"

    async def strike(self, server: Server) -> None:
        ballast = server.workdir / "ballast"
        try:
            await asyncio.to_thread(_fill, ballast.as_posix())
            await asyncio.sleep(_HOLD_S)
        finally:
            ballast.unlink(missing_ok=True)


def _fill(path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                file.write(_BLOCK)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


@dataclass
class Hoarder(Fault):
    """A client that opens connections until it has no descriptor left, and dies with them."""

    name = "client out of descriptors"

    async def strike(self, server: Server) -> None:
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtest.chaos.hoarder",
            server.url,
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdout is not None
        try:
            async with asyncio.timeout(_HOARD_S):
                if not await client.stdout.readline():
                    raise ChaosError("the client out of descriptors did not come so far")
            await asyncio.sleep(_HOLD_S)
        except TimeoutError as error:
            raise ChaosError("the client never ran out of descriptors") from error
        finally:
            if client.returncode is None:
                client.kill()
            await client.wait()

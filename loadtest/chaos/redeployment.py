"""A configuration that is changed while it is served."""

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from loadtest.chaos.faults import Fault
from loadtest.chaos.processes import variables_of
from loadtest.chaos.server import Server
from loadtest.chaos.waiting import ChaosError

_APPLIED_S = 90.0
_STEP_TOKENS = (256, 448)


@dataclass
class Redeployment(Fault):
    """The engine's token budget of a step is changed; all replicas of before have to go."""

    name = "reload configuration"
    _before: set[int] = field(default_factory=set)

    async def strike(self, server: Server) -> None:
        self._before = {process.pid for process in server.processes("engine")}
        content = yaml.safe_load(server.config.read_text(encoding="utf-8"))
        known = content["engine"].get("max_step_tokens")
        content["engine"]["max_step_tokens"] = next(n for n in _STEP_TOKENS if n != known)
        server.config.write_text(yaml.safe_dump(content), encoding="utf-8")
        await _apply(server)

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        left = self._before.intersection(server.pids("engine"))
        return not left and await super().recovered(server, client)


async def _apply(server: Server) -> None:
    """In the environment that the server made for its cluster."""
    raylet = next(iter(server.pids("raylet")), None)
    if raylet is None:
        raise ChaosError("there is no raylet whose environment tells the cluster's settings")
    inherited = {k: v for k, v in variables_of(raylet).items() if k.startswith("RAY_SERVE_")}
    log = Path(server.log).with_name("redeploy.log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtest.chaos.redeploy",
            str(server.config),
            env={**server.variables, **inherited},
            stdout=output,
            stderr=output,
        )
        try:
            async with asyncio.timeout(_APPLIED_S):
                code = await process.wait()
        except TimeoutError as error:
            raise ChaosError("the changed configuration was not taken in time") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ChaosError(f"the changed configuration was not taken: {said[-1] if said else code}")

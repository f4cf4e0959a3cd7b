"""What operators do to a server in service: another configuration, an engine that is to leave."""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import yaml

from loadtest.chaos.faults import Fault
from loadtest.chaos.processes import variables_of
from loadtest.chaos.server import PROGRAM, Server
from loadtest.chaos.waiting import ChaosError

_APPLIED_S = 90.0
_DRAINED_S = 120.0
_ASK_S = 10.0
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
        apply = (sys.executable, "-m", "loadtest.chaos.redeploy", str(server.config))
        await in_cluster(server, _APPLIED_S, *apply)

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        left = self._before.intersection(server.pids("engine"))
        return not left and await super().recovered(server, client)


@dataclass
class Drain(Fault):
    """`expertline drain` of one engine, which Serve then replaces."""

    name = "drain an engine"

    async def strike(self, server: Server) -> None:
        engines = sorted(await _engines(server))
        if not engines:
            raise ChaosError("there is no engine to drain")
        engine = self.rng.choice(engines)
        await in_cluster(server, _DRAINED_S, *PROGRAM, "drain", "--engine", engine)


async def in_cluster(server: Server, within_s: float, *command: str) -> None:
    """Runs a command in the environment that the server made for its cluster.

    Raises:
        ChaosError: it failed, or took too long.
    """
    raylet = next(iter(server.pids("raylet")), None)
    inherited = {} if raylet is None else variables_of(raylet)
    serve = {name: value for name, value in inherited.items() if name.startswith("RAY_SERVE_")}
    process = await asyncio.create_subprocess_exec(
        *server.prefix,
        *command,
        env={**server.variables, **serve},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            _, said = await process.communicate()
    except TimeoutError as error:
        raise ChaosError(f"{command[-2:]}: no end within {within_s:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise ChaosError(f"{command[-2:]}: {lines[-1] if lines else process.returncode}")


async def _engines(server: Server) -> set[str]:
    """Ids of the engines that answer, as they announce themselves to Prometheus."""
    async with httpx.AsyncClient(timeout=_ASK_S, trust_env=False) as client:
        metrics = await server.metrics(client)
    answering = {sample["instance"] for sample in metrics.get("expertline_pages", ())}
    return {
        labels["replica"]
        for targets, labels in _targets(server)
        if labels.get("process") == "engine" and answering.intersection(targets)
    }


def _targets(server: Server) -> Iterator[tuple[list[str], dict[str, str]]]:
    for path in server.targets.glob("*.json"):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            yield entry["targets"], entry["labels"]

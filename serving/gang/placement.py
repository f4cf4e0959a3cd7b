"""Ranks as Ray actors in the placement group of their engine's replica.

Bundle 0 belongs to the engine itself. The ranks' bundles follow, one per cell, stage by stage,
so that with PACK a stage's ranks share a node. An index is always given: Ray's own choice does
not follow the order of ranks (ray#63328), and a bundle's number says nothing of its node.
"""

import asyncio
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serving.config import Settings
from serving.gang.members import Cell, cell_name
from serving.gang.messages import RankSpec
from serving.node import node_address
from serving.telemetry.logs import get_logger

log = get_logger("gang")
_UNREACHABLE_S = 1.0  # between two tries


def bundles(settings: Settings, gpus: bool) -> list[dict[str, float]]:
    """The engine's bundle, then one for each rank."""
    rank = {"CPU": settings.gang.cpus} | ({"GPU": 1.0} if gpus else {})
    cells = settings.gang.stages * settings.gang.expert_parallel
    return [{"CPU": settings.engine.cpus}, *(dict(rank) for _ in range(cells))]


@ray.remote(max_restarts=0, max_task_retries=0)
class Rank:
    """A rank's process. `run` returns only when the engine lets go."""

    def run(self, spec: RankSpec, settings: Settings, secret: bytes) -> None:
        from serving.gang.resident import run_rank
        from serving.telemetry.logs import setup_logging

        setup_logging(spec.log_level)
        spec.host = node_address(settings)
        run_rank(spec, secret)


class RayLauncher:
    """Starts `Rank` actors in the bundles of a placement group."""

    def __init__(self, group: PlacementGroup, settings: Settings, gpus: bool) -> None:
        self._group = group
        self._settings = settings
        self._gpus = gpus
        self._bundles: dict[Cell, int] = {}
        self._actors: dict[Cell, Any] = {}
        self._waits: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Queue[tuple[Cell, Any, str]] = asyncio.Queue()

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        """Starts a rank for each; the first time for all cells, whose bundles are chosen then."""
        if not self._bundles:
            cells = ((spec.stage, spec.rank) for spec in specs)
            self._bundles = dict(zip(cells, self._cell_bundles(), strict=True))
        for spec in specs:
            cell = (spec.stage, spec.rank)
            if cell in self._actors:
                ray.kill(self._actors[cell], no_restart=True)
            actor = self._actors[cell] = Rank.options(  # type: ignore[attr-defined]
                num_cpus=self._settings.gang.cpus,
                num_gpus=1 if self._gpus else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=self._bundles[cell]
                ),
            ).remote()
            run = actor.run.remote(spec, self._settings, secret)
            wait = asyncio.create_task(self._wait(cell, actor, run))
            self._waits.add(wait)
            wait.add_done_callback(self._waits.discard)

    async def watch(self) -> tuple[Cell, str]:
        while True:
            cell, actor, line = await self._ended.get()
            if self._actors[cell] is actor:  # else it has been replaced
                return cell, line

    async def stop(self) -> None:
        for wait in self._waits:
            wait.cancel()
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)

    async def _wait(self, cell: Cell, actor: Any, run: Any) -> None:
        """Tells when a rank has ended.

        One that Ray cannot reach just now has not: whether it still works is seen on its
        connection, and by its steps. But its call is lost, so another one is put behind it.
        """
        how = ""
        while not how:
            try:
                await run
                how = "released"
            except ActorUnavailableError:
                log.event("WARNING", "rank.unreachable", cell=cell_name(cell))
                await asyncio.sleep(_UNREACHABLE_S)
                run = actor.__ray_ready__.remote()
            except RayError as error:
                how = type(error).__name__
        self._ended.put_nowait((cell, actor, f"a rank ended: {how}"))

    def _cell_bundles(self) -> list[int]:
        """Bundle of each cell in cell order: bundles of one node are neighbours."""
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        seen: dict[str, int] = {}
        for bundle in sorted(nodes):
            seen.setdefault(nodes[bundle], len(seen))
        return sorted((b for b in nodes if b != 0), key=lambda b: (seen[nodes[b]], b))

"""Ranks as Ray actors in the placement group of their engine's replica.

Bundle 0 belongs to the engine itself. The ranks' bundles follow, one per cell, stage by stage,
so that with PACK a stage's ranks share a node. An index is always given: Ray's own choice does
not follow the order of ranks (ray#63328), and a bundle's number says nothing of its node.
"""

import asyncio
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serving.config import Settings
from serving.gang.messages import RankSpec
from serving.node import node_address


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
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._started = asyncio.Event()

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None:
        order = self._cell_bundles()
        for spec, bundle in zip(specs, order, strict=True):
            actor = Rank.options(  # type: ignore[attr-defined]
                num_cpus=self._settings.gang.cpus,
                num_gpus=1 if self._gpus else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle
                ),
            ).remote()
            self._actors.append(actor)
            self._runs.append(actor.run.remote(spec, self._settings, secret))
        self._started.set()

    async def watch(self) -> str:
        await self._started.wait()
        runs = [asyncio.ensure_future(run) for run in self._runs]
        done, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
        error = next(iter(done)).exception()
        return f"a rank ended: {type(error).__name__ if error else 'released'}"

    async def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    def _cell_bundles(self) -> list[int]:
        """Bundle of each cell in cell order: bundles of one node are neighbours."""
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        seen: dict[str, int] = {}
        for bundle in sorted(nodes):
            seen.setdefault(nodes[bundle], len(seen))
        return sorted((b for b in nodes if b != 0), key=lambda b: (seen[nodes[b]], b))

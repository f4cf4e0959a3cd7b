"""Where the ranks of a gang go on a cluster of several nodes, whose GPUs only Ray believes in."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group

from serving.config import Settings
from serving.gang import placement
from serving.gang.members import Cell
from serving.gang.messages import RankSpec
from serving.gang.placement import RayLauncher, bundles
from serving.specs import rank_specs
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)
GPUS = 2  # of a node
WORKERS = 3
STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs and three nodes, one more than a gang of two stages needs."""
    with (
        tempfile.TemporaryDirectory(prefix="xp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "temp_dir": folder}
        made = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
        try:
            for _ in range(WORKERS):
                made.add_node(num_cpus=GPUS + 1, num_gpus=GPUS, object_store_memory=STORE_BYTES)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def settings() -> Settings:
    gang = {"stages": 2, "expert_parallel": GPUS}
    return Settings.model_validate({"model": {"path": "nano"}, "gang": gang})


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do nothing but tell where they are."""

    class Resting:
        def run(self, spec: RankSpec, settings: Settings, secret: bytes) -> None:
            threading.Event().wait()

        @ray.method(concurrency_group="beside")
        def where(self) -> tuple[str, tuple[int, ...]]:
            return ray.get_runtime_context().get_node_id(), tuple(ray.get_gpu_ids())

    actor = ray.remote(max_restarts=0, concurrency_groups={"beside": 1})(Resting)
    monkeypatch.setattr(placement, "Rank", actor)


@pytest.mark.usefixtures("resting")
async def test_stages_have_nodes_of_their_own_and_a_lost_ones_ranks_move_to_another(
    cluster: Cluster, settings: Settings
) -> None:
    group = placement_group(bundles(settings, gpus=True), strategy=settings.gang.placement)
    await asyncio.to_thread(ray.get, group.ready())
    launcher = RayLauncher(group, settings, gpus=True)
    specs = rank_specs(settings, "127.0.0.1", 1, "cuda")
    try:
        await launcher.launch(specs, b"")
        places = await told(launcher)
        first, second = nodes_of(places, 0), nodes_of(places, 1)
        assert len(first) == len(second) == 1
        assert first != second
        assert len(set(places.values())) == len(specs)  # a GPU of its own for each

        lost = [node for node in cluster.worker_nodes if node.node_id in second]
        cluster.remove_node(lost[0], allow_graceful=False)
        ended = {(await launcher.watch())[0] for _ in range(GPUS)}
        assert ended == {(1, rank) for rank in range(GPUS)}
        await launcher.launch([spec for spec in specs if spec.stage == 1], b"")
        moved = await told(launcher)
        assert nodes_of(moved, 0) == first
        assert len(nodes_of(moved, 1)) == 1
        assert not nodes_of(moved, 1) & (first | second)
    finally:
        await launcher.stop()
        await removed(group)


async def told(launcher: RayLauncher) -> dict[Cell, tuple[str, tuple[int, ...]]]:
    """Node and GPUs of each cell."""
    asked: dict[Cell, Any] = {c: actor.where.remote() for c, actor in launcher._actors.items()}
    answers = await asyncio.to_thread(ray.get, list(asked.values()))
    return dict(zip(asked, answers, strict=True))


def nodes_of(places: dict[Cell, tuple[str, tuple[int, ...]]], stage: int) -> set[str]:
    return {node for (of, _), (node, _) in places.items() if of == stage}


async def removed(group: PlacementGroup) -> None:
    ray.util.remove_placement_group(group)
    await until(lambda: ray.util.placement_group_table(group)["state"] == "REMOVED")

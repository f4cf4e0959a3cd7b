"""Two engines of one rank each behind two ingresses, started once for the tests of this folder."""

import asyncio
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.pair.clients import LONG, SETTINGS, SHORT, answer
from tests.cluster.server import Server, running_server
from tests.cluster.waiting import until


@pytest.fixture(scope="package")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("settings") / "settings.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    with running_server("--config", str(config)) as running:
        yield running


@pytest.fixture(scope="package")
def expected(started: Server) -> dict[int, str]:
    """What `ASK` is answered with, by length."""
    return {n: asyncio.run(answer(started, n, stream=False)) for n in (LONG, SHORT)}


@pytest.fixture
async def server(started: Server) -> Server:
    """Whole again, whatever the test before has done to it."""

    def whole() -> bool:
        counts = {"Engine": 2, "Ingress": 2, "Router": 1}
        found = {part: len(started.find(f"ServeReplica:expertline:{part}")) for part in counts}
        ready = started.metric("expertline_fleet_engines", state="ready")
        return found == counts and started.ready and ready == 2

    await until(whole, 240)
    return started

"""Everything is replaced under load. The last file of this folder: one engine is left of two."""

import asyncio
import json

import pytest

from tests.cluster.pair.clients import SETTINGS, load, more, run
from tests.cluster.server import Server
from tests.cluster.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

UPDATE = """
import json, sys
import ray
from ray import serve

ray.init(address="auto", log_to_driver=False)
from serving.app import APP_NAME, build

serve.run_many([serve.RunTarget(build(json.loads(sys.argv[1])), name=APP_NAME, route_prefix="/")])
"""


async def test_an_update_of_everything_under_load_fails_no_request(
    server: Server, expected: dict[int, str]
) -> None:
    """To one engine, whose predecessor stops before it starts: requests wait meanwhile."""
    before = set(server.find("ServeReplica:expertline"))
    changed = SETTINGS | {"engine": {"replicas": 1, "drain_timeout_s": 1.0}}
    async with load(server, expected) as answers:
        await more(answers, 2)
        done = await asyncio.to_thread(run, server, UPDATE, json.dumps(changed))
        assert done.returncode == 0, done.stderr[-2000:]
        await until(lambda: not before & set(server.find("ServeReplica:expertline")), 400)
        await more(answers, 4)

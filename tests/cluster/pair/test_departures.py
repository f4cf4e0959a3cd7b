"""Parts that leave or die while clients use them: no request is lost."""

import asyncio
import os
import signal

import psutil
import pytest

from tests.cluster.pair.clients import LONG, answer, load, more, run
from tests.cluster.server import Server
from tests.cluster.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ENGINE, INGRESS = "ServeReplica:expertline:Engine", "ServeReplica:expertline:Ingress"


async def test_an_engine_that_is_drained_hands_over_what_it_runs(
    server: Server, expected: dict[int, str]
) -> None:
    main = "from deploy.cli import main; main()"
    before = set(server.find(ENGINE))

    def replaced() -> bool:
        now = set(server.find(ENGINE))
        return len(now) == 2 and now != before

    async with load(server, expected) as answers:
        refusing = asyncio.to_thread(run, server, main, "drain", "--engine", "nobody")
        refused, _ = await asyncio.gather(refusing, more(answers, 2))
        assert refused.returncode == 2
        known = refused.stderr.split("there is: ")[1].strip().split(", ")
        assert len(known) == 2
        done = await asyncio.to_thread(run, server, main, "drain", "--engine", known[0])
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"drained {known[0]} in "), done.stdout
        await more(answers, 4)
        await until(replaced, 240)


async def test_what_a_dead_ingress_left_unanswered_is_answered_by_another(
    server: Server, expected: dict[int, str]
) -> None:
    held: dict[str, float] = {}

    def holds_some() -> bool:
        samples = server.samples("expertline_streams_open")
        held.update({labels["instance"]: value for labels, value in samples})
        return max(held.values(), default=0) >= 2

    asked = [asyncio.create_task(answer(server, LONG, stream=False)) for _ in range(8)]
    await until(holds_some)
    busiest = max(held, key=lambda instance: held[instance])
    (victim,) = [pid for pid in server.find(INGRESS) if listens(pid, busiest)]
    os.kill(victim, signal.SIGKILL)
    assert set(await asyncio.gather(*asked)) == {expected[LONG]}
    await until(lambda: victim not in server.find(INGRESS))


def listens(pid: int, address: str) -> bool:
    """Whether it is this process that listens there."""
    found = psutil.Process(pid).net_connections("tcp")
    heard = [c.laddr for c in found if c.status == psutil.CONN_LISTEN]
    return address in {f"{at.ip}:{at.port}" for at in heard}

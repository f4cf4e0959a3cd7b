"""What the control plane costs is measured of work that was really done."""

import json
import subprocess
import sys

from loadtest.control import Leases, measure_leases, measure_plans
from serving.fleet import ROUTER_CODEC, LeaseRelease, LeaseRequest


def test_a_lease_goes_where_its_prefix_is_and_is_given_back() -> None:
    leases = Leases(engines=4, prefixes=20)
    frame = leases.frame(7)
    request: LeaseRequest = ROUTER_CODEC.decode(frame)
    (known,) = leases._index.hits(request.page_hashes)
    leases.grant(frame)
    (lease,) = leases._book.leases.values()
    assert lease.engine_id == known
    assert len(leases._queue) == 0
    leases.release(ROUTER_CODEC.frame(LeaseRelease("r7"))[4:])
    assert not leases._book.leases


def test_every_lease_and_every_full_step_is_counted() -> None:
    spent = measure_leases(engines=3, prefixes=10, count=50, held=5)
    assert spent.count == 50
    assert 0 < spent.p50 <= spent.p99 <= spent.max
    planned, taken = measure_plans(sequences=8, steps=20)
    assert planned.count == taken.count == 20
    assert 0 < planned.p50 <= planned.max


def test_the_command_tells_all_figures() -> None:
    sizes = ["--engines", "2", "--prefixes", "5", "--leases", "10", "--sequences", "4"]
    command = [sys.executable, "-m", "loadtest.control", *sizes, "--steps", "10", "--json"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert {"lease_cpu_us", "plan_ms", "complete_ms", "machine", "command"} == set(told)

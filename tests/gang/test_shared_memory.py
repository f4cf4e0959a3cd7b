"""Shared memory gives what gloo gives, notices every kind of loss, and leaves nothing behind."""

import functools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gang import meeting as meetings
from serving.gang import shared_memory
from serving.gang.fabric import Fabric, FabricError, GlooFabric
from serving.gang.meeting import Meeting, host_identity, join
from serving.gang.messages import RankSpec
from serving.gang.rendezvous import Rendezvous
from serving.gang.shared_memory import SharedMemoryFabric
from tests.gang.gloo import gloo_group, shared_memory_group, together

pytestmark = pytest.mark.skipif(
    host_identity("here") is None, reason="this CPU's memory order is not enough"
)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["serving.gang.shared_memory"])

PATIENCE_S = 120.0  # of fabrics in tests that expect an error long before
SOON_S = 30.0  # nominally at once, on a machine that is busy
LOOPBACK, ELSEWHERE = "127.0.0.1", "127.0.0.2"
WAITS: dict[str, Callable[[Fabric], None]] = {
    "recv": lambda fabric: fabric.recv(torch.zeros(4), 2),
    "send": lambda fabric: fabric.send(torch.zeros(shared_memory.SLOT_BYTES), 2),
    "all_gather": lambda fabric: fabric.all_gather(torch.zeros(3, 4), torch.zeros(4)),
    "reduce_scatter": lambda fabric: fabric.reduce_scatter(torch.zeros(4), torch.zeros(3, 4)),
    "all_to_all": lambda fabric: fabric.all_to_all(
        torch.zeros(3), torch.zeros(3), [1] * 3, [1] * 3
    ),
}


@functools.cache
def gloo(size: int) -> list[GlooFabric]:
    return gloo_group(size)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_result_is_that_of_gloo(
    size: int, dtype: torch.dtype, shapes: list[tuple[int, int]], numbers: Any
) -> None:
    """Messages up to 48 KB through slots of 4 KB, call after call in one group."""
    torch.manual_seed(numbers.randrange(2**31))
    rounds = [
        (
            [torch.randn(size, rows, width).to(dtype) for _ in range(size)],
            [[numbers.randint(0, rows) for _ in range(size)] for _ in range(size)],
        )
        for rows, width in shapes
    ]

    def run(fabric: Fabric) -> list[torch.Tensor]:
        rank, results = fabric.rank, []
        for parts, counts in rounds:
            mine = parts[rank]
            gathered = torch.empty_like(mine)
            fabric.all_gather(gathered, mine[0])
            added = torch.empty_like(mine[0])
            fabric.reduce_scatter(added, mine)
            rows = torch.cat([part[:count] for part, count in zip(mine, counts[rank], strict=True)])
            taken = [count[rank] for count in counts]
            mixed = mine.new_empty(sum(taken), mine.shape[2])
            fabric.all_to_all(mixed, rows, taken, counts[rank])
            passed = mine[0].clone()
            if rank > 0:
                fabric.recv(passed, rank - 1)
            if rank < size - 1:
                fabric.send(passed, rank + 1)
            results += [gathered, added, mixed, passed]
        return results

    members = gloo(size)
    wanted = together(size, lambda rank: run(members[rank]))
    with patch.object(shared_memory, "SLOT_BYTES", 4096):
        fabrics = shared_memory_group(size)
        found = together(size, lambda rank: run(fabrics[rank]))
    for mine, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_messages_of_many_real_slots_arrive_whole() -> None:
    fabrics = shared_memory_group(2)
    sent = torch.randint(0, 256, (5 * shared_memory.SLOT_BYTES + 12345,), dtype=torch.uint8)

    def run(rank: int) -> torch.Tensor:
        got = torch.zeros_like(sent)
        if rank == 0:
            fabrics[0].send(sent, 1)
            return sent
        fabrics[1].recv(got, 0)
        return got

    assert torch.equal(*together(2, run))


def test_a_send_that_fits_waits_for_nobody() -> None:
    fabrics = shared_memory_group(2)
    tensor = torch.ones(2 * shared_memory.SLOT_BYTES, dtype=torch.uint8)
    fabrics[0].send(tensor, 1)
    tensor.zero_()
    got = torch.zeros_like(tensor)
    fabrics[1].recv(got, 0)
    assert bool((got == 1).all())


def test_ranks_that_disagree_about_a_size_fail() -> None:
    fabrics = shared_memory_group(2)
    fabrics[0].send(torch.zeros(4), 1)
    with pytest.raises(FabricError, match="16 bytes instead of 12"):
        fabrics[1].recv(torch.zeros(3), 0)
    with pytest.raises(FabricError, match="aborted"):
        fabrics[0].send(torch.zeros(4), 1)


def member(address: bytes, rank: int, wait: str | None, report: Connection) -> None:
    """A rank in a process of its own; without `wait` it never makes the call of the others."""
    fabric = join(address, rank, 3, PATIENCE_S)
    report.send("joined")
    try:
        if wait is not None:
            WAITS[wait](fabric)
    except FabricError as error:
        report.send(str(error))
    time.sleep(PATIENCE_S)


@contextmanager
def group_of_processes(
    wait: str,
) -> Iterator[tuple[SharedMemoryFabric, Connection, BaseProcess]]:
    """Rank 0 is the test, 1 waits in a call, 2 stays silent: yields 0, what 1 says, and 2."""
    meeting = Meeting(3)
    ends = [processes.Pipe(), processes.Pipe()]
    members = [
        processes.Process(target=member, args=(meeting.address, rank, call, ends[rank - 1][1]))
        for rank, call in ((1, wait), (2, None))
    ]
    for process in members:
        process.start()
    try:
        fabric = meeting.lead(PATIENCE_S)
        assert all(end.recv() == "joined" for end, _ in ends)
        yield fabric, ends[0][0], members[1]
    finally:
        for process in members:
            process.kill()
            process.join()


@pytest.mark.parametrize("wait", WAITS)
def test_killing_a_peer_fails_all_who_wait_for_it(wait: str) -> None:
    with group_of_processes(wait) as (fabric, waiting, victim):
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(FabricError):
            WAITS[wait](fabric)
        assert waiting.poll(SOON_S)
        assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize("wait", WAITS)
def test_abort_fails_all_who_wait(wait: str) -> None:
    with group_of_processes(wait) as (fabric, waiting, _):
        time.sleep(0.1)  # so that rank 1 sleeps in its call
        fabric.abort()
        assert waiting.poll(SOON_S)
        assert "abort" in waiting.recv()
        with pytest.raises(FabricError):
            WAITS[wait](fabric)


def test_a_peer_that_stands_still_is_an_error_after_the_timeout() -> None:
    with group_of_processes("recv") as (fabric, waiting, victim):
        fabric._timeout_s = 0.5
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGSTOP)
        with pytest.raises(FabricError, match=r"silent for 0\.5 s"):
            fabric.recv(torch.zeros(4), 2)
        assert waiting.poll(SOON_S)  # that error has ended the group


def test_what_a_peer_wrote_before_its_end_still_arrives() -> None:
    fabrics = shared_memory_group(2)
    fabrics[1].send(torch.full((4,), 7.0), 0)
    fabrics.pop()  # the last reference to rank 1
    got = torch.zeros(4)
    fabrics[0].recv(got, 1)
    assert got.tolist() == [7.0] * 4
    with pytest.raises(FabricError, match="gone"):
        fabrics[0].recv(got, 1)


def remains() -> list[str]:
    """Names that a group might have left on this machine."""
    sockets = Path("/proc/net/unix").read_text(encoding="utf-8").split()
    files = os.listdir("/dev/shm")
    return [name for name in (*sockets, *files) if "expertline" in name]


def lead(address: Connection) -> None:
    meeting = Meeting(2)
    address.send(meeting.address)
    fabric = meeting.lead(PATIENCE_S)
    address.send("formed")
    fabric.recv(torch.zeros(4), 1)


@pytest.mark.parametrize("end", ["dropped", "aborted", "killed"])
def test_nothing_is_left_behind(end: str) -> None:
    before = set(remains())
    if end == "killed":
        here, there = processes.Pipe()
        leader = processes.Process(target=lead, args=(there,))
        leader.start()
        address = here.recv()
        assert any(address[1:].decode() in name for name in remains())
        fabric = join(address, 1, 2, PATIENCE_S)
        assert here.recv() == "formed"
        leader.kill()
        leader.join()
        with pytest.raises(FabricError, match="gone"):
            fabric.recv(torch.zeros(4), 0)
    else:
        fabrics = shared_memory_group(2)
        if end == "aborted":
            fabrics[0].abort()
        del fabrics
    assert set(remains()) <= before


def test_a_group_without_all_its_members_does_not_form() -> None:
    meeting = Meeting(2)
    with pytest.raises(FabricError, match="did not form"):
        meeting.lead(0.1)
    with pytest.raises(FabricError, match="did not form"):
        join(meeting.address, 1, 2, 0.1)


def test_another_users_leader_is_not_believed_and_a_strange_member_not_served() -> None:
    with patch.object(meetings, "_user_of", return_value=-1):
        meeting = Meeting(2)
        with pytest.raises(FabricError, match="another user"):
            join(meeting.address, 1, 2, PATIENCE_S)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(meeting.address)
            with pytest.raises(FabricError, match="did not form"):
                meeting.lead(0.5)
            assert stranger.recv(1) == b""


def test_a_segment_that_is_not_one_is_refused() -> None:
    for total_bytes in (4096, shared_memory.Plan(2).total_bytes):  # too short; not sealed
        segment = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(segment, total_bytes)
        with pytest.raises(FabricError, match="not what it should be"):
            SharedMemoryFabric(0, 2, segment, {}, 1)


def form(fabric: str, hosts: list[str]) -> list[type]:
    """The fabrics that two stages choose."""
    ranks = [
        Rendezvous(
            RankSpec(
                stage, 0, 2, 1, "", "float32", "cpu", "gather", 8, 1, "", 0, host, 60, 60, "",
                "INFO", fabric=fabric,
            )
        )
        for stage, host in enumerate(hosts)
    ]  # fmt: skip
    offers = ranks[0].offers() | ranks[1].offers()
    return [type(got.column) for got in together(2, lambda stage: ranks[stage].form(offers))]


def test_ranks_of_one_host_share_memory_unless_told_otherwise() -> None:
    here, apart = [LOOPBACK, LOOPBACK], [LOOPBACK, ELSEWHERE]
    assert form("auto", here) == form("shared_memory", here) == [SharedMemoryFabric] * 2
    assert form("auto", apart) == form("gloo", here) == [GlooFabric] * 2
    with pytest.raises(FabricError, match="cannot share memory"):
        form("shared_memory", apart)


def test_a_host_that_cannot_share_memory_uses_gloo() -> None:
    with patch("platform.machine", return_value="aarch64"):
        assert form("auto", [LOOPBACK, LOOPBACK]) == [GlooFabric] * 2
    with patch("os.memfd_create", side_effect=OSError):
        assert form("auto", [LOOPBACK, LOOPBACK]) == [GlooFabric] * 2

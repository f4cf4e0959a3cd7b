"""What every fabric must do. NCCL passes the same cases where there is a GPU."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gang.fabric import FabricError, host_store, join_store
from tests.gang.gloo import GROUPS, together

DTYPES = [torch.float32, torch.bfloat16]
each_fabric = pytest.mark.parametrize("kind", GROUPS)


@each_fabric
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_hidden_states_pass_down_the_column(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = GROUPS[kind](size)

    def run(rank: int) -> torch.Tensor:
        fabric = fabrics[rank]
        got = torch.zeros(3, 8, dtype=dtype)
        for step in range(5):
            if rank == 0:
                got = torch.full((3, 8), float(step), dtype=dtype)
            else:
                fabric.recv(got, rank - 1)
            if rank < size - 1:
                fabric.send(got + 1, rank + 1)
        return got

    for rank, got in enumerate(together(size, run)):
        assert torch.equal(got, torch.full((3, 8), 4.0 + rank, dtype=dtype))


@each_fabric
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("size", [2, 3])
def test_all_gather_is_in_rank_order(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = GROUPS[kind](size)

    def run(rank: int) -> torch.Tensor:
        out = torch.zeros(size, 4, 6, dtype=dtype)
        fabrics[rank].all_gather(out, torch.full((4, 6), rank + 1, dtype=dtype))
        return out

    expected = torch.arange(1, size + 1).to(dtype)[:, None, None].expand(size, 4, 6)
    for out in together(size, run):
        assert torch.equal(out, expected)


@each_fabric
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_reduce_scatter_adds_up_everybodys_part(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = GROUPS[kind](size)
    torch.manual_seed(0)
    parts = [torch.randn(size, 5, 7).to(dtype) for _ in range(size)]

    def run(rank: int) -> torch.Tensor:
        out = torch.zeros(5, 7, dtype=dtype)
        fabrics[rank].reduce_scatter(out, parts[rank])
        return out

    for rank, out in enumerate(together(size, run)):
        expected = torch.stack([part[rank] for part in parts]).float().sum(0).to(dtype)
        assert torch.equal(out, expected)


@each_fabric
@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 3).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(0, 4), min_size=size, max_size=size), min_size=size, max_size=size
        )
    )
)
def test_all_to_all_takes_rows_where_they_belong(kind: str, rows: list[list[int]]) -> None:
    size = len(rows)
    fabrics = GROUPS[kind](size)

    def run(rank: int) -> torch.Tensor:
        sent = [torch.full((count, 2), 10.0 * rank + peer) for peer, count in enumerate(rows[rank])]
        taken = [rows[peer][rank] for peer in range(size)]
        out = torch.zeros(sum(taken), 2)
        fabrics[rank].all_to_all(out, torch.cat(sent), taken, rows[rank])
        return out

    for rank, out in enumerate(together(size, run)):
        expected = [10.0 * p + rank for p in range(size) for _ in range(rows[p][rank])]
        assert out[:, 0].tolist() == expected


@each_fabric
def test_a_dead_peer_is_an_error_and_not_a_hang(kind: str) -> None:
    fabrics = GROUPS[kind](2)
    survivor = fabrics[0]
    fabrics[1].abort()
    started = time.monotonic()
    with pytest.raises(FabricError):
        survivor.recv(torch.zeros(4), 1)
    assert time.monotonic() - started < 15


@each_fabric
def test_abort_from_another_thread_wakes_a_waiting_call(kind: str) -> None:
    fabrics = GROUPS[kind](2)
    failures: list[FabricError] = []

    def wait() -> None:
        try:
            fabrics[0].recv(torch.zeros(4), 1)
        except FabricError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    fabrics[0].abort()
    thread.join(15)
    assert len(failures) == 1


@each_fabric
def test_a_silent_peer_is_an_error_after_the_timeout(kind: str) -> None:
    fabrics = GROUPS[kind](2, timeout_s=0.5)
    with pytest.raises(FabricError):
        fabrics[0].recv(torch.zeros(4), 1)


def test_the_rendezvous_listens_on_the_given_address_alone() -> None:
    store, port = host_store("127.0.0.1", 5)
    client = join_store("127.0.0.1", port, 5)
    store.set("key", "value")
    assert client.get("key") == b"value"
    with open("/proc/net/tcp", encoding="ascii") as table:
        local = [line.split()[1] for line in table][1:]
    hosts = {address.split(":")[0] for address in local if int(address.split(":")[1], 16) == port}
    assert hosts == {"0100007F"}
    assert isinstance(store, dist.TCPStore)

"""What every fabric must do. NCCL passes the same cases where there is a GPU."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from serving.gang.fabric import Fabric, FabricError, GlooFabric, host_store, join_store
from tests.gang.gloo import FABRICS, device_of, sizes_of, together

DTYPES = [torch.float32, torch.bfloat16]


def groups(*sizes: int) -> pytest.MarkDecorator:
    """Every kind of fabric, in these sizes as far as the machine allows."""
    cases = [(kind, size) for kind in FABRICS for size in sizes_of(kind, sizes)]
    return pytest.mark.parametrize(("kind", "size"), cases)


@groups(2, 4)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_pass_down_the_column(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = FABRICS[kind](size)

    def run(rank: int) -> torch.Tensor:
        fabric = fabrics[rank]
        got = torch.zeros(3, 8, dtype=dtype, device=device_of(kind, rank))
        for step in range(5):
            if rank == 0:
                got = torch.full_like(got, float(step))
            else:
                fabric.recv(got, rank - 1)
            if rank < size - 1:
                fabric.send(got + 1, rank + 1)
        return got.cpu()

    for rank, got in enumerate(together(size, run)):
        assert torch.equal(got, torch.full((3, 8), 4.0 + rank, dtype=dtype))


@groups(2, 3)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_all_gather_is_in_rank_order(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = FABRICS[kind](size)

    def run(rank: int) -> torch.Tensor:
        mine = torch.full((4, 6), rank + 1, dtype=dtype, device=device_of(kind, rank))
        out = torch.zeros(size, 4, 6, dtype=dtype, device=mine.device)
        fabrics[rank].all_gather(out, mine)
        return out.cpu()

    expected = torch.arange(1, size + 1).to(dtype)[:, None, None].expand(size, 4, 6)
    for out in together(size, run):
        assert torch.equal(out, expected)


@groups(2, 3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_adds_up_everybodys_part(kind: str, size: int, dtype: torch.dtype) -> None:
    fabrics = FABRICS[kind](size)
    torch.manual_seed(0)
    parts = [torch.randn(size, 5, 7).to(dtype) for _ in range(size)]

    def run(rank: int) -> torch.Tensor:
        mine = parts[rank].to(device_of(kind, rank))
        out = torch.zeros(5, 7, dtype=dtype, device=mine.device)
        fabrics[rank].reduce_scatter(out, mine)
        return out.cpu()

    for rank, out in enumerate(together(size, run)):
        expected = torch.stack([part[rank] for part in parts]).float().sum(0).to(dtype)
        assert torch.equal(out, expected)


@groups(2, 3)
@pytest.mark.parametrize("seed", range(8))
def test_all_to_all_takes_rows_where_they_belong(kind: str, size: int, seed: int) -> None:
    most = min(seed, 4)  # at first there are none at all
    numbers = torch.Generator().manual_seed(seed)
    rows = torch.randint(most + 1, (size, size), generator=numbers).tolist()
    fabrics = FABRICS[kind](size)

    def run(rank: int) -> torch.Tensor:
        sent = [torch.full((count, 2), 10.0 * rank + peer) for peer, count in enumerate(rows[rank])]
        taken = [rows[peer][rank] for peer in range(size)]
        mine = torch.cat(sent).to(device_of(kind, rank))
        out = torch.zeros(sum(taken), 2, device=mine.device)
        fabrics[rank].all_to_all(out, mine, taken, rows[rank])
        return out.cpu()

    for rank, out in enumerate(together(size, run)):
        expected = [10.0 * p + rank for p in range(size) for _ in range(rows[p][rank])]
        assert out[:, 0].tolist() == expected


@groups(2)
def test_a_dead_peer_is_an_error_and_not_a_hang(kind: str, size: int) -> None:
    if size == 1:
        pytest.skip("there is no peer")
    fabrics = FABRICS[kind](size)
    survivor = fabrics[0]
    fabrics[1].abort()
    started = time.monotonic()
    with pytest.raises(FabricError):
        receive(survivor, kind)
    assert time.monotonic() - started < 60


@groups(2)
def test_abort_from_another_thread_wakes_a_waiting_call(kind: str, size: int) -> None:
    if size == 1:
        pytest.skip("there is no peer to wait for")
    fabrics = FABRICS[kind](size)
    failures: list[FabricError] = []

    def wait() -> None:
        try:
            receive(fabrics[0], kind)
        except FabricError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    fabrics[0].abort()
    thread.join(60)
    assert len(failures) == 1


@groups(2)
def test_after_an_abort_every_call_fails(kind: str, size: int) -> None:
    fabric = FABRICS[kind](size)[0]
    fabric.check()
    fabric.abort()
    tensor = torch.zeros(size, 4, device=device_of(kind, 0))
    with pytest.raises(FabricError):
        fabric.all_gather(torch.zeros(size, size, 4, device=tensor.device), tensor)
    with pytest.raises(FabricError):
        fabric.reduce_scatter(tensor[0], tensor)


@groups(2)
def test_a_silent_peer_is_an_error_after_the_timeout(kind: str, size: int) -> None:
    if size == 1:
        pytest.skip("there is no peer")
    fabric = FABRICS[kind](size)[0]
    if isinstance(fabric, GlooFabric):
        fabric._group.set_timeout(timedelta(seconds=0.5))
    else:
        fabric._timeout_s = 0.5  # type: ignore[attr-defined]
    started = time.monotonic()
    with pytest.raises(FabricError):
        receive(fabric, kind)
    assert time.monotonic() - started < 60


def receive(fabric: Fabric, kind: str) -> None:
    """Waits for rank 1 until the work is done, on a GPU too."""
    tensor = torch.zeros(4, device=device_of(kind, 0))
    fabric.recv(tensor, 1)
    tensor.tolist()
    fabric.check()


def test_the_rendezvous_listens_on_the_given_address_alone() -> None:
    store, port = host_store("127.0.0.1", 60)
    client = join_store("127.0.0.1", port, 60)
    store.set("key", "value")
    assert client.get("key") == b"value"
    with open("/proc/net/tcp", encoding="ascii") as table:
        local = [line.split()[1] for line in table][1:]
    hosts = {address.split(":")[0] for address in local if int(address.split(":")[1], 16) == port}
    assert hosts == {"0100007F"}
    assert isinstance(store, dist.TCPStore)

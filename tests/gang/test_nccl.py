"""What the GPU fabric asks of NCCL, and what it makes of its answers."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.moe import LocalExperts
from serving.gang.exchange import EXCHANGES
from serving.gang.fabric import FabricError
from serving.gang.nccl import NcclFabric
from tests.gang import fake_nccl
from tests.gang.gloo import threaded_nccl_group, together
from tests.gang.test_exchange import experts_of
from tests.model.oracle import oracle
from tests.waiting import until


def calls(fabric: NcclFabric) -> list[tuple[Any, ...]]:
    return fabric._comm.calls  # type: ignore[no-any-return]


def test_tensors_travel_as_bytes_on_the_current_stream() -> None:
    fabric = threaded_nccl_group(1)[0]
    half = torch.ones(3, 5, dtype=torch.bfloat16)
    fabric.all_gather(half.new_empty(1, 3, 5), half)
    assert calls(fabric) == [("allGather", 30, 1, fake_nccl.STREAM)]


def test_sums_are_of_numbers() -> None:
    fabric = threaded_nccl_group(1)[0]
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        fabric.reduce_scatter(torch.empty(3, dtype=dtype), torch.ones(1, 3, dtype=dtype))
    assert [(count, kind) for _, count, kind, _ in calls(fabric)] == [(3, 6), (3, 7), (3, 9)]


def test_all_to_all_is_one_group_and_leaves_out_who_gets_nothing() -> None:
    """One rank sends to itself, which only a group lets it."""
    fabric = threaded_nccl_group(1)[0]
    out = torch.zeros(2, 3)
    fabric.all_to_all(out, torch.ones(2, 3), [2], [2])
    fabric.all_to_all(out[:0], out[:0], [0], [0])
    assert out.sum() == 6
    assert [call[0] for call in calls(fabric)] == ["send", "recv"]
    with pytest.raises(FabricError, match="send: NCCL_ERROR_INVALID_USAGE"):
        fabric.send(out, 0)


def test_a_group_that_fails_is_ended_and_an_error() -> None:
    first, second = threaded_nccl_group(2)

    def run(fabric: NcclFabric) -> str:
        rows = 2 if fabric is first else 1
        mine, out = torch.zeros(2 * rows, 4), torch.zeros(4, 4)
        try:
            fabric.all_to_all(out, mine, [2, 2], [rows, rows])
        except FabricError as error:
            return str(error)
        return ""

    fates = together(2, lambda rank: run((first, second)[rank]))
    assert "all_to_all: NCCL_ERROR_INVALID_ARGUMENT" in fates
    assert fake_nccl._local.__dict__.get("group") is None


@contextmanager
def stuck_work() -> Iterator[None]:
    """Work that is in the stream and never done, as if a peer had not called."""
    with patch.object(fake_nccl.Event, "query", lambda event: False):
        yield


async def test_work_that_is_never_done_is_noticed_after_its_call_returned() -> None:
    fabric = threaded_nccl_group(1, timeout_s=0.2)[0]
    with stuck_work():
        with contextlib.suppress(FabricError):  # on a slow machine it is noticed before that
            fabric.all_gather(torch.empty(1, 4), torch.ones(4))
        await until(lambda: fabric._error is not None, timeout_s=60)
    with pytest.raises(FabricError, match=r"all_gather was not done after 0\.2 s"):
        fabric.check()


async def test_an_error_that_comes_later_ends_the_group() -> None:
    """One that cupy has no name for: the peer's connection is gone."""
    first, second = threaded_nccl_group(2, timeout_s=2.0)
    second.abort()
    await until(lambda: first._error is not None, timeout_s=60)
    with pytest.raises(FabricError, match="NCCL result 6"):
        first.check()


def test_what_is_captured_is_not_timed() -> None:
    """Its work begins with a replay; a host that captures waits for nobody."""
    fabric = threaded_nccl_group(1)[0]
    with stuck_work(), patch.object(fake_nccl, "is_current_stream_capturing", lambda: True):
        fabric.all_gather(torch.empty(1, 4), torch.ones(4))
        assert fabric._last is None


@pytest.mark.parametrize("kind", EXCHANGES)
def test_rows_meet_their_experts_over_it(kind: str) -> None:
    config, rows = oracle("like-236b").config, [3, 1]
    share = config.n_routed_experts // len(rows)
    fabrics = threaded_nccl_group(len(rows))
    torch.manual_seed(1)
    inputs = [
        (
            torch.randn(count, config.hidden_size),
            torch.stack([torch.randperm(config.n_routed_experts)[:4] for _ in range(count)]),
            torch.rand(count, 4),
        )
        for count in rows
    ]

    def run(rank: int) -> torch.Tensor:
        exchange = EXCHANGES[kind](fabrics[rank], config.n_routed_experts)
        exchange.begin(rows)
        return exchange(*inputs[rank], local(rank))

    def local(rank: int) -> LocalExperts:
        return experts_of(config, range(rank * share, (rank + 1) * share))

    whole = experts_of(config, range(config.n_routed_experts))
    for rank, out in enumerate(together(len(rows), run)):
        torch.testing.assert_close(out, whole(*inputs[rank]), rtol=1e-5, atol=1e-5)

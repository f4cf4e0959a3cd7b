"""How the tokens of a stage meet their experts when each rank holds a share of the experts.

Both exchanges give what one rank with all experts would give, for every rank's own rows:

- *gather*: everybody gets everybody's rows, adds up what its own experts say to them, and a
  reduce-scatter brings the sums home. Fixed shapes; moves (R-1) rows per row each way.
- *all-to-all*: a row goes once to each rank that holds at least one of its experts, is summed
  over those experts there, and the sums come home. Moves only what is needed, but the shapes
  depend on the routing, so the counts travel first.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.moe import ExpertExchange, LocalExperts
from serving.gang.fabric import Fabric


class StageExchange(ExpertExchange):
    """An exchange that also keeps account of its time and traffic."""

    def __init__(self, fabric: Fabric, experts_total: int) -> None:
        self._fabric = fabric
        self._experts_per_rank = experts_total // fabric.size
        self._rows: Sequence[int] = ()
        self.seconds = 0.0
        self.bytes_sent = 0
        self.trace: Callable[[str, float, float], None] | None = None

    def join(self, fabric: Fabric) -> None:
        """Goes on with another group of the same ranks."""
        self._fabric = fabric

    def begin(self, rows: Sequence[int]) -> None:
        """Starts a step: how many rows each rank of the stage brings; resets the account."""
        self._rows = rows
        self.seconds = 0.0
        self.bytes_sent = 0

    def _count(self, started: float, tensor: Tensor, rows_away: int) -> None:
        ended = time.perf_counter()
        self.seconds += ended - started
        if self.trace is not None:
            self.trace("exchange", started, ended)
        row_bytes = tensor.element_size() * tensor.stride(0) if tensor.dim() > 1 else 0
        self.bytes_sent += rows_away * row_bytes


class GatherExchange(StageExchange):
    """All-gather, local experts, reduce-scatter."""

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: LocalExperts
    ) -> Tensor:
        ranks, most, width = self._fabric.size, max(self._rows), hidden.shape[1]
        packed = _pack(hidden, ids, weights, most)  # [most, row bytes]
        gathered = packed.new_empty(ranks, *packed.shape)  # [ranks, most, row bytes]
        started = time.perf_counter()
        self._fabric.all_gather(gathered, packed)
        self._count(started, packed, most * (ranks - 1))
        partial = experts(*_unpack(gathered.flatten(0, 1), width, hidden.dtype, ids.shape[1]))
        out = hidden.new_empty(most, width)  # [most, hidden]
        started = time.perf_counter()
        self._fabric.reduce_scatter(out, partial.view(ranks, most, width))
        self._count(started, partial, most * (ranks - 1))
        return out[: hidden.shape[0]]


class AllToAllExchange(StageExchange):
    """Each row once to each rank that it needs; sums come back."""

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: LocalExperts
    ) -> Tensor:
        fabric, width = self._fabric, hidden.shape[1]
        owners = ids // self._experts_per_rank  # [rows, k]
        needed = torch.zeros(
            hidden.shape[0], fabric.size, dtype=torch.bool, device=hidden.device
        ).scatter_(1, owners, True)  # [rows, ranks]
        peers, sources = needed.t().nonzero(as_tuple=True)  # by peer, then by row
        packed = _pack(hidden[sources], ids[sources], weights[sources], len(sources))
        started = time.perf_counter()
        sent = torch.bincount(peers, minlength=fabric.size)  # [ranks] int64
        taken = torch.empty_like(sent)
        fabric.all_to_all(taken, sent, [1] * fabric.size, [1] * fabric.size)
        rows_out, rows_in = sent.tolist(), taken.tolist()
        arrived = packed.new_empty(sum(rows_in), packed.shape[1])
        fabric.all_to_all(arrived, packed, rows_in, rows_out)
        self._count(started, packed, sum(rows_out) - rows_out[fabric.rank])
        partial = experts(*_unpack(arrived, width, hidden.dtype, ids.shape[1]))
        started = time.perf_counter()
        returned = hidden.new_empty(len(sources), width)
        fabric.all_to_all(returned, partial, rows_out, rows_in)
        self._count(started, partial, sum(rows_in) - rows_in[fabric.rank])
        total = torch.zeros_like(hidden, dtype=torch.float32)
        return total.index_add_(0, sources, returned.float()).to(hidden.dtype)


EXCHANGES: dict[str, type[StageExchange]] = {
    "gather": GatherExchange,
    "all_to_all": AllToAllExchange,
}


def _pack(hidden: Tensor, ids: Tensor, weights: Tensor, rows: int) -> Tensor:
    """One message a row, [rows, bytes] uint8: hidden state, expert ids, expert weights.

    Rows past the given ones are padding: their expert ids are -1, so they cost nothing.
    """
    row = [hidden, ids.to(torch.int32), weights.float()]
    sizes = [part.shape[1] * part.element_size() for part in row]
    packed = torch.zeros(rows, sum(sizes), dtype=torch.uint8, device=hidden.device)
    packed[hidden.shape[0] :, sizes[0] : sizes[0] + sizes[1]] = 0xFF
    start = 0
    for part, size in zip(row, sizes, strict=True):
        packed[: part.shape[0], start : start + size] = part.contiguous().view(torch.uint8)
        start += size
    return packed


def _unpack(
    packed: Tensor, width: int, dtype: torch.dtype, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids (int64) and weights (fp32) of packed rows."""
    sizes = [width * dtype.itemsize, top_k * 4, top_k * 4]
    hidden, ids, weights = (part.contiguous() for part in packed.split(sizes, dim=1))
    return hidden.view(dtype), ids.view(torch.int32).long(), weights.view(torch.float32)

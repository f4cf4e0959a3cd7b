"""The few large numbers of wide rows, found by looking at a 64th of each.

Rows are cut into blocks of 64 numbers, and only blocks whose maximum is large are looked into.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 64
_WORTH = 4  # times as many blocks as are looked for, or the whole row is searched


class Blocks:
    """Rows [R, V] of numbers, by their blocks."""

    def __init__(self, rows: Tensor) -> None:
        rest = -rows.shape[1] % _WIDTH
        self._rows = F.pad(rows, (0, rest), value=float("-inf")) if rest else rows.contiguous()
        self._last = rows.shape[1] - 1
        self._blocks = self._rows.view(len(rows), -1, _WIDTH)
        self._maxima = self._blocks.amax(dim=2)  # [R, V / 64]

    def peaks(self) -> Tensor:
        """Where the largest number of each row stands: int64 [R]."""
        block = self._maxima.argmax(dim=1)
        inside = self._blocks[torch.arange(len(block), device=block.device), block]
        return (block * _WIDTH + inside.argmax(dim=1)).clamp_(max=self._last)

    def largest(self, count: int) -> Tensor:
        """The `count` largest numbers of each row, largest first: [R, count]."""
        candidates = self._rows
        if self._maxima.shape[1] >= _WORTH * count:
            # A number that is larger than the smallest maximum of these stands in one of them.
            block = self._maxima.topk(count, dim=1, sorted=False).indices
            row = torch.arange(len(block), device=block.device)[:, None]
            candidates = self._blocks[row, block].flatten(1)
        return candidates.topk(count, dim=1).values

    def reaching(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of all finite numbers that are no less than their row's level [R]."""
        level = level.clamp(min=torch.finfo(level.dtype).min)[:, None]
        row, block = (self._maxima >= level).nonzero().unbind(1)
        found, lane = (self._blocks[row, block] >= level[row]).nonzero().unbind(1)
        return row[found], block[found] * _WIDTH + lane

    def down_to(self, cut: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the `ranks` [R] largest of each row, `cut` [R] the last of them.

        Of the numbers that tie with the last, those that stand first.
        """
        row, column = self.reaching(cut)
        last = self._rows[row, column] == cut[row]
        ties = torch.bincount(row[last], minlength=len(ranks))
        room = ranks - (torch.bincount(row, minlength=len(ranks)) - ties)
        place = last.cumsum(0) - (ties.cumsum(0) - ties)[row]  # among the row's ties, from 1
        kept = ~last | (place <= room[row])
        return row[kept], column[kept]

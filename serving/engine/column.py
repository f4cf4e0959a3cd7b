"""The books of one column: its cache pages, who runs on it, and whom its ranks may forget.

A column is rank r of every stage; a sequence lives on one column, and a page id means the same
on all its stages. The books decide nothing: the scheduler says who comes, and when.
"""

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from serving.engine.pages import PAGE_TOKENS, PagePool, pages_for
from serving.engine.request import ColumnStats
from serving.engine.sequence import Sequence

by_rank = attrgetter("rank_key")


class Column:
    """Sequences with a place on one column, most important first, and the pages they hold."""

    def __init__(self, number: int, pages: int) -> None:
        self.number = number
        self.pool = PagePool(pages)
        self.running: list[Sequence] = []
        self._left: list[int] = []  # ids of sequences that the ranks still know

    @property
    def stats(self) -> ColumnStats:
        return ColumnStats(self.pool.held, self.pool.remembered, self.pool.free)

    def cost(self, tokens: int, contents: Iterable[bytes]) -> int | None:
        """What is in the way of a sequence here; None without room for it.

        It is the pages held, less those of these contents that it would share.
        """
        hits, unheld = self.pool.leading(contents)
        if pages_for(tokens + 1) - hits > self.pool.available - unheld:
            return None
        return self.pool.held - hits

    def place(self, sequence: Sequence, contents: Iterable[bytes]) -> None:
        """Takes a sequence in, with as many leading pages of these contents as are known here."""
        cached: list[int] = []
        for content in contents:
            page = self.pool.find(content)
            if page is None:
                break
            cached.append(page)
        sequence.place(self.number, cached)
        insort(self.running, sequence, key=by_rank)

    def remove(self, sequence: Sequence) -> None:
        """A sequence loses its place and its pages."""
        self.running.remove(sequence)
        self.pool.release(sequence.displace())
        self._left.append(sequence.id)

    def make_room(self, sequence: Sequence, count: int) -> list[Sequence]:
        """Pages for a sequence's next `count` positions, or for as many as can be had.

        Args:
            count: more than it has pages for.

        Returns:
            those of less importance that lost their places for it.
        """
        missing = pages_for(sequence.scheduled + count) - len(sequence.pages)
        removed = []
        while missing > self.pool.available and self.running[-1] is not sequence:
            removed.append(self.running[-1])
            self.remove(removed[-1])
        sequence.pages += self.pool.take(min(missing, self.pool.available))
        return removed

    def name_pages(self, sequence: Sequence) -> None:
        """Pages that are computed to their end can be found by others from now on."""
        full = sequence.computed // PAGE_TOKENS
        if full > sequence.named:
            hashes = sequence.chain.extend(sequence.tokens)
            for page in range(sequence.named, full):
                self.pool.remember(sequence.pages[page], hashes[page])
            sequence.named = full

    def take_left(self) -> list[int]:
        """Ids of who left since the last call: the ranks forget them."""
        left, self._left = self._left, []
        return left

    def restart(self) -> list[Sequence]:
        """The ranks know of nobody any more; returns who had a place."""
        placed, self.running = self.running, []
        for sequence in placed:
            self.pool.release(sequence.displace())
        self._left = []
        return placed

    def check_integrity(self) -> None:
        """Raises AssertionError when the books of sequences and pages disagree."""
        assert self.running == sorted(self.running, key=by_rank), "a column is out of order"
        self.pool.check_integrity(page for sequence in self.running for page in sequence.pages)
        for sequence in self.running:
            assert sequence.column == self.number
            assert sequence.computed <= sequence.scheduled <= sequence.known
            assert pages_for(sequence.scheduled) <= len(sequence.pages)

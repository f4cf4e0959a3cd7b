"""Which engine has probably cached which page: a bounded memory of past leases.

Only hashes are kept, never a prompt. The index is a guess (an engine evicts on its own), good
enough to send a conversation's next turn to where its pages are.
"""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """Page hash → engine that was last leased for it; least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._engines: OrderedDict[bytes, str] = OrderedDict()

    def hits(self, page_hashes: Sequence[bytes]) -> dict[str, int]:
        """For each engine, how many leading pages of the prompt it should hold."""
        leading: dict[str, int] = {}
        for position, page in enumerate(page_hashes):
            engine = self._engines.get(page)
            if engine is None:
                break
            leading[engine] = position + 1
        return leading

    def record(self, page_hashes: Sequence[bytes], engine: str) -> None:
        """The engine has been given a prompt with these pages."""
        for page in reversed(page_hashes[: self._capacity]):  # without its first, none is found
            self._engines[page] = engine
            self._engines.move_to_end(page)
        while len(self._engines) > self._capacity:
            self._engines.popitem(last=False)

    def forget(self, engine: str) -> None:
        """The engine is gone, and its cache with it."""
        for page in [page for page, holder in self._engines.items() if holder == engine]:
            del self._engines[page]

"""Pages of latent cache: who holds which, and which may be given away.

A page is 64 consecutive token positions of one column's cache, across all layers of all stages
(every stage uses the same page ids). Page 0 is the dummy that padding writes to. Pure
bookkeeping: no tensors here.

Pages may be handed on while a step that writes to them is still on its way through the
pipeline: ranks run steps in order, so the new holder's rows are written later.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

PAGE_TOKENS = 64
DUMMY_PAGE = 0


class OutOfPages(Exception):
    """Not enough pages now; the scheduler preempts or waits."""


def pages_for(tokens: int) -> int:
    """How many pages so many tokens need."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(slots=True)
class PagePool:
    """Free, held and remembered pages of one column.

    A page is *held* while some sequence refers to it, *remembered* when nobody does but its
    content is known by a hash (least recently used goes first), and *free* otherwise.
    """

    total: int  # pages that can be held; the dummy is not one of them
    _free: list[int] = field(init=False)
    _holders: dict[int, int] = field(init=False, default_factory=dict)
    _hash_of: dict[int, bytes] = field(init=False, default_factory=dict)
    _page_of: dict[bytes, int] = field(init=False, default_factory=dict)
    _remembered: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._free = list(range(self.total, DUMMY_PAGE, -1))

    @property
    def held(self) -> int:
        return len(self._holders)

    @property
    def remembered(self) -> int:
        return len(self._remembered)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free ones and remembered ones."""
        return len(self._free) + len(self._remembered)

    def take(self, count: int) -> list[int]:
        """Hands out `count` pages, each held once; forgets the oldest content if it must."""
        if count > self.available:
            raise OutOfPages(f"need {count} pages, {self.available} available")
        pages = [self._free.pop() if self._free else self._forget_oldest() for _ in range(count)]
        self._holders.update((page, 1) for page in pages)
        return pages

    def leading(self, contents: Iterable[bytes]) -> tuple[int, int]:
        """How many contents in a row are known here, and how many of these nobody holds."""
        known = unheld = 0
        for content in contents:
            page = self._page_of.get(content)
            if page is None:
                break
            known += 1
            unheld += page in self._remembered
        return known, unheld

    def find(self, content: bytes) -> int | None:
        """The page with this content, now held once more; None if unknown."""
        page = self._page_of.get(content)
        if page is None:
            return None
        self._remembered.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1
        return page

    def remember(self, page: int, content: bytes) -> None:
        """A held page's content is complete and known by this hash; the first page keeps it."""
        if content not in self._page_of and page not in self._hash_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def release(self, pages: Iterable[int]) -> None:
        """One hold less on each; the last pages of a sequence are forgotten before the first."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._hash_of:
                self._remembered[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """The cache was lost: what nobody holds is free, and no content is known."""
        assert not self._holders, "pages of a lost cache are held"
        self._free += self._remembered
        self._remembered.clear()
        self._hash_of.clear()
        self._page_of.clear()

    def check_integrity(self, holds: Iterable[int]) -> None:
        """Raises AssertionError unless exactly these holds exist and every page is somewhere."""
        expected: dict[int, int] = {}
        for page in holds:
            expected[page] = expected.get(page, 0) + 1
        assert expected == self._holders, "pages are held by others than the sequences"
        everywhere = [*self._free, *self._holders, *self._remembered]
        assert sorted(everywhere) == list(range(1, self.total + 1)), "a page is lost or double"
        assert self._page_of == {content: page for page, content in self._hash_of.items()}
        assert not set(self._free) & set(self._hash_of), "a free page is known by content"
        assert set(self._remembered) <= set(self._hash_of), "a remembered page has no content"

    def _forget_oldest(self) -> int:
        page, _ = self._remembered.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

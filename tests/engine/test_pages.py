"""Pages: free, held or remembered, and found by name."""

from random import Random

import pytest

from serving.engine.pages import OutOfPages, PagePool, pages_for
from serving.engine.prefix import HashChain, page_hashes


def test_tokens_fill_whole_pages() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_the_dummy_page_is_never_handed_out() -> None:
    assert sorted(PagePool(5).take(5)) == [1, 2, 3, 4, 5]


def test_more_pages_than_there_are_is_out_of_pages_and_takes_none() -> None:
    pool = PagePool(3)
    held = pool.take(2)
    with pytest.raises(OutOfPages, match="need 2 pages, 1 available"):
        pool.take(2)
    pool.check_integrity(held)
    assert pool.available == 1


def test_a_named_page_is_found_while_held_and_after() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1)
    pool.remember(page, b"x")
    assert pool.find(b"x") == page
    pool.check_integrity([page, page])
    pool.release([page])
    pool.release([page])
    assert (pool.held, pool.remembered, pool.free) == (0, 1, 2)
    assert pool.find(b"x") == page
    assert (pool.held, pool.remembered, pool.free) == (1, 0, 2)
    assert pool.find(b"y") is None
    pool.check_integrity([page])


def test_the_first_page_with_a_content_keeps_the_name() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.remember(first, b"x")
    pool.remember(second, b"x")
    pool.remember(first, b"y")
    pool.release([second])
    assert pool.free == 1
    assert pool.find(b"x") == first
    assert pool.find(b"y") is None
    pool.check_integrity([first, first])


def test_free_pages_go_before_remembered_ones() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.remember(page, b"x")
    pool.release([page])
    assert pool.take(1) != [page]
    assert pool.remembered == 1


def test_the_least_recently_used_page_is_forgotten_first() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    for page, content in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.remember(page, content)
        pool.release([page])
    assert pool.find(b"a") == pages[0]
    pool.release([pages[0]])  # used again: now the youngest
    assert pool.take(2) == [pages[1], pages[2]]
    assert pool.find(b"b") is None
    assert pool.find(b"c") is None
    assert pool.find(b"a") == pages[0]


def test_the_last_pages_of_a_sequence_are_forgotten_before_the_first() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    for page, content in zip(pages, (b"a", b"ab", b"abc"), strict=True):
        pool.remember(page, content)
    pool.release(pages)
    assert pool.take(1) == [pages[2]]
    assert pool.leading([b"a", b"ab", b"abc"]) == (2, 2)


def test_leading_stops_at_the_first_unknown_content() -> None:
    pool = PagePool(3)
    a, b, c = pool.take(3)
    for page, content in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.remember(page, content)
    pool.release([b, c])
    assert pool.leading([b"a", b"b", b"?", b"c"]) == (2, 1)
    assert pool.leading([b"?", b"a"]) == (0, 0)
    pool.check_integrity([a])


def test_a_pool_keeps_its_books_through_any_use() -> None:
    random = Random(1)
    pool, names = PagePool(6), 0
    held: list[int] = []
    for _ in range(3000):
        match random.choice(["take", "release", "remember", "find"]):
            case "take" if pool.available:
                held += pool.take(random.randint(1, pool.available))
            case "release" if held:
                held.remove(page := random.choice(held))
                pool.release([page])
            case "remember" if held:
                names += 1
                pool.remember(random.choice(held), str(names).encode())
            case "find" if names:
                found = pool.find(str(random.randint(max(1, names - 5), names)).encode())
                held += [] if found is None else [found]
        pool.check_integrity(held)
        assert pool.held + pool.remembered + pool.free == pool.total


def test_integrity_sees_a_page_held_by_nobody_that_is_known() -> None:
    pool = PagePool(3)
    page, _ = pool.take(2)
    with pytest.raises(AssertionError, match="held by others"):
        pool.check_integrity([page])


def test_integrity_sees_two_holders_of_a_page_held_once() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1)
    with pytest.raises(AssertionError, match="held by others"):
        pool.check_integrity([page, page])


def test_integrity_sees_a_lost_page() -> None:
    pool = PagePool(3)
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost or double"):
        pool.check_integrity([])


def test_integrity_sees_a_page_that_is_free_and_held() -> None:
    pool = PagePool(3)
    pages = pool.take(1)
    pool._free += pages
    with pytest.raises(AssertionError, match="lost or double"):
        pool.check_integrity(pages)


def test_integrity_sees_a_free_page_with_a_name() -> None:
    pool = PagePool(3)
    pool.remember(pool._free[0], b"x")
    with pytest.raises(AssertionError, match="free page is known"):
        pool.check_integrity([])


def test_a_page_can_only_be_released_by_a_holder() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1)
    pool.release([page])
    with pytest.raises(KeyError):
        pool.release([page])


def test_a_page_name_depends_on_everything_before_the_page_end() -> None:
    tokens = list(range(200))
    names = page_hashes(tokens, "acme")
    assert len(names) == 3
    assert page_hashes(tokens[:130], "acme") == names[:2]
    changed = page_hashes([7, *tokens[1:]], "acme")
    assert all(one != other for one, other in zip(names, changed, strict=True))
    late = page_hashes([*tokens[:191], 7], "acme")
    assert late[:2] == names[:2]
    assert late[2] != names[2]


def test_tenants_share_no_page_name() -> None:
    tokens = list(range(128))
    assert not set(page_hashes(tokens, "acme")) & set(page_hashes(tokens, "umbrella"))
    assert not set(page_hashes(tokens, "acme")) & set(page_hashes(tokens, ""))


def test_a_chain_that_grows_names_pages_as_a_whole_prompt_does() -> None:
    tokens = [3, 99_999] * 150
    chain = HashChain("acme")
    for length in (1, 63, 64, 65, 192, 300):
        assert chain.extend(tokens[:length]) == page_hashes(tokens[:length], "acme")

"""Responses that are kept: for their tenant, for a while, and within bounds."""

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.errors import ApiError
from serving.api.response_store import (
    ResponseStore,
    StoredResponse,
    delete_response,
    stored_response,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def new_store(
    entries: int = 10, size: int = 10_000, age_s: float = 60.0
) -> tuple[ResponseStore, Clock]:
    clock = Clock()
    return ResponseStore(entries, size, age_s, clock), clock


def response(text: str = "x") -> StoredResponse:
    return StoredResponse([{"role": "user", "content": text}], {"id": "resp_1", "output": []})


def test_what_comes_back_is_what_was_put_and_a_copy_of_it() -> None:
    store, _ = new_store()
    store.put("a", "1", response("naïve 🎉"))
    found = store.find("a", "1")
    assert found == response("naïve 🎉")
    found.conversation.append({"role": "user", "content": "more"})
    assert store.find("a", "1") == response("naïve 🎉")


def test_a_tenant_sees_and_deletes_its_own_responses_only() -> None:
    store, _ = new_store()
    store.put("a", "1", response())
    assert store.find("b", "1") is None
    assert not store.delete("b", "1")
    assert store.delete("a", "1")
    assert store.find("a", "1") is None
    assert not store.delete("a", "1")


def test_the_least_recently_used_one_makes_room() -> None:
    store, _ = new_store(entries=2)
    store.put("a", "1", response())
    store.put("a", "2", response())
    store.find("a", "1")
    store.put("a", "3", response())
    assert [name for name in "123" if store.find("a", name)] == ["1", "3"]


def test_what_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    store, _ = new_store(size=500)
    store.put("a", "1", response())
    store.put("a", "2", response("x" * 1000))
    assert store.find("a", "2") is None
    assert store.find("a", "1") is not None


def test_use_does_not_make_a_response_live_longer() -> None:
    store, clock = new_store(age_s=60)
    store.put("a", "1", response())
    clock.now = 59
    store.put("a", "2", response())
    assert store.find("a", "1") is not None
    clock.now = 61
    assert store.find("a", "1") is None
    assert store.find("a", "2") is not None
    clock.now = 1000
    assert not store.delete("a", "2")
    assert (len(store), store.size_bytes) == (0, 0)


ACTION = st.tuples(
    st.sampled_from(["put", "find", "delete", "wait"]),
    st.sampled_from("ab"),
    st.sampled_from("123"),
    st.integers(0, 300),
)


@given(st.lists(ACTION, max_size=60))
def test_bounds_hold_whatever_is_done(actions: list[tuple[str, str, str, int]]) -> None:
    store, clock = new_store(entries=3, size=400, age_s=500)
    kept: OrderedDict[tuple[str, str], float] = OrderedDict()
    for what, tenant, name, number in actions:
        key = (tenant, name)
        if what == "wait":
            clock.now += number
        elif what == "put":
            store.put(tenant, name, response("x" * number))
            kept[key] = clock.now
        elif what == "delete":
            if store.delete(tenant, name):
                assert clock.now - kept.pop(key) <= 500
        elif store.find(tenant, name) is not None:
            assert clock.now - kept[key] <= 500
        assert len(store) <= 3
        assert store.size_bytes <= 400
        assert (len(store) == 0) == (store.size_bytes == 0)


def refused(call: Any, store: ResponseStore | None, tenant: str) -> ApiError:
    with pytest.raises(ApiError) as raised:
        call(store, tenant, "1")
    return raised.value


@pytest.mark.parametrize("call", [stored_response, delete_response])
def test_a_response_that_is_not_ones_own_does_not_exist(call: Any) -> None:
    store, _ = new_store()
    store.put("a", "1", response())
    assert refused(call, store, "b").status == 404
    off = refused(call, None, "a")
    assert (off.status, "off" in off.message) == (404, True)


def test_a_kept_response_is_read_and_deleted_by_its_id() -> None:
    store, _ = new_store()
    store.put("a", "1", response())
    assert stored_response(store, "a", "1") == {"id": "resp_1", "output": []}
    assert delete_response(store, "a", "1") == {"id": "1", "object": "response", "deleted": True}
    assert refused(stored_response, store, "a").status == 404

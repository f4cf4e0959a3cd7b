"""Responses that clients may come back to, in this process's memory.

What is kept is JSON, so its size is known and nobody changes it later. Another ingress does not
know of it, and neither does this one after a restart.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from serving.api.errors import ApiError

STORING_IS_OFF = "Storing responses is off on this server"
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and all that a next one has to know.

    Attributes:
        conversation: chat messages up to and with the answer; no instructions.
        body: the response as the client got it.
    """

    conversation: list[dict[str, Any]]
    body: dict[str, Any]


class ResponseStore:
    """Responses by tenant and id. The least recently used ones make room for new ones.

    Args:
        max_entries: of all tenants together.
        max_bytes: size of the JSON of all entries; what is larger alone is not kept at all.
        max_age_s: since a response was put here, however often it is used.
        clock: seconds that never go back.
    """

    def __init__(
        self, max_entries: int, max_bytes: int, max_age_s: float, clock: Callable[[], float]
    ) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._by_use: OrderedDict[_Key, bytes] = OrderedDict()  # least recently used first
        self._put_at: OrderedDict[_Key, float] = OrderedDict()  # oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def size_bytes(self) -> int:
        """What the entries take, by their JSON."""
        return self._bytes

    def put(self, tenant: str, response_id: str, response: StoredResponse) -> None:
        """Keeps a response, in place of an earlier one of this id."""
        key = (tenant, response_id)
        self._expire()
        self._forget(key)
        encoded = msgspec.json.encode(response)
        if len(encoded) > self._max_bytes:
            return
        self._by_use[key] = encoded
        self._put_at[key] = self._clock()
        self._bytes += len(encoded)
        while len(self._by_use) > self._max_entries or self._bytes > self._max_bytes:
            self._forget(next(iter(self._by_use)))

    def find(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The tenant's response of this id, which counts as a use of it."""
        key = (tenant, response_id)
        self._expire()
        encoded = self._by_use.get(key)
        if encoded is None:
            return None
        self._by_use.move_to_end(key)
        return msgspec.json.decode(encoded, type=StoredResponse)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forgets a response; says whether the tenant had it."""
        self._expire()
        return self._forget((tenant, response_id))

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self._max_age_s
        while self._put_at:
            key, put_at = next(iter(self._put_at.items()))
            if put_at >= oldest_allowed:
                return
            self._forget(key)

    def _forget(self, key: _Key) -> bool:
        encoded = self._by_use.pop(key, None)
        if encoded is None:
            return False
        del self._put_at[key]
        self._bytes -= len(encoded)
        return True


def stored_response(store: ResponseStore | None, tenant: str, response_id: str) -> dict[str, Any]:
    """Body of `GET /v1/responses/{id}`.

    Args:
        store: None where storing is off.

    Raises:
        ApiError: 404, the tenant has no such response.
    """
    found = None if store is None else store.find(tenant, response_id)
    if found is None:
        raise _not_found(store)
    return found.body


def delete_response(store: ResponseStore | None, tenant: str, response_id: str) -> dict[str, Any]:
    """Body of `DELETE /v1/responses/{id}`, once the response is gone.

    Raises:
        ApiError: 404, the tenant has no such response.
    """
    if store is None or not store.delete(tenant, response_id):
        raise _not_found(store)
    return {"id": response_id, "object": "response", "deleted": True}


def _not_found(store: ResponseStore | None) -> ApiError:
    message = "The response was not found." if store is not None else f"{STORING_IS_OFF}."
    return ApiError(404, message)

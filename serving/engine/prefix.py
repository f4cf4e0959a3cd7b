"""Names for what a page holds: a hash chained over all tokens up to the page's end.

Two pages with the same name hold the same latent rows, because a row depends on every token
before it. The chain starts from a scope (the tenant, and the client's salt if it gave one), so
tenants never meet in the cache and cannot probe each other's prompts by timing (CVE-2025-46570).
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

from serving.engine.pages import PAGE_TOKENS

DIGEST_BYTES = 16


class HashChain:
    """The page names of one growing sequence; each page is hashed once."""

    __slots__ = ("_last", "hashes")

    def __init__(self, scope: str) -> None:
        self._last = sha256(scope.encode()).digest()
        self.hashes: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """Names of all full pages of `tokens`, which begin with what was given before."""
        for page in range(len(self.hashes), len(tokens) // PAGE_TOKENS):
            start = page * PAGE_TOKENS
            ids = array("I", tokens[start : start + PAGE_TOKENS]).tobytes()
            self._last = sha256(self._last + ids).digest()
            self.hashes.append(self._last[:DIGEST_BYTES])
        return self.hashes


def page_hashes(tokens: Sequence[int], scope: str) -> list[bytes]:
    """Names of a prompt's full pages."""
    return HashChain(scope).extend(tokens)

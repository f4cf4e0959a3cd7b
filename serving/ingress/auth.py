"""API keys: hashed in memory, compared in constant time, each key its own tenant."""

import hashlib
import hmac
import re
from pathlib import Path

from serving.api.errors import ApiError

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):(\S{8,512})")
OPEN_TENANT = "public"


class KeysError(Exception):
    """The keys file cannot be used; the message names the line, never its content."""


class ApiKeys:
    """Who may use the server. Without a file everybody may, as one tenant."""

    def __init__(self, file: Path | None) -> None:
        self._digests: list[tuple[bytes, str]] | None = None
        if file is not None:
            self._digests = [(_digest(key), tenant) for tenant, key in _read(file)]

    def tenant(self, authorization: str | None, api_key: str | None = None) -> str:
        """The tenant of an `Authorization` header, or of an `x-api-key` header without one.

        Every known key is compared, whether or not one has matched, so that the time taken
        tells nothing.

        Raises:
            ApiError: 401, no key or an unknown one.
        """
        if self._digests is None:
            return OPEN_TENANT
        if authorization is None and api_key is not None:
            authorization = f"Bearer {api_key}"
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found: str | None = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, given):
                found = tenant
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(401, "Incorrect or missing API key.", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{file}: cannot be read ({type(error).__name__})") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise KeysError(f"{file}: line {number} is not `name:key`, the key 8 or more long")
        keys.append((match[1], match[2]))
    if not keys:
        raise KeysError(f"{file}: no keys; add `name:key` lines")
    return keys

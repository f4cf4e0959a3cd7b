"""API keys."""

import contextlib
import hmac
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.errors import ApiError
from serving.ingress.auth import OPEN_TENANT, ApiKeys, KeysError


def keys(tmp_path: Path, text: str) -> ApiKeys:
    file = tmp_path / "keys"
    file.write_text(text)
    return ApiKeys(file)


def test_without_a_file_everybody_is_one_tenant() -> None:
    assert ApiKeys(None).tenant(None) == ApiKeys(None).tenant("Bearer x") == OPEN_TENANT


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    known = keys(tmp_path, "# who\nalice:secret-one\n\nbob:secret-two\n")
    assert known.tenant("Bearer secret-two") == "bob"
    assert known.tenant("bearer secret-one") == "alice"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer secret", "Basic secret-one", "secret-one"]
)
def test_anything_else_is_a_401(tmp_path: Path, header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        keys(tmp_path, "alice:secret-one\n").tenant(header)
    assert caught.value.status == 401
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("text", ["alice\n", "alice:short\n", "", "a b:secret-one\n", "\n#\n"])
def test_a_bad_file_is_an_error_that_does_not_tell_the_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeysError) as caught:
        keys(tmp_path, text)
    assert "secret-one" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_the_line_at_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="line 3 ") as caught:
        keys(tmp_path, "# keys\nalice:secret-one\nbob secret-two\n")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("known", [1, 1000])
@pytest.mark.parametrize("header", ["Bearer secret-key-0", "Bearer unknown", "Basic x", None])
def test_every_key_is_compared_whatever_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int, header: str | None
) -> None:
    made = keys(tmp_path, "".join(f"t{i}:secret-key-{i}\n" for i in range(known)))
    compare = Mock(wraps=hmac.compare_digest)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    with contextlib.suppress(ApiError):
        made.tenant(header)
    assert compare.call_count == known


def test_keys_are_kept_as_hashes_only(tmp_path: Path) -> None:
    assert "secret-one" not in repr(vars(keys(tmp_path, "alice:secret-one\n")))


def test_any_header_is_a_tenant_or_a_401(tmp_path: Path) -> None:
    made = keys(tmp_path, "alice:secret-one\n")

    @given(st.text(max_size=40))
    def check(header: str) -> None:
        with pytest.raises(ApiError):
            made.tenant(header)

    check()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        ApiKeys(tmp_path / "none")

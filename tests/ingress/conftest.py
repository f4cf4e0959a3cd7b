"""What the tests of an ingress share."""

from collections.abc import Iterator

import pytest

from serving.ingress import grammar_process

PATIENCE_S = 60.0


@pytest.fixture(scope="session", autouse=True)
def _patience_with_grammars() -> Iterator[None]:
    """A machine that stands still for two seconds makes no grammar a bad one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_process, "COMPILE_TIMEOUT_S", PATIENCE_S)
        yield

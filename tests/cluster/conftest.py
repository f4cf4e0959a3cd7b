"""One cluster for all tests of this folder: starting it is what takes the time."""

from collections.abc import Iterator

import openai
import pytest

from tests.cluster.server import Server, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """nano in fp32 as 2 stages × 2 ranks behind HAProxy."""
    with running_server(
        "--stages", "2", "--expert-parallel", "2", "--dtype", "float32", "--cache-tokens", "8192"
    ) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)

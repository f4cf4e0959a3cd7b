"""`python -m loadtest.token_path.server PORT`: the stack over a stub gang, until SIGINT."""

import sys
from typing import Any

from rich.console import Console

from deploy.up import up
from serving.config import (
    EngineSettings,
    GangSettings,
    IngressSettings,
    RouterSettings,
    Settings,
    TelemetrySettings,
)

MOST_STREAMS = 1024


def settings(port: int) -> Settings:
    """One engine that holds every stream at once."""
    return Settings(
        gang=GangSettings(cache_tokens=MOST_STREAMS * 4096, device="cpu"),
        engine=EngineSettings(max_sequences=MOST_STREAMS, max_step_tokens=8192),
        router=RouterSettings(queue_limit=MOST_STREAMS),
        ingress=IngressSettings(port=port),
        telemetry=TelemetrySettings(log_level="WARNING"),
    )


def _build(given: Settings) -> Any:
    # Serve reads its environment when it is imported, and `up` is what sets it.
    from loadtest.token_path.stub import StubEngine
    from serving.app import build

    return build(given, StubEngine)


if __name__ == "__main__":
    up(settings(int(sys.argv[1])), Console(), _build)

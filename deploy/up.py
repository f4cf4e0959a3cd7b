"""`expertline up`: serve a model in the foreground until Ctrl-C.

The first signal lets what runs come to its end, for as long as an engine may take to leave; a
second one stops at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from deploy.errors import StartError
from deploy.local_ray import LOOPBACK, local_ray
from deploy.preflight import check_model, check_port
from serving.config import Settings

_POLL_S = 0.2
_CALL_S = 2.0


Build = Callable[[Settings], Any]  # a Serve application


def up(settings: Settings, console: Console, build: Build | None = None) -> None:
    """Serves until SIGINT or SIGTERM; prints one `ready` line when a request would succeed.

    Args:
        build: what to serve; None: the application of `serving.app`.

    Raises:
        UsageError: something that can be known beforehand is wrong; nothing was started.
        StartError: the cluster could not bring the application up; nothing is left running.
    """
    check_model(settings)
    check_port(settings.ingress.host, settings.ingress.port)
    with _signals() as signals, local_ray(settings.ingress.longest_stream_s) as own:
        from ray import serve

        if own and settings.internal_host is None:
            settings = settings.model_copy(update={"internal_host": LOOPBACK})

        try:
            status = _start(settings, signals.first, console, build)
            if status is not None:
                console.print(ready_line(settings, status), highlight=False, soft_wrap=True)
                _wait(signals.first)
                console.print("finishing what runs; once more stops at once", style="dim")
                _finish(settings, signals.second)
        finally:
            console.print("stopping", style="dim")
            if not (own and signals.second.is_set()):  # our own cluster ends with us
                serve.shutdown()


def ready_line(settings: Settings, status: dict[str, Any]) -> str:
    """URL, model, stages × ranks, cache tokens."""
    gang = settings.gang
    return (
        f"ready http://{settings.ingress.host}:{settings.ingress.port} "
        f"model={settings.model.served_name} dtype={settings.model.dtype} "
        f"stages={gang.stages} expert_parallel={gang.expert_parallel} "
        f"engines={len(status['engines'])} cache_tokens={status['cache_tokens']}"
    )


def _start(
    settings: Settings, stopped: threading.Event, console: Console, build: Build | None
) -> dict[str, Any] | None:
    """Deploys and waits until `/readyz` says yes; the router's status, or None if stopped."""
    import torch  # noqa: F401  (before Serve: its import takes the longest)
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serving import app

    http = HTTPOptions(host=settings.ingress.host, port=settings.ingress.port)
    serve.start(proxy_location=app.PROXY_LOCATION, http_options=http)
    serve.run_many(
        [serve.RunTarget((build or app.build)(settings), name=app.APP_NAME, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        loading = progress.add_task("starting", total=None)
        while not stopped.wait(_POLL_S):
            _raise_if_failed(serve.status().applications.get(app.APP_NAME))
            status = _router_status(app.APP_NAME)
            if status is not None:
                _show(progress, loading, status)
                wanted = settings.engine.replicas
                if len(status["engines"]) >= wanted and _is_ready(settings):
                    return status
    return None


def _raise_if_failed(application: Any) -> None:
    if application is None or application.status.value not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return
    messages = [d.message for d in application.deployments.values() if d.message]
    text = next(iter(messages), application.message) or "the application failed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raise StartError(lines[-1] if lines else "the application failed")


def _router_status(app: str) -> dict[str, Any] | None:
    """The router's view; None while there is no router yet."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        handle = serve.get_deployment_handle("Router", app)
        status: dict[str, Any] = handle.status.remote().result(timeout_s=_CALL_S)
    except (RayServeException, KeyError, TimeoutError):
        return None  # KeyError: Serve knows the application, and not yet its deployments
    return status


def _is_ready(settings: Settings) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.ingress.host, settings.ingress.host)
    try:
        url = f"http://{host}:{settings.ingress.port}/readyz"
        return httpx.get(url, timeout=_CALL_S, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _show(progress: Progress, task: TaskID, status: dict[str, Any]) -> None:
    loading = status["loading"].values()
    total = sum(entry[1] for entry in loading)
    if total:
        done = sum(entry[0] for entry in loading)
        progress.update(task, description="loading weights", completed=done, total=total)


def _wait(stopped: threading.Event) -> None:
    while not stopped.wait(3600):
        continue


def _finish(settings: Settings, at_once: threading.Event) -> None:
    """Takes the application out of service; Serve lets its open requests end."""
    from ray import serve

    from serving.app import APP_NAME

    serve.delete(APP_NAME, _blocking=False)
    deadline = time.monotonic() + settings.engine.drain_timeout_s
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        if at_once.wait(_POLL_S):
            return


@dataclass(frozen=True, slots=True)
class _Signals:
    """Which of SIGINT and SIGTERM have come, counted together."""

    first: threading.Event = field(default_factory=threading.Event)
    second: threading.Event = field(default_factory=threading.Event)

    def take(self, number: int, frame: FrameType | None) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def _signals() -> Iterator[_Signals]:
    """SIGINT and SIGTERM set an event instead of killing us in the middle of something."""
    signals = _Signals()
    both = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signals.take) for number in both}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""A Ray of our own for `expertline up`, or the one that RAY_ADDRESS names; and its end.

Serve reads its environment variables when it is imported, and the processes that Ray starts
inherit ours, so the environment comes first.
"""

import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_STREAM_S = 3600
LOOPBACK = "127.0.0.1"
_REAP_S = 5.0


def serve_environment(workdir: Path) -> dict[str, str]:
    """Variables that every process of the cluster needs; HAProxy's files and ports our own."""
    ports = _free_ports(3)
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    haproxy = {key: str(workdir / name) for key, name in files.items()}
    haproxy |= {
        "SERVER_STATE_BASE": str(workdir),
        "METRICS_PORT": str(ports[0]),
        "STATS_PORT": str(ports[1]),
        "HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
        "TIMEOUT_CLIENT_S": str(LONGEST_STREAM_S),
        "NBTHREAD": "1",
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Who has died is heard of on other ways than the controller's rounds, which cost 4% of
        # a core at their default of ten a second.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # Our deployments never block their loop; a loop of Serve's own beside it costs every
        # token two hops between threads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **{f"RAY_SERVE_HAPROXY_{key}": value for key, value in haproxy.items()},
    }


@contextmanager
def local_ray() -> Iterator[bool]:
    """Ray and Serve's environment for the body; afterwards nothing of it is left.

    A cluster named by RAY_ADDRESS is joined and left running; its own environment counts.
    Yields whether the cluster is our own, all of it on this machine.
    """
    if os.environ.get("RAY_ADDRESS"):
        import ray

        ray.init(log_to_driver=True, configure_logging=False)
        try:
            yield False
        finally:
            ray.shutdown()
        return
    workdir = Path(tempfile.mkdtemp(prefix="expertline-"))
    os.environ.update({k: v for k, v in serve_environment(workdir).items() if k not in os.environ})
    try:
        import ray

        ray.init(
            include_dashboard=False,
            object_store_memory=100 * 1024 * 1024,
            log_to_driver=True,
            logging_level=logging.ERROR,
        )
        yield True
    finally:
        ray.shutdown()
        _reap_haproxy(Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]))
        shutil.rmtree(workdir, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _reap_haproxy(config: Path) -> None:
    """HAProxy outlives the actor that started it; ours is known by its configuration file."""
    deadline = time.monotonic() + _REAP_S
    while pids := _pids_with_argument(str(config)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
            except ProcessLookupError:
                continue
        if time.monotonic() > 2 * _REAP_S + deadline:
            return
        time.sleep(0.05)


def _pids_with_argument(argument: str) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended in the meantime
        if argument.encode() in arguments:
            pids.append(int(entry.name))
    return pids

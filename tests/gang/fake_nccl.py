"""NCCL among the threads of a test: what `cupy.cuda.nccl` and `torch.cuda` are to `NcclFabric`.

Moves bytes between host tensors as NCCL moves them between devices: point-to-point calls meet
their counterpart, those of a group begin together at its end, collectives need everybody. Counts
and types that do not fit their counterpart's are an error. Calls wait for their work, as if the
stream were waited for after each.
"""

import ctypes
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

STREAM = 4242
_TYPES = {1: torch.uint8, 6: torch.float16, 7: torch.float32, 9: torch.bfloat16}
_REMOTE_ERROR = 6


class NcclError(RuntimeError):
    """Cupy has names for the results up to 5; for others its constructor raises KeyError."""

    def __init__(self, status: int) -> None:
        names = {1: "UNHANDLED_CUDA_ERROR", 4: "INVALID_ARGUMENT", 5: "INVALID_USAGE"}
        super().__init__(f"NCCL_ERROR_{names[status]}")


class _Begun(NamedTuple):
    """One side of a transfer."""

    start: Callable[[], None]
    finish: Callable[[], None]
    sends: bool


@dataclass
class _Message:
    payload: bytes
    taken: bool = False


@dataclass
class _World:
    """One group's wires."""

    condition: threading.Condition = field(default_factory=threading.Condition)
    members: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)
    wires: dict[tuple[int, int], deque[_Message]] = field(default_factory=dict)

    def wait(self, rank: int, condition: Callable[[], bool]) -> None:
        """Aborting a rank ends its own waits alone."""
        self.condition.wait_for(lambda: rank in self.aborted or condition())
        if rank in self.aborted:
            raise NcclError(5)
        self.condition.notify_all()


_worlds: dict[tuple[int, ...], _World] = {}
_local = threading.local()


def get_unique_id() -> tuple[int, ...]:
    return tuple(secrets.randbelow(256) - 128 for _ in range(128))


def groupStart() -> None:
    _local.group = []


def groupEnd() -> None:
    begun, _local.group = _local.group, None
    _together(begun)


def _together(begun: list[_Begun]) -> None:
    """Nobody waits for somebody to take before having taken what is for itself."""
    for each in begun:
        each.start()
    for each in sorted(begun, key=lambda each: each.sends):
        each.finish()


class NcclCommunicator:
    def __init__(self, ndev: int, commId: tuple[int, ...], rank: int) -> None:
        assert len(commId) == 128
        assert all(-128 <= value < 128 for value in commId)
        self._world, self._rank, self._size = _worlds.setdefault(commId, _World()), rank, ndev
        self.calls: list[tuple[Any, ...]] = []
        with self._world.condition:
            self._world.members.add(rank)
            self._world.wait(rank, lambda: len(self._world.members) == ndev)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._point("send", sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._point("recv", recvbuf, count, datatype, peer, stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self.calls.append(("allGather", count, datatype, stream))
        size = count * _TYPES[datatype].itemsize
        begun = [self._sending(sendbuf, size, peer) for peer in range(self._size)]
        begun += [self._taking(recvbuf + p * size, size, p) for p in range(self._size)]
        _together(begun)

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        self.calls.append(("reduceScatter", recvcount, datatype, stream))
        assert op == 0
        dtype = _TYPES[datatype]
        size = recvcount * dtype.itemsize
        parts = torch.empty(self._size, recvcount, dtype=dtype)
        begun = [self._sending(sendbuf + p * size, size, p) for p in range(self._size)]
        begun += [self._taking(parts[p].data_ptr(), size, p) for p in range(self._size)]
        _together(begun)
        total = parts.float().sum(0).to(dtype)
        ctypes.memmove(recvbuf, total.data_ptr(), size)

    def check_async_error(self) -> None:
        if self._world.aborted - {self._rank}:
            raise KeyError(_REMOTE_ERROR)

    def abort(self) -> None:
        with self._world.condition:
            self._world.aborted.add(self._rank)
            self._world.condition.notify_all()

    def _point(
        self, name: str, buffer: int, count: int, datatype: int, peer: int, stream: int
    ) -> None:
        self.calls.append((name, count, datatype, peer, stream))
        assert 0 <= peer < self._size
        size = count * _TYPES[datatype].itemsize
        make = self._sending if name == "send" else self._taking
        begun = make(buffer, size, peer)
        group = getattr(_local, "group", None)
        if group is not None:
            group.append(begun)
        elif peer == self._rank:
            raise NcclError(5)  # it would wait for itself
        else:
            _together([begun])

    def _sending(self, buffer: int, size: int, peer: int) -> _Begun:
        world, message = self._world, _Message(ctypes.string_at(buffer, size))

        def start() -> None:
            with world.condition:
                world.wires.setdefault((self._rank, peer), deque()).append(message)
                world.condition.notify_all()

        def finish() -> None:
            with world.condition:
                world.wait(self._rank, lambda: message.taken)

        return _Begun(start, finish, sends=True)

    def _taking(self, buffer: int, size: int, peer: int) -> _Begun:
        world = self._world

        def finish() -> None:
            wire = world.wires.setdefault((peer, self._rank), deque())
            with world.condition:
                world.wait(self._rank, lambda: bool(wire))
                message = wire.popleft()
                message.taken = True
                world.condition.notify_all()
            if len(message.payload) != size:
                raise NcclError(4)
            ctypes.memmove(buffer, message.payload, size)

        return _Begun(lambda: None, finish, sends=False)


class Event:
    """Work is done when its call returns, so whoever records one after it need not wait."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


@dataclass(frozen=True)
class _Stream:
    cuda_stream: int = STREAM


def current_stream() -> _Stream:
    return _Stream()


def is_current_stream_capturing() -> bool:
    return False

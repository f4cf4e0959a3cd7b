"""`Fabric` over NCCL, through cupy: calls run on torch's current stream and can be aborted."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serving.gang.fabric import FabricError

# ncclDataType_t and ncclRedOp_t by number: cupy has no name for bfloat16 in all its versions.
_BYTES = 1  # what only moves, moves as bytes
_ADDABLE = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_SUM = 0
_IN_PROGRESS = 7  # ncclResult_t: not an error
_POLL_S = 1.0


def new_unique_id() -> bytes:
    """What the members of one group must share to find each other; made once per group."""
    return bytes(value & 0xFF for value in _cupy_nccl().get_unique_id())


def _cupy_nccl() -> Any:
    from cupy.cuda import nccl

    return nccl


@dataclass(slots=True)
class _Call:
    """The last call that was begun."""

    name: str
    begun: float
    event: Any = None  # after it on its stream; None while the host is inside the call

    @property
    def done(self) -> bool:
        return self.event is not None and bool(self.event.query())


class NcclFabric:
    """One NCCL communicator.

    A call returns when its work is in the stream, not when it is done. So it cannot tell how that
    work ended; `check` can, once the stream has been waited for.

    A watchdog thread polls for asynchronous errors (a dead peer, a broken link) and for a call
    that takes too long. It aborts the communicator then, so that kernels waiting for the peer end,
    and with them whoever waits for the stream. What a CUDA graph replays is no call: whoever
    replays it must watch over it.

    NCCL adds in the dtype of the tensors, in an order that the group's shape determines.
    """

    def __init__(
        self,
        unique_id: bytes,
        rank: int,
        size: int,
        timeout_s: float,
        nccl: Any = None,
        cuda: Any = torch.cuda,
    ) -> None:
        """Joins the group on the current CUDA device; waits until all members have.

        Args:
            timeout_s: longest time from a call's begin to the end of its work.
            nccl: what stands for `cupy.cuda.nccl`, and `cuda` for `torch.cuda`.

        Raises:
            FabricError: the group did not form.
        """
        self.rank = rank
        self.size = size
        self._nccl = nccl = nccl or _cupy_nccl()
        self._cuda = cuda
        self._timeout_s = timeout_s
        signed = tuple(byte - 256 if byte > 127 else byte for byte in unique_id)
        try:
            self._comm = nccl.NcclCommunicator(size, signed, rank)
        except nccl.NcclError as error:
            raise FabricError(f"the communicator did not form: {error}") from error
        self._error: str | None = None
        self._last: _Call | None = None
        self._event = cuda.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="nccl-watchdog", daemon=True).start()

    def send(self, tensor: Tensor, peer: int) -> None:
        with self._call("send") as stream:
            self._comm.send(tensor.data_ptr(), tensor.nbytes, _BYTES, peer, stream)

    def recv(self, tensor: Tensor, peer: int) -> None:
        with self._call("recv") as stream:
            self._comm.recv(tensor.data_ptr(), tensor.nbytes, _BYTES, peer, stream)

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        with self._call("all_gather") as stream:
            self._comm.allGather(tensor.data_ptr(), out.data_ptr(), tensor.nbytes, _BYTES, stream)

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        kind = _ADDABLE[out.dtype]
        with self._call("reduce_scatter") as stream:
            self._comm.reduceScatter(
                tensor.data_ptr(), out.data_ptr(), out.numel(), kind, _SUM, stream
            )

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        with self._call("all_to_all") as stream, self._group():
            for peer, part in enumerate(tensor.split(rows)):
                if part.numel():
                    self._comm.send(part.data_ptr(), part.nbytes, _BYTES, peer, stream)
            for peer, part in enumerate(out.split(out_rows)):
                if part.numel():
                    self._comm.recv(part.data_ptr(), part.nbytes, _BYTES, peer, stream)

    def check(self) -> None:
        if self._error is not None:
            raise FabricError(f"the communicator is gone: {self._error}")

    def abort(self) -> None:
        self._end("it was aborted")

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[int]:
        """The stream to use, under the watchdog's eye."""
        self.check()
        call = self._last = _Call(name, time.monotonic())
        try:
            yield self._cuda.current_stream().cuda_stream
        except (self._nccl.NcclError, KeyError) as error:
            self._last = None
            self.check()  # rather say why it was aborted than that it was
            raise FabricError(f"{name}: {_reason(error)}") from error
        if self._cuda.is_current_stream_capturing():
            self._last = None
        else:
            self._event.record()
            call.event = self._event

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        """Calls that NCCL starts together, lest two ranks wait for each other's second one."""
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def _watch(self) -> None:
        interval = min(_POLL_S, self._timeout_s / 4)
        while not self._closed.wait(interval):
            call = self._last
            late = call is not None and time.monotonic() - call.begun > self._timeout_s
            if call is not None and late and not call.done:
                self._end(f"{call.name} was not done after {self._timeout_s:g} s")
            with self._lock:
                failure = None if self._error else self._failure(self._comm.check_async_error)
            if failure is not None:
                self._end(failure)

    def _failure(self, poll: Callable[[], None]) -> str | None:
        try:
            poll()
        except self._nccl.NcclError as error:
            return _reason(error)
        except KeyError as error:
            return None if error.args == (_IN_PROGRESS,) else _reason(error)
        return None

    def _end(self, reason: str) -> None:
        """The first reason counts; no call begins after it, and those that wait end."""
        with self._lock:
            if self._error is None:
                self._error = reason
                self._closed.set()
                self._comm.abort()


def _reason(error: Exception) -> str:
    """What NCCL said; for results that cupy has no name for, its NcclError is a KeyError."""
    return f"NCCL result {error}" if isinstance(error, KeyError) else str(error)

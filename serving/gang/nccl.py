"""`Fabric` over NCCL, through cupy: calls run on torch's current stream and can be aborted."""

import threading
from typing import Any

import torch
from torch import Tensor

from serving.gang.fabric import FabricError

# ncclDataType_t by number: cupy has no name for bfloat16 in all its versions.
_NCCL_TYPES = {
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_NCCL_SUM = 0
_POLL_S = 1.0


def new_unique_id() -> bytes:
    """What the members of one group must share to find each other; made once per group."""
    from cupy.cuda import nccl

    return bytes(value & 0xFF for value in nccl.get_unique_id())


class NcclFabric:
    """One NCCL communicator.

    A watchdog thread polls for asynchronous errors (a dead peer, a broken link) and aborts the
    communicator when it sees one, so that kernels waiting for that peer end.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        """Joins the group on the current CUDA device; waits until all members have."""
        from cupy.cuda import nccl

        self.rank = rank
        self.size = size
        self._nccl = nccl
        signed = tuple(byte - 256 if byte > 127 else byte for byte in unique_id)
        try:
            self._comm = nccl.NcclCommunicator(size, signed, rank)
        except nccl.NcclError as error:
            raise FabricError(f"communicator did not form: {error}") from error
        self._error: str | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="nccl-watchdog", daemon=True).start()

    def send(self, tensor: Tensor, peer: int) -> None:
        self._call("send", tensor.data_ptr(), tensor.numel(), _kind(tensor), peer, _stream())

    def recv(self, tensor: Tensor, peer: int) -> None:
        self._call("recv", tensor.data_ptr(), tensor.numel(), _kind(tensor), peer, _stream())

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        arguments = (tensor.data_ptr(), out.data_ptr(), tensor.numel(), _kind(tensor), _stream())
        self._call("allGather", *arguments)

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        counts = (out.numel(), _kind(out), _NCCL_SUM, _stream())
        self._call("reduceScatter", tensor.data_ptr(), out.data_ptr(), *counts)

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        self._nccl.groupStart()
        try:
            for peer, part in enumerate(tensor.split(rows)):
                if part.numel():
                    self.send(part, peer)
            for peer, part in enumerate(out.split(out_rows)):
                if part.numel():
                    self.recv(part, peer)
        finally:
            self._nccl.groupEnd()

    def abort(self) -> None:
        self._closed.set()
        with self._lock:
            if self._error is None:
                self._error = "aborted"
                self._comm.abort()

    def _call(self, name: str, *arguments: Any) -> None:
        if self._error is not None:
            raise FabricError(f"{name}: communicator is gone: {self._error}")
        try:
            getattr(self._comm, name)(*arguments)
        except self._nccl.NcclError as error:
            raise FabricError(f"{name}: {error}") from error

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            try:
                self._comm.check_async_error()
            except self._nccl.NcclError as error:
                with self._lock:
                    if self._error is None:
                        self._error = str(error)
                        self._comm.abort()
                return


def _kind(tensor: Tensor) -> int:
    return _NCCL_TYPES[tensor.dtype]


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream

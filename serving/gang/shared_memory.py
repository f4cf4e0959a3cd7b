"""`Fabric` for ranks of one host: tensors pass through shared memory, without the kernel.

A group shares one segment. From every rank to every other runs a *channel* of two slots; a
message longer than a slot goes in chunks. A channel counts the chunks that its writer has
*written* and those that its reader has *taken*: whoever needs a chunk, or room for one, waits
for a count to rise.

A wait looks a few times, giving its core away in between, and then sleeps on sockets to its
peers: they ring when the count has risen, and end when the peer does.

Nothing of this has a name in a file system (see `meeting`). Whatever way the ranks end, the last
one takes the memory with it.
"""

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from serving.gang.fabric import FabricError

SLOT_BYTES = 1 << 20
_YIELD_S = 50e-6  # of looking before sleeping: about what a sleep and a ring cost
_SLOTS = 2
_LINE_WORDS = 8  # a count has a cache line of its own, lest ranks fetch each other's in vain
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_BELL = b"\0"


@dataclass(slots=True)
class _Channel:
    """My end of what runs from me to a peer, or from a peer to me."""

    peer: int
    written: int  # word of the count; the two after it are the bytes of the chunks in the slots
    taken: int
    slots: list[int]  # offsets
    count: int = 0  # chunks that went through this end


_Message = tuple[_Channel, int, int]  # its end of a channel, address and bytes of a tensor


class Plan:
    """Where things are in a segment: lines of counts (numbered by word), then slots."""

    ABORTED = 0

    def __init__(self, size: int) -> None:
        self._size = size
        lines = 1 + size + 2 * size * size
        self._slots_at = -(-lines * _LINE_WORDS * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        # Pages come into being when they are touched: slots that stay empty cost nothing.
        self.total_bytes = self._slots_at + size * size * _SLOTS * SLOT_BYTES

    def awaited(self, rank: int) -> int:
        """Where a sleeping rank says which count it waits for; 0 while it does not sleep."""
        return (1 + rank) * _LINE_WORDS

    def channel(self, source: int, target: int, peer: int) -> _Channel:
        number = source * self._size + target
        line = 1 + self._size + 2 * number
        first = self._slots_at + number * _SLOTS * SLOT_BYTES
        slots = [first + slot * SLOT_BYTES for slot in range(_SLOTS)]
        return _Channel(peer, line * _LINE_WORDS, (line + 1) * _LINE_WORDS, slots)


class SharedMemoryFabric:
    """One rank's end of a group; `serving.gang.meeting` makes it.

    Reductions add in fp32 in rank order and round once, as `GlooFabric` does. `send` returns as
    soon as the rest of the message fits into the channel, so a message over two slots waits for
    its receiver. Calls come from one thread at a time.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        segment: int,
        bells: dict[int, socket.socket],
        timeout_s: float,
    ) -> None:
        """Maps the segment.

        Args:
            segment: file descriptor; closed.
            bells: a connection to each peer, of no other use.
            timeout_s: longest wait for a peer.

        Raises:
            FabricError: the segment is not this user's, or not of the right size.
        """
        self.rank = rank
        self.size = size
        self._plan = plan = Plan(size)
        self._map = _mapped(segment, plan.total_bytes)
        self._words = memoryview(self._map).cast("Q")
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._base = self._bytes.data_ptr()
        self._bells = bells
        self._timeout_s = timeout_s
        self._fence = threading.Lock()
        self._awaited = [plan.awaited(each) for each in range(size)]
        self._gone: set[int] = set()
        self._ears = select.poll()
        self._peer_of = {bell.fileno(): peer for peer, bell in bells.items()}
        for bell in bells.values():
            bell.setblocking(False)
            self._ears.register(bell, select.POLLIN)
        self._to = {peer: plan.channel(rank, peer, peer) for peer in bells}
        self._from = {peer: plan.channel(peer, rank, peer) for peer in bells}

    def send(self, tensor: Tensor, peer: int) -> None:
        self._exchange([(self._to[peer], _address(tensor), tensor.nbytes)], [])

    def recv(self, tensor: Tensor, peer: int) -> None:
        self._exchange([], [(self._from[peer], _address(tensor), tensor.nbytes)])

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        source, target, each = _address(tensor), _address(out), tensor.nbytes
        assert out.nbytes == self.size * each
        ctypes.memmove(target + self.rank * each, source, each)
        self._exchange(
            [(channel, source, each) for channel in self._to.values()],
            [(channel, target + peer * each, each) for peer, channel in self._from.items()],
        )

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        assert tensor.nbytes == self.size * out.nbytes
        self._check()
        source, at_once = _address(tensor), SLOT_BYTES // out.element_size()
        mine = tensor.view(self.size, -1)[self.rank].split(at_once)
        for sums, own in zip(out.view(-1).split(at_once), mine, strict=True):
            for peer, channel in self._to.items():
                self._put(channel, source + peer * out.nbytes, sums.nbytes)
            parts = [own] * self.size
            for peer, channel in self._from.items():
                chunk = self._peek(channel, sums.nbytes)
                parts[peer] = self._bytes[chunk : chunk + sums.nbytes].view(out.dtype)
            _add(sums, parts)
            for channel in self._from.values():
                self._advance(channel, channel.taken)
            source += sums.nbytes

    def all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], rows: list[int]) -> None:
        source, target = _address(tensor), _address(out)
        row = math.prod(tensor.shape[1:]) * tensor.element_size()
        assert (sum(rows) * row, sum(out_rows) * row) == (tensor.nbytes, out.nbytes)
        outgoing, incoming = [], []
        for peer in range(self.size):
            if peer == self.rank:
                ctypes.memmove(target, source, rows[peer] * row)
            else:
                outgoing.append((self._to[peer], source, rows[peer] * row))
                incoming.append((self._from[peer], target, out_rows[peer] * row))
            source += rows[peer] * row
            target += out_rows[peer] * row
        self._exchange(outgoing, incoming)

    def check(self) -> None:
        """Nothing to add: calls wait for their work."""

    def abort(self) -> None:
        self._words[Plan.ABORTED] = 1
        for bell in self._bells.values():
            with contextlib.suppress(OSError):  # its other end may have gone first
                bell.shutdown(socket.SHUT_RDWR)

    def _exchange(self, outgoing: list[_Message], incoming: list[_Message]) -> None:
        """Moves messages chunk by chunk.

        No circle of waiting: the rank that is behind all others finds both room and chunks.
        """
        self._check()
        longest = max(total for _, _, total in (*outgoing, *incoming))
        for start in range(0, longest, SLOT_BYTES):
            for channel, address, total in outgoing:
                if start < total:
                    self._put(channel, address + start, min(SLOT_BYTES, total - start))
            for channel, address, total in incoming:
                if start < total:
                    length = min(SLOT_BYTES, total - start)
                    chunk = self._peek(channel, length)
                    ctypes.memmove(address + start, self._base + chunk, length)
                    self._advance(channel, channel.taken)

    def _put(self, channel: _Channel, address: int, length: int) -> None:
        """Writes a chunk once its slot is free."""
        slot = channel.count % _SLOTS
        self._wait(channel.taken, channel.count + 1 - _SLOTS, channel.peer)
        ctypes.memmove(self._base + channel.slots[slot], address, length)
        self._words[channel.written + 1 + slot] = length
        self._advance(channel, channel.written)

    def _peek(self, channel: _Channel, length: int) -> int:
        """Waits for the next chunk; it stays at the offset returned until the count goes up."""
        slot = channel.count % _SLOTS
        self._wait(channel.written, channel.count + 1, channel.peer)
        found = self._words[channel.written + 1 + slot]
        if found != length:
            self._fail(f"rank {channel.peer} sent {found} bytes instead of {length}")
        return channel.slots[slot]

    def _advance(self, channel: _Channel, word: int) -> None:
        """Raises one of the channel's counts; rings if the peer sleeps until it rises."""
        channel.count += 1
        self._words[word] = channel.count
        self._full_fence()
        if self._words[self._awaited[channel.peer]] == word:
            with contextlib.suppress(OSError):  # gone, as whoever waits for it will see
                self._bells[channel.peer].send(_BELL)

    def _wait(self, word: int, count: int, peer: int) -> None:
        """Returns when a count of the peer's has risen so far."""
        words = self._words
        if words[word] >= count:
            return
        end = time.perf_counter() + _YIELD_S
        while time.perf_counter() < end:
            os.sched_yield()
            if words[word] >= count:
                return
        words[self._awaited[self.rank]] = word
        try:
            self._sleep(word, count, peer)
        finally:
            words[self._awaited[self.rank]] = 0

    def _sleep(self, word: int, count: int, peer: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._full_fence()
            if self._words[word] >= count:
                return
            self._check()
            if peer in self._gone:
                self._fail(f"rank {peer} of the group is gone")
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(f"rank {peer} of the group was silent for {self._timeout_s:g} s")
            for number, _ in self._ears.poll(left * 1e3):
                self._hear(self._peer_of[number])

    def _hear(self, peer: int) -> None:
        """Empties a bell that rang; notes if it was its end."""
        try:
            ended = not self._bells[peer].recv(64)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._gone.add(peer)
            self._ears.unregister(self._bells[peer])

    def _full_fence(self) -> None:
        """Orders my last store before my next load, for the one who sleeps and the one who rings.

        x86-64 does not by itself, but for a locked instruction, and taking a lock is one.
        """
        self._fence.acquire()
        self._fence.release()

    def _check(self) -> None:
        if self._words[Plan.ABORTED]:
            raise FabricError("the group was aborted")

    def _fail(self, message: str) -> NoReturn:
        self.abort()
        raise FabricError(message)


def _mapped(segment: int, total_bytes: int) -> mmap.mmap:
    """The segment's memory, after a look at what it is."""
    try:
        found = os.fstat(segment)
        sealed = fcntl.fcntl(segment, fcntl.F_GET_SEALS) == SEALS
        if found.st_uid != os.getuid() or found.st_size != total_bytes or not sealed:
            raise FabricError("the group's segment is not what it should be")
        return mmap.mmap(segment, total_bytes)
    except OSError as error:
        raise FabricError(f"the group's segment cannot be used: {error}") from error
    finally:
        os.close(segment)


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _add(out: Tensor, parts: list[Tensor]) -> None:
    """`out` becomes the sum of the parts, in their order, in fp32, rounded once."""
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)  # sums in fp32 also if they are shorter
        return
    total = parts[0].float()
    for part in parts[1:]:
        total = total.add(part)
    out.copy_(total)

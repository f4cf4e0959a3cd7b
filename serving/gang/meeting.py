"""How ranks of one host come together to share memory.

A group's leader opens a memory file and a socket with an abstract address, which it offers to
the others. Each gets, over that socket, the file and a connection to every other rank.
"""

import contextlib
import fcntl
import os
import platform
import secrets
import socket
import struct
import time
from pathlib import Path

from serving.gang.fabric import FabricError
from serving.gang.shared_memory import SEALS, Plan, SharedMemoryFabric

MOST_RANKS = 16  # of a group: the leader makes a pair of sockets for every two
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BELL = b"\0"


def host_identity(address: str) -> bytes | None:
    """Equal for two ranks if they can share memory; None where a rank can share none.

    That takes one kernel, one network namespace (abstract addresses are its own) and one user.

    The counts are read and written as plain aligned words, which on x86-64 are single
    instructions, and no store passes an earlier store there, no load an earlier load. Other
    CPUs (aarch64) want barriers for that, which Python does not have.

    Args:
        address: the rank's own; tells apart virtual machines that were cloned while running.
    """
    if platform.machine() != "x86_64":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return None
    return f"{boot} {network} {os.getuid()} {address}".encode()


class Meeting:
    """The leader's side of a group's beginning: a segment, and a place to ask for it."""

    def __init__(self, size: int) -> None:
        """Opens the place.

        Args:
            size: ranks of the group, the leader (rank 0) included; at most MOST_RANKS.

        Raises:
            OSError: this system has no sealed memory files or no abstract addresses.
        """
        self._size = size
        self._segment = os.memfd_create("expertline", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._segment, Plan(size).total_bytes)
        fcntl.fcntl(self._segment, fcntl.F_ADD_SEALS, SEALS)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.address = b"\0expertline-" + secrets.token_hex(16).encode()
        self._listener.bind(self.address)
        self._listener.listen(size)

    def lead(self, timeout_s: float) -> "SharedMemoryFabric":
        """Waits until all members have come, gives them what they need, and is rank 0.

        Raises:
            FabricError: they did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        members: dict[int, socket.socket] = {}
        bells: dict[int, dict[int, socket.socket]] = {rank: {} for rank in range(self._size)}
        try:
            while len(members) < self._size - 1:
                self._listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                member, _ = self._listener.accept()
                if _user_of(member) != os.getuid():
                    member.close()
                    continue
                member.settimeout(max(deadline - time.monotonic(), 1e-3))
                members[member.recv(1)[0]] = member
            for low in range(self._size):
                for high in range(low + 1, self._size):
                    bells[low][high], bells[high][low] = socket.socketpair()
            for rank, member in members.items():
                given = [self._segment, *(bell.fileno() for _, bell in sorted(bells[rank].items()))]
                socket.send_fds(member, [_BELL], given)
        except (OSError, IndexError, KeyError) as error:
            self.close()
            raise FabricError(f"the group did not form: {error}") from error
        finally:
            for closing in (self._listener, *members.values()):
                closing.close()
            for rank in range(1, self._size):  # from here on a bell ends with its rank
                for bell in bells[rank].values():
                    bell.close()
        return SharedMemoryFabric(0, self._size, self._segment, bells[0], timeout_s)

    def abort(self) -> None:
        """Lets `lead` fail at once, from another thread."""
        with contextlib.suppress(OSError):  # it is over
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends a meeting that nobody will lead."""
        self._listener.close()
        os.close(self._segment)


def join(address: bytes, rank: int, size: int, timeout_s: float) -> "SharedMemoryFabric":
    """Goes to the leader's meeting and becomes one of the group's ranks 1, 2, …

    Raises:
        FabricError: no leader of this user was there in time, or what it gave is not a segment.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as leader:
            leader.settimeout(timeout_s)
            leader.connect(address)
            if _user_of(leader) != os.getuid():
                raise FabricError("the group's leader is another user")
            leader.send(bytes([rank]))
            # Without the flag the bells would outlive this rank in a child of its own.
            _, given, _, _ = socket.recv_fds(leader, 1, size, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise FabricError(f"the group did not form: {error}") from error
    if len(given) != size:
        raise FabricError("the group did not form: its leader is gone")
    peers = [peer for peer in range(size) if peer != rank]
    bells = {peer: socket.socket(fileno=fd) for peer, fd in zip(peers, given[1:], strict=True)}
    return SharedMemoryFabric(rank, size, given[0], bells, timeout_s)


def _user_of(connection: socket.socket) -> int:
    size = _PEER_CREDENTIALS.size
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(_PEER_CREDENTIALS.unpack(found)[1])

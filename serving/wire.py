"""Framed messages between Expertline's own processes, over TCP.

A connection opens with a mutual proof of the shared secret; until it is complete nothing of the
peer's is parsed, and a peer that fails it is cut. After it, each side sends frames:

    u32 little-endian length of what follows | u8 kind | msgpack body

The kind is the index of a dataclass in the connection's `Codec`, so both ends agree on a closed
list of types and nothing else can be decoded. A frame over the bound, of an unknown kind or
that does not decode ends its connection and nothing more.

    client → server   magic (4) | client nonce (32)
    server → client   server nonce (32) | HMAC-SHA256(secret, "server" | both nonces)
    client → server   HMAC-SHA256(secret, "client" | both nonces)

The handshake authenticates; it does not encrypt. Internal ports belong on a private network.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

MAGIC = b"XPL1"
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_BUFFERED_BYTES = 256 * 1024 * 1024
HANDSHAKE_TIMEOUT_S = 10.0
UNACKNOWLEDGED_MS = 30_000  # what a peer's kernel has not taken by then, it never will
_LENGTH = struct.Struct("<I")


class WireError(Exception):
    """A connection that is over; the message says why."""


class ProtocolError(WireError):
    """The peer sent what it must not: a wrong proof, or a frame that is not one."""


class Codec:
    """The message types of one kind of connection, in an order both ends share."""

    def __init__(self, *types: type) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._kinds = {cls: bytes([kind]) for kind, cls in enumerate(types)}
        self._decoders: list[Any] = [msgspec.msgpack.Decoder(cls) for cls in types]

    def frame(self, message: Any) -> bytes:
        """A whole frame, ready to be written; to several connections if need be."""
        kind = self._kinds[type(message)]
        body = self._encoder.encode(message)
        if len(body) + 1 > MAX_FRAME_BYTES:
            raise WireError(f"a {type(message).__name__} of {len(body)} bytes exceeds the bound")
        return _LENGTH.pack(len(body) + 1) + kind + body

    def decode(self, frame: bytes) -> Any:
        """The message of a frame (without its length).

        Raises:
            ProtocolError: unknown kind, or a body that is not of the kind's type.
        """
        if not frame or frame[0] >= len(self._decoders):
            raise ProtocolError("frame of unknown kind")
        try:
            return self._decoders[frame[0]].decode(memoryview(frame)[1:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"frame does not decode: {type(error).__name__}") from error


def _proof(secret: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, side + nonces, "sha256")


def _checked_length(header: bytes) -> int:
    length: int = _LENGTH.unpack(header)[0]
    if not 0 < length <= MAX_FRAME_BYTES:
        raise ProtocolError(f"frame length {length} is out of bounds")
    return length


class Channel:
    """One authenticated connection on an asyncio event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._codec = codec
        self.peer: str = str(writer.get_extra_info("peername"))

    def send(self, message: Any) -> None:
        """Queues a message; see `send_frame`."""
        self.send_frame(self._codec.frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Queues a frame made by this connection's codec, in order, without waiting.

        Raises:
            WireError: the connection is closing, or the peer has stopped reading and the
                bound of buffered bytes is passed (the connection is then closed).
        """
        transport = self._writer.transport
        if transport.is_closing():
            raise WireError(f"connection to {self.peer} is closed")
        if transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            transport.abort()
            raise WireError(f"{self.peer} does not read what it is sent")
        self._writer.write(frame)

    async def receive(self) -> Any:
        """The next message.

        Raises:
            WireError: the connection ended, or the peer broke the protocol.
        """
        try:
            length = _checked_length(await self._reader.readexactly(_LENGTH.size))
            return self._codec.decode(await self._reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise WireError(f"connection to {self.peer} ended") from error

    async def close(self) -> None:
        """Sends what is queued and closes; a dead peer does not hold it up."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), HANDSHAKE_TIMEOUT_S)

    def abort(self) -> None:
        """Closes at once; what is queued is lost."""
        self._writer.transport.abort()


async def connect(host: str, port: int, secret: bytes, codec: Codec) -> Channel:
    """Opens and proves a connection.

    Raises:
        WireError: nobody listens, the peer does not know the secret, or it does not answer.
    """
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(host, port), HANDSHAKE_TIMEOUT_S
        )
    except (OSError, TimeoutError) as error:
        raise WireError(f"cannot connect to {host}:{port}") from error
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            nonce = secrets.token_bytes(NONCE_BYTES)
            writer.write(MAGIC + nonce)
            answer = await reader.readexactly(NONCE_BYTES + PROOF_BYTES)
            writer.write(_answer(secret, nonce, answer))
            await writer.drain()
    except BaseException as error:
        writer.transport.abort()
        if isinstance(error, (OSError, TimeoutError, asyncio.IncompleteReadError)):
            raise WireError(f"{host}:{port} did not complete the handshake") from error
        raise
    _tune(writer.get_extra_info("socket"))
    return Channel(reader, writer, codec)


def _answer(secret: bytes, nonce: bytes, answer: bytes) -> bytes:
    """The client's proof, once the server's own has been checked."""
    nonces = nonce + answer[:NONCE_BYTES]
    if not hmac.compare_digest(answer[NONCE_BYTES:], _proof(secret, b"server", nonces)):
        raise ProtocolError("the server does not know the shared secret")
    return _proof(secret, b"client", nonces)


def _tune(sock: socket.socket) -> None:
    """Small frames go out at once; a host that has vanished ends its connections, without a word
    from it, in seconds and not in the quarter of an hour that TCP would try."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class ChannelServer:
    """Listens on one address and hands each proven connection to a handler.

    The handler owns the channel until it returns; the channel is then closed. `rejected`
    counts connections that failed the handshake or broke the protocol later.
    """

    def __init__(
        self, secret: bytes, codec: Codec, handler: Callable[[Channel], Awaitable[None]]
    ) -> None:
        self._secret = secret
        self._codec = codec
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.rejected = 0

    async def start(self, host: str, port: int = 0) -> int:
        """Listens; returns the port (an ephemeral one when `port` is 0)."""
        self._server = await asyncio.start_server(self._accept, host, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stops listening, ends every handler and waits for them."""
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._prove(reader, writer)
            _tune(writer.get_extra_info("socket"))
            await self._handler(Channel(reader, writer, self._codec))
        except (ProtocolError, TimeoutError, asyncio.IncompleteReadError):
            self.rejected += 1
        except (WireError, OSError):
            return  # the peer left; whoever owned the channel has seen it
        except asyncio.CancelledError:
            if self._server is not None and self._server.is_serving():
                raise
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            if await reader.readexactly(len(MAGIC)) != MAGIC:
                raise ProtocolError("not an Expertline peer")
            nonce = secrets.token_bytes(NONCE_BYTES)
            nonces = await reader.readexactly(NONCE_BYTES) + nonce
            writer.write(nonce + _proof(self._secret, b"server", nonces))
            proof = await reader.readexactly(PROOF_BYTES)
            if not hmac.compare_digest(proof, _proof(self._secret, b"client", nonces)):
                raise ProtocolError("the client does not know the shared secret")


class BlockingChannel:
    """The client end for a thread without an event loop; one reader and one writer thread."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self._sock = sock
        self._codec = codec

    @classmethod
    def connect(cls, host: str, port: int, secret: bytes, codec: Codec) -> "BlockingChannel":
        """As the module's `connect`."""
        try:
            sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            raise WireError(f"cannot connect to {host}:{port}") from error
        channel = cls(sock, codec)
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            sock.sendall(MAGIC + nonce)
            sock.sendall(_answer(secret, nonce, channel._read(NONCE_BYTES + PROOF_BYTES)))
        except (OSError, WireError) as error:
            sock.close()
            raise WireError(f"{host}:{port} did not complete the handshake") from error
        _tune(sock)
        sock.settimeout(None)
        return channel

    def send(self, message: Any) -> None:
        """Writes a message, waiting for room if the peer is slow."""
        try:
            self._sock.sendall(self._codec.frame(message))
        except OSError as error:
            raise WireError("connection ended") from error

    def receive(self) -> Any:
        """Waits for the next message; raises WireError when the connection ends."""
        length = _checked_length(self._read(_LENGTH.size))
        return self._codec.decode(self._read(length))

    def close(self) -> None:
        """Closes; a thread inside `receive` wakes with WireError."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, count: int) -> bytes:
        buffer = bytearray(count)
        view, filled = memoryview(buffer), 0
        while filled < count:
            try:
                got = self._sock.recv_into(view[filled:])
            except OSError as error:
                raise WireError("connection ended") from error
            if got == 0:
                raise WireError("connection ended")
            filled += got
        return bytes(buffer)

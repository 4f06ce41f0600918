"""The codec: bytes and fds in, messages out, and back; it reads no socket.

Theory
------
fds travel beside the bytes and belong to the message whose header they came with. A read that took the end of
one message and the start of the next could not tell whose they are; so `Decoder.wanted` says how many bytes the
present message still lacks, and who reads no more than that never meets the question.

A fd is owned by exactly one object, from the moment it is fed: by the decoder, then by its message. `OwnedFd`
closes on drop, so whatever path an error takes, nothing is leaked.

The header is judged before any payload is awaited, so a peer cannot make us wait for what we would refuse.
After an error the decoder is dead: the stream behind a malformed message means nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .messages import (
    FRONTEND_REQUESTS,
    HEADER_BYTES,
    MAX_FDS,
    MAX_PAYLOAD,
    VERSION,
    BackendRequest,
    Flag,
    Request,
    Row,
)
from .payloads import U64, Empty, Payload
from .rules import violation

__all__ = ["Decoder", "Message", "OwnedFd", "Unknown", "encode", "encode_reply"]

_HEADER: Final = struct.Struct("=III")
_FLAGS: Final = 0x3 | int(Flag.REPLY) | int(Flag.NEED_REPLY)


class OwnedFd:
    """A file descriptor that closes when the last reference to this object goes.

    Args:
        fd: from now on this object's alone.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, still owned by this object; -1 when closed or taken."""
        return self._fd

    def take(self) -> int:
        """The descriptor, now the caller's to close."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it, once."""
        fd = self.take()
        if fd >= 0:
            os.close(fd)


@dataclass(frozen=True)
class Unknown(Payload):
    """The payload of a request that the table does not know."""

    data: bytes = b""


@dataclass(frozen=True)
class Message:
    """One request or reply.

    Attributes:
        request: which one; a plain int when the table does not know it.
        payload: what it carries.
        reply: whether it is a reply.
        need_reply: whether its sender wants an answer.
        fds: the fds that came with it; they close with the message unless they are taken.
    """

    request: int
    payload: Payload = field(default_factory=Empty)
    reply: bool = False
    need_reply: bool = False
    fds: tuple[OwnedFd, ...] = ()

    def close(self) -> None:
        """Close the fds that nobody took."""
        for fd in self.fds:
            fd.close()


def encode(request: Request | BackendRequest, payload: Payload | None = None, *, need_reply: bool = False) -> bytes:
    """The bytes of a request; its fds go beside them."""
    return _encode(int(request), payload or Empty(), int(Flag.NEED_REPLY) if need_reply else 0)


def encode_reply(request: int, payload: Payload | None = None) -> bytes:
    """The bytes of a reply to `request`."""
    return _encode(request, payload or Empty(), int(Flag.REPLY))


def _encode(request: int, payload: Payload, flags: int) -> bytes:
    body = payload.pack()
    return _HEADER.pack(request, VERSION | flags, len(body)) + body


class Decoder:
    """Takes one direction of one connection apart.

    Args:
        table: `FRONTEND_REQUESTS` or `BACKEND_REQUESTS`: whose requests, or replies to whose requests.
        replies: whether replies are expected instead of requests.
    """

    def __init__(self, table: Mapping[int, Row], *, replies: bool = False) -> None:
        self._table = table
        self._replies = replies
        self._buffer = bytearray()
        self._fds: list[OwnedFd] = []
        self._header: tuple[int, int, int] | None = None
        self._dead = False

    def __repr__(self) -> str:
        side = "FRONTEND_REQUESTS" if self._table is FRONTEND_REQUESTS else "BACKEND_REQUESTS"
        return f"Decoder({side}{', replies=True' if self._replies else ''})"

    @property
    def wanted(self) -> int:
        """How many bytes the present part of a message still lacks; never 0."""
        if self._header is None:
            return max(1, HEADER_BYTES - len(self._buffer))
        return max(1, self._header[2] - len(self._buffer))

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._header or self._buffer or self._fds)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Iterator[Message]:
        """Take `data`, and `fds` with it, which belong to the message that `data` begins or goes on with.

        Everything is taken at once; the messages that are complete come out of the iterator, and the error of
        a malformed one behind them.

        Raises:
            MessageError: from the iterator, for a malformed message; all its fds are closed.
        """
        self._fds += [OwnedFd(fd) for fd in fds]
        if self._dead:
            self._fds.clear()
            return iter(())
        self._buffer += data
        return self._messages()

    def end(self) -> None:
        """The peer has closed the connection.

        Raises:
            MessageError: in the middle of a message.
        """
        if self.pending and not self._dead:
            have = len(self._buffer) + (HEADER_BYTES if self._header else 0)
            self._kill()
            raise violation("Truncated", f"the connection was closed after {have} bytes of a message")

    def _kill(self) -> None:
        self._dead = True
        self._header = None
        self._buffer.clear()
        for fd in self._fds:
            fd.close()
        self._fds.clear()

    def _messages(self) -> Iterator[Message]:
        while True:
            try:
                message = self._next()
            except BaseException:
                self._kill()
                raise
            if message is None:
                return
            yield message

    def _next(self) -> Message | None:
        if len(self._fds) > MAX_FDS:
            raise violation("FdCount", f"more than {MAX_FDS} fds came with one message")
        if self._header is None:
            if len(self._buffer) < HEADER_BYTES:
                return None
            self._header = self._check_header(*_HEADER.unpack_from(self._buffer))
            del self._buffer[:HEADER_BYTES]
        request, flags, size = self._header
        if len(self._buffer) < size:
            return None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        payload = self._parse(request, flags, body)
        fds, self._fds, self._header = tuple(self._fds), [], None
        return Message(
            request=row.request if (row := self._table.get(request)) else request,
            payload=payload,
            reply=bool(flags & Flag.REPLY),
            need_reply=bool(flags & Flag.NEED_REPLY),
            fds=fds,
        )

    def _name(self, request: int) -> str:
        row = self._table.get(request)
        return f"request {request}" if row is None else row.name

    def _check_header(self, request: int, flags: int, size: int) -> tuple[int, int, int]:
        name = self._name(request)
        if flags & 0x3 != VERSION:
            raise violation("BadVersion", f"{name} has version {flags & 0x3} in its flags {flags:#x}")
        if flags & ~_FLAGS:
            raise violation("ReservedFlags", f"{name} has flags {flags:#x}")
        if bool(flags & Flag.REPLY) != self._replies:
            found = "is marked as a reply where a request" if flags & Flag.REPLY else "is a request where a reply"
            raise violation("ReplyFlag", f"{name} {found} is expected")
        if size > MAX_PAYLOAD:
            raise violation("MessageTooLong", f"{name} announces {size} bytes of payload")
        row = self._table.get(request)
        if row is not None:
            # Which of two reply forms comes (the row's, or a bare number) only its size tells.
            sizes = [kind.sizes() for kind in self._kinds(row)]
            if not any(least <= size <= largest for least, largest in sizes):
                expected = " or ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in sizes)
                raise violation(
                    "PayloadSize", f"{name} announces {size} bytes of payload where {expected} are expected"
                )
        return request, flags, size

    def _kinds(self, row: Row) -> list[type[Payload]]:
        """What the payload of this row can be in this direction."""
        if not self._replies:
            return [row.payload]
        if row.reply is None:
            return [U64]
        return [row.reply, Empty] if row.may_be_empty else [row.reply]

    def _parse(self, request: int, flags: int, body: bytes) -> Payload:
        row = self._table.get(request)
        if row is None:
            # Its fds are closed: nobody can know what they are for.
            for fd in self._fds:
                fd.close()
            self._fds.clear()
            return Unknown(body)
        kinds = [kind for kind in self._kinds(row) if kind.sizes()[0] <= len(body) <= kind.sizes()[1]]
        try:
            payload = kinds[0].parse(body)
        except ValueError as error:
            raise violation("PayloadSize", f"{row.name}: {error}") from error
        least, largest = row.reply_fds if flags & Flag.REPLY else row.fds
        if row.fd_count is not None and not flags & Flag.REPLY:
            least = largest = row.fd_count(payload)
        if not least <= len(self._fds) <= largest:
            expected = f"{least}" if least == largest else f"{least} to {largest}"
            raise violation("FdCount", f"{len(self._fds)} fds came with {row.name} where {expected} are expected")
        return payload

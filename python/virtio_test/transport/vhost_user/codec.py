"""The codec: bytes and fds in, messages out, and back; it reads no socket (see `sockets.frames`)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from virtio_test.sockets.fds import OwnedFd
from virtio_test.sockets.frames import FrameDecoder

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


class Decoder(FrameDecoder[tuple[int, int], Message]):
    """Takes one direction of one connection apart.

    Args:
        table: `FRONTEND_REQUESTS` or `BACKEND_REQUESTS`: whose requests, or replies to whose requests.
        replies: whether replies are expected instead of requests.
    """

    def __init__(self, table: Mapping[int, Row], *, replies: bool = False) -> None:
        super().__init__(header_bytes=HEADER_BYTES, max_fds=MAX_FDS, violation=violation)
        self._table = table
        self._replies = replies

    def __repr__(self) -> str:
        side = "FRONTEND_REQUESTS" if self._table is FRONTEND_REQUESTS else "BACKEND_REQUESTS"
        return f"Decoder({side}{', replies=True' if self._replies else ''})"

    def _name(self, request: int) -> str:
        row = self._table.get(request)
        return f"request {request}" if row is None else row.name

    def _parse_header(self, data: bytes) -> tuple[tuple[int, int], int]:
        request, flags, size = _HEADER.unpack(data)
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
        return (request, flags), size

    def _kinds(self, row: Row) -> list[type[Payload]]:
        """What the payload of this row can be in this direction."""
        if not self._replies:
            return [row.payload]
        if row.reply is None:
            return [U64]
        return [row.reply, Empty] if row.may_be_empty else [row.reply]

    def _parse(self, header: tuple[int, int], body: bytes, fds: tuple[OwnedFd, ...]) -> Message:
        request, flags = header
        reply, need_reply = bool(flags & Flag.REPLY), bool(flags & Flag.NEED_REPLY)
        row = self._table.get(request)
        if row is None:
            # Its fds are closed: nobody can know what they are for.
            for fd in fds:
                fd.close()
            return Message(request, Unknown(body), reply, need_reply)
        kinds = [kind for kind in self._kinds(row) if kind.sizes()[0] <= len(body) <= kind.sizes()[1]]
        try:
            payload = kinds[0].parse(body)
        except ValueError as error:
            raise violation("PayloadSize", f"{row.name}: {error}") from error
        least, largest = row.reply_fds if reply else row.fds
        if row.fd_count is not None and not reply:
            least = largest = row.fd_count(payload)
        if not least <= len(fds) <= largest:
            expected = f"{least}" if least == largest else f"{least} to {largest}"
            raise violation("FdCount", f"{len(fds)} fds came with {row.name} where {expected} are expected")
        return Message(row.request, payload, reply, need_reply, fds)

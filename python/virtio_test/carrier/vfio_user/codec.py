"""The codec: bytes and fds in, messages out, and back; it reads no socket (see `sockets.frames`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, Literal

from virtio_test.sockets.fds import OwnedFd
from virtio_test.sockets.frames import FrameDecoder

from .messages import COMMANDS, HEADER_BYTES, MAX_FDS, MAX_MESSAGE, Flag
from .payloads import Empty, Payload
from .rules import violation

__all__ = ["Decoder", "Message", "OwnedFd", "Unknown", "encode", "encode_error", "encode_reply"]

_HEADER: Final = struct.Struct("=HHIII")
_TYPE: Final = 0xF
# Plain numbers: each message meets them several times, and an `IntFlag` makes an object of each result.
_REPLY: Final = int(Flag.REPLY)
_NO_REPLY: Final = int(Flag.NO_REPLY)
_ERROR: Final = int(Flag.ERROR)
_FLAGS: Final = _TYPE | _NO_REPLY | _ERROR


@dataclass(frozen=True)
class Unknown(Payload):
    """The payload of a command that the table does not know."""

    data: bytes = b""


@dataclass(frozen=True)
class Message:
    """One command or reply.

    Attributes:
        id: the sender's number for a command, repeated in its reply.
        command: which one; a plain int when the table does not know it.
        payload: what it carries.
        reply: whether it is a reply.
        no_reply: whether its sender wants no answer.
        errno: of a reply: why the command failed (0 where that is not said); None when it did not.
        fds: the fds that came with it; they close with the message unless they are taken.
    """

    id: int
    command: int
    payload: Payload = field(default_factory=Empty)
    reply: bool = False
    no_reply: bool = False
    errno: int | None = None
    fds: tuple[OwnedFd, ...] = ()

    @property
    def name(self) -> str:
        """The command's name."""
        return _name(self.command)

    def close(self) -> None:
        """Close the fds that nobody took."""
        for fd in self.fds:
            fd.close()


def _name(command: int) -> str:
    row = COMMANDS.get(command)
    return f"command {command}" if row is None else row.name


def encode(command: int, number: int, payload: Payload | None = None, *, no_reply: bool = False) -> bytes:
    """The bytes of a command with the id `number`; its fds go beside them."""
    return _encode(number, command, _NO_REPLY if no_reply else 0, 0, payload)


def encode_reply(command: int, number: int, payload: Payload | None = None) -> bytes:
    """The bytes of the reply to the command with the id `number`."""
    return _encode(number, command, _REPLY, 0, payload)


def encode_error(command: int, number: int, errno: int) -> bytes:
    """The bytes of a reply that says that the command failed."""
    return _encode(number, command, _REPLY | _ERROR, errno, None)


def _encode(number: int, command: int, flags: int, errno: int, payload: Payload | None) -> bytes:
    body = b"" if payload is None else payload.pack()
    return _HEADER.pack(number, command, HEADER_BYTES + len(body), flags, errno) + body


class Decoder(FrameDecoder[tuple[int, int, int, int], Message]):
    """Takes one direction of one connection apart.

    Args:
        reader: which side reads; it says which commands and replies can come.
    """

    def __init__(self, reader: Literal["server", "client"]) -> None:
        super().__init__(header_bytes=HEADER_BYTES, max_fds=MAX_FDS, violation=violation)
        self._reader = reader

    def __repr__(self) -> str:
        return f"Decoder({self._reader!r})"

    def _parse_header(self, data: bytes) -> tuple[tuple[int, int, int, int], int]:
        number, command, size, flags, errno = _HEADER.unpack(data)
        name, kind = _name(command), flags & _TYPE
        if kind > _REPLY:
            raise violation("MessageType", f"{name} has type {kind} in its flags {flags:#x}")
        reply = kind == _REPLY
        if flags & ~_FLAGS or flags & (_NO_REPLY if reply else _ERROR):
            raise violation("ReservedFlags", f"a {'reply to' if reply else 'command'} {name} has flags {flags:#x}")
        if size > MAX_MESSAGE:
            raise violation("MessageTooLong", f"{name} announces {size} bytes")
        row = COMMANDS.get(command)
        if row is None:
            if reply:
                raise violation("UnexpectedReply", f"a reply to {name}, which is none of the protocol")
            least, largest = HEADER_BYTES, MAX_MESSAGE
        else:
            if row.from_server != (reply == (self._reader == "server")):
                what = "reply to" if reply else "command"
                raise violation("Direction", f"a {what} {name} came to the {self._reader}")
            kinds = Empty if flags & _ERROR else row.reply if reply else row.payload
            least, largest = (HEADER_BYTES + bound for bound in kinds.sizes())
        if not least <= size <= largest:
            expected = f"{least}" if least == largest else f"{least} to {largest}"
            raise violation("MessageSize", f"{name} announces {size} bytes where {expected} are expected")
        return (number, command, flags, errno), size - HEADER_BYTES

    def _parse(self, header: tuple[int, int, int, int], body: bytes, fds: tuple[OwnedFd, ...]) -> Message:
        number, command, flags, errno = header
        reply, no_reply = flags & _TYPE == _REPLY, bool(flags & _NO_REPLY)
        row = COMMANDS.get(command)
        if row is None:
            # Its fds are closed: nobody can know what they are for.
            for fd in fds:
                fd.close()
            return Message(number, command, Unknown(body), no_reply=no_reply)
        kind = Empty if flags & _ERROR else row.reply if reply else row.payload
        try:
            payload = kind.parse(body)
        except ValueError as error:
            raise violation("MessageSize", f"{_name(command)}: {error}") from error
        have = len(fds)
        if not reply and row.fd_counts is not None:
            legal = have in row.fd_counts(payload)
        else:
            least, largest = (0, 0) if flags & _ERROR else row.reply_fds if reply else row.fds
            legal = least <= have <= largest
        if not legal:
            raise violation("FdCount", f"{have} fds came with {'a reply to ' if reply else ''}{row.name}")
        failed = errno if flags & _ERROR else None
        return Message(number, row.command, payload, reply=reply, no_reply=no_reply, errno=failed, fds=fds)

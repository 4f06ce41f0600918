"""The codec: bytes and fds in, messages out, and back; it reads no socket.

Theory
------
fds travel beside the bytes and belong to the message whose first byte they came with. `Decoder.wanted` says how
many bytes the present part of a message still lacks; who reads no more than that never sees fds of the next one.
Each fd is owned by exactly one object from the moment it is fed, and closes with it, whatever path an error takes.

The header is judged before any payload is awaited, so a peer cannot make us wait for, or keep, what we would
refuse. After an error the decoder is dead: the stream behind a malformed message means nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from virtio_test.transport.vhost_user.codec import OwnedFd

from .messages import COMMANDS, HEADER_BYTES, MAX_FDS, MAX_MESSAGE, Flag, Row
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


class Decoder:
    """Takes one direction of one connection apart.

    Args:
        reader: which side reads; it says which commands and replies can come.
    """

    def __init__(self, reader: Literal["server", "client"]) -> None:
        self._reader = reader
        self._buffer = bytearray()
        self._fds: list[OwnedFd] = []
        self._header: tuple[int, int, int, int, int] | None = None
        self._dead = False

    def __repr__(self) -> str:
        return f"Decoder({self._reader!r})"

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

    def close(self) -> None:
        """Take nothing more, and close the fds of a message that has not ended."""
        self._kill()

    def _kill(self) -> None:
        self._dead = True
        self._header = None
        self._buffer.clear()
        for fd in self._fds:
            fd.close()
        self._fds.clear()

    def _messages(self) -> Iterator[Message]:
        while not self._dead:
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
            number, command, size, flags, errno = _HEADER.unpack_from(self._buffer)
            self._check_header(command, size, flags)
            self._header = number, command, size - HEADER_BYTES, flags, errno
            del self._buffer[:HEADER_BYTES]
        number, command, size, flags, errno = self._header
        if len(self._buffer) < size:
            return None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        row = COMMANDS.get(command)
        payload = self._parse(row, command, flags, body)
        fds, self._fds, self._header = tuple(self._fds), [], None
        return Message(
            id=number,
            command=command if row is None else row.command,
            payload=payload,
            reply=flags & _TYPE == _REPLY,
            no_reply=bool(flags & _NO_REPLY),
            errno=errno if flags & _ERROR else None,
            fds=fds,
        )

    def _check_header(self, command: int, size: int, flags: int) -> None:
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

    def _parse(self, row: Row | None, command: int, flags: int, body: bytes) -> Payload:
        if row is None:
            # Its fds are closed: nobody can know what they are for.
            for fd in self._fds:
                fd.close()
            self._fds.clear()
            return Unknown(body)
        reply = flags & _TYPE == _REPLY
        kind = Empty if flags & _ERROR else row.reply if reply else row.payload
        try:
            payload = kind.parse(body)
        except ValueError as error:
            raise violation("MessageSize", f"{_name(command)}: {error}") from error
        have = len(self._fds)
        if not reply and row.fd_counts is not None:
            legal = have in row.fd_counts(payload)
        else:
            least, largest = (0, 0) if flags & _ERROR else row.reply_fds if reply else row.fds
            legal = least <= have <= largest
        if not legal:
            raise violation("FdCount", f"{have} fds came with {'a reply to ' if reply else ''}{row.name}")
        return payload

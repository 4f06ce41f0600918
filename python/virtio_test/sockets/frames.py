"""Messages of one header each, taken out of a stream of bytes and fds; no socket is read here.

Theory
------
fds travel beside the bytes and belong to the message whose first byte they came with. A read that took the end of
one message and the start of the next could not tell whose they are; so `FrameDecoder.wanted` says how many bytes
the present part of a message still lacks, and who reads no more than that never meets the question.

The header is judged before any payload is awaited, so a peer cannot make us wait for, or keep, what we would
refuse. After an error the decoder is dead: the stream behind a malformed message means nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from virtio_test.errors import MessageError

from .fds import OwnedFd

__all__ = ["FrameDecoder"]

_H = TypeVar("_H")
_M = TypeVar("_M")


class FrameDecoder(ABC, Generic[_H, _M]):
    """Takes one direction of one connection apart; a protocol says what a header and a message are.

    Args:
        header_bytes: how long a header is.
        max_fds: most fds of one message.
        violation: makes the protocol's error of a rule's name and a text; the rules are FdCount and Truncated.
    """

    def __init__(self, *, header_bytes: int, max_fds: int, violation: Callable[[str, str], MessageError]) -> None:
        self.violation = violation
        self._header_bytes = header_bytes
        self._max_fds = max_fds
        self._buffer = bytearray()
        self._fds: list[OwnedFd] = []
        self._header: tuple[_H, int] | None = None
        self._cut = False
        self._dead = False

    @abstractmethod
    def _parse_header(self, data: bytes) -> tuple[_H, int]:
        """A header that may come here, and how many bytes follow it."""

    @abstractmethod
    def _parse(self, header: _H, body: bytes, fds: tuple[OwnedFd, ...]) -> _M:
        """The message, which owns `fds`; they close if this raises."""

    @property
    def wanted(self) -> int:
        """How many bytes the present part of a message still lacks; never 0."""
        size = self._header_bytes if self._header is None else self._header[1]
        return max(1, size - len(self._buffer))

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._header or self._buffer or self._fds)

    def feed(self, data: bytes, fds: Sequence[int] = (), *, cut: bool = False) -> Iterator[_M]:
        """Take `data`, and `fds` with it, which belong to the message that `data` begins or goes on with.

        Everything is taken at once; the messages that are complete come out of the iterator, and the error of
        a malformed one behind them. `cut` says that more fds came than are given here.

        Raises:
            MessageError: from the iterator, for a malformed message; all its fds are closed.
        """
        self._fds += [OwnedFd(fd) for fd in fds]
        if self._dead:
            self._fds.clear()
            return iter(())
        self._cut = cut
        self._buffer += data
        return self._messages()

    def end(self) -> None:
        """The peer has closed the connection.

        Raises:
            MessageError: in the middle of a message.
        """
        if self.pending:
            have = len(self._buffer) + (self._header_bytes if self._header else 0)
            self.close()
            raise self.violation("Truncated", f"the connection was closed after {have} bytes of a message")

    def close(self) -> None:
        """Take nothing more, and close the fds of a message that has not ended."""
        self._dead = True
        self._header = None
        self._buffer.clear()
        for fd in self._fds:
            fd.close()
        self._fds.clear()

    def _messages(self) -> Iterator[_M]:
        while not self._dead:
            try:
                message = self._next()
            except BaseException:
                self.close()
                raise
            if message is None:
                return
            yield message

    def _next(self) -> _M | None:
        if self._cut:
            raise self.violation("FdCount", "more fds came than could be taken")
        if len(self._fds) > self._max_fds:
            raise self.violation("FdCount", f"more than {self._max_fds} fds came with one message")
        if self._header is None:
            if len(self._buffer) < self._header_bytes:
                return None
            self._header = self._parse_header(bytes(self._buffer[: self._header_bytes]))
            del self._buffer[: self._header_bytes]
        header, size = self._header
        if len(self._buffer) < size:
            return None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        message = self._parse(header, body, tuple(self._fds))
        self._fds, self._header = [], None
        return message

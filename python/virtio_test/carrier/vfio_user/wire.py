"""One end of a connection: a UNIX stream socket and the codec over it; server and client use it alike."""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
import time
from collections.abc import Sequence
from typing import Literal

from virtio_test.sockets.fds import EVENTFD, Received, kernel_name, receive, send

from .codec import Decoder, Message
from .rules import violation

__all__ = ["Wire"]


class Wire:
    """Reads exactly as far as the present message goes, so that its fds are known, and sends whole messages.

    Args:
        connection: from now on this object's.
        reader: which side we are.
        patience: seconds that a peer may take to read what it is sent.

    Attributes:
        closed: whether the peer has closed the connection, or it failed.
    """

    def __init__(
        self, connection: socket.socket, reader: Literal["server", "client"], *, patience: float = 1.0
    ) -> None:
        connection.settimeout(0.0)
        self._socket = connection
        self._decoder = Decoder(reader)
        self._patience = patience
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self.closed = False

    def fileno(self) -> int:
        """The socket's fd."""
        return self._socket.fileno()

    def wait(self, seconds: float) -> bool:
        """Wait until something can be read; whether it can."""
        return bool(self._poll.poll(max(0.0, seconds) * 1000))

    def receive(self) -> list[Message] | None:
        """One part of a message, if it is there: the message that it completes, if any. None: nothing is there.

        Raises:
            MessageError: malformed, or broken off.
        """
        try:
            data, fds, cut = receive(self._socket, self._decoder.wanted, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            data, fds, cut = Received(b"")
        messages = self._decoder.feed(data, fds, cut=cut)
        for fd in fds:
            _check_kind(fd)
        if not data:
            self.closed = True
            self._decoder.end()
            return None
        return list(messages)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of `data`, with `fds` beside its first byte. From any thread.

        Raises:
            MessageError: RepliesUnread, the peer does not read; the connection is of no use any more.
        """
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        with self._sending:
            try:
                sent = self._send_some(data, fds, flags)
                if sent < len(data):
                    self._send_rest(data, sent, fds, flags)
            except (TimeoutError, BlockingIOError):
                raise violation("RepliesUnread", f"{len(data)} bytes cannot be sent") from None
            except OSError:
                # Its end is read next.
                return

    def _send_some(self, data: bytes, fds: Sequence[int], flags: int) -> int:
        try:
            return send(self._socket, data, fds, flags)
        except BlockingIOError:
            return 0

    def _send_rest(self, data: bytes, sent: int, fds: Sequence[int], flags: int) -> None:
        end = time.monotonic() + self._patience
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        view = memoryview(data)
        while sent < len(data):
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            # The fds have gone with the first byte.
            sent += self._send_some(bytes(view[sent:]), () if sent else fds, flags)

    def close(self) -> None:
        """Close the socket, and fds that came with half a message."""
        self.closed = True
        self._decoder.close()
        self._socket.close()


def _check_kind(fd: int) -> None:
    """Refuse what could hold a peer's own end of this connection: kept by us, it would keep the connection for ever.

    Sockets can, and so can other things that are no files.

    Raises:
        MessageError: FdType.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFCHR, stat.S_IFIFO):
        return
    if (name := kernel_name(fd)) != EVENTFD:
        raise violation("FdType", f"the fd is {name!r}")

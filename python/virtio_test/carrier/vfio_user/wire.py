"""One end of a connection: a UNIX stream socket and the codec over it; server and client use it alike."""

from __future__ import annotations

import array
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from .codec import Decoder, Message
from .rules import violation

__all__ = ["Wire"]

_FD_SPACE: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)
"""What Linux carries beside one write (SCM_MAX_FD): room for all, so that none is cut off unseen."""


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
            data, ancillary, flags, _ = self._socket.recvmsg(
                self._decoder.wanted, _FD_SPACE, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            data, ancillary, flags = b"", [], 0
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        messages = self._decoder.feed(data, fds)
        for fd in fds:
            _check_kind(fd)
        if flags & socket.MSG_CTRUNC:
            raise violation("FdCount", "more fds came than could be taken")
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
            if not fds:
                return self._socket.send(data, flags)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            return self._socket.sendmsg([data], ancillary, flags)
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
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    if target != "anon_inode:[eventfd]":
        # The name of a file is the peer's choice: quoted, so that it is one line of a log.
        raise violation("FdType", f"the fd is {target!r}")

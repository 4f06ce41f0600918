"""File descriptors that come and go beside the bytes of a UNIX socket.

Each fd is owned by exactly one object from the moment it is fed to a decoder: by the decoder, then by its message.
`OwnedFd` closes on drop, so whatever path an error takes, nothing is leaked.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["EVENTFD", "OwnedFd", "Received", "kernel_name", "receive", "send"]

_SPACE: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)
"""What Linux carries beside one write (SCM_MAX_FD): room for all, so that none is cut off unseen."""

EVENTFD: Final = "anon_inode:[eventfd]"
"""`kernel_name` of an eventfd."""


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


class Received(NamedTuple):
    """What one read gave.

    Attributes:
        data: the bytes; none when the peer has closed the connection.
        fds: the fds beside them, now the caller's.
        cut: whether there were more fds than could be taken.
    """

    data: bytes
    fds: Sequence[int] = ()
    cut: bool = False


def receive(connection: socket.socket, size: int, flags: int = 0) -> Received:
    """Read up to `size` bytes, with the fds beside them.

    Raises:
        OSError: as the socket does.
    """
    data, ancillary, found, _ = connection.recvmsg(size, _SPACE, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return Received(data, fds, bool(found & socket.MSG_CTRUNC))


def send(connection: socket.socket, data: bytes, fds: Sequence[int], flags: int) -> int:
    """Send bytes, and fds beside the first of them; how many bytes went.

    Raises:
        OSError: as the socket does.
    """
    if not fds:
        return connection.send(data, flags)
    # Not `socket.send_fds`, which loses the flags.
    return connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)


def kernel_name(fd: int) -> str:
    """What the kernel calls an open file. A path is the peer's choice: quote it, so that it is one line of a log."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())

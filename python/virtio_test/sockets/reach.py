"""Connecting to a server that may have others waiting already."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

__all__ = ["reach"]

_WAIT: Final = struct.Struct("ll")


def reach(path: str | os.PathLike[str], *, timeout: float) -> socket.socket:
    """A connection to whoever listens at `path`; `timeout` in seconds, for one that has others waiting already.

    Raises:
        BlockingIOError: others waited there all the time.
        OSError: nobody listens there.
        ValueError: it is no path.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Python's own timeout does not wait for a place among those that wait. 0 would be no bound at all.
    microseconds = max(1, int(timeout * 1e6))
    bound = _WAIT.pack(microseconds // 1_000_000, microseconds % 1_000_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
    try:
        connection.connect(os.fsencode(path))
    except BaseException:
        connection.close()
        raise
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WAIT.pack(0, 0))
    return connection

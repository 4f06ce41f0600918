"""The front-end's sockets: bytes and fds out, whole messages in, every wait bounded.

Theory
------
A socket is read exactly as far as the present message goes, so its fds are known (see `sockets.frames`). The bound
holds for a whole message: a peer that sends a byte now and then cannot make us wait longer than one that sends none.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from virtio_test.errors import PeerDisconnected, PeerTimeout
from virtio_test.sockets.fds import receive, send
from virtio_test.sockets.reach import reach

from .codec import Decoder, Message
from .messages import HEADER_BYTES
from .rules import violation

__all__ = ["Wire", "connect"]


def connect(path: str | os.PathLike[str], *, timeout: float = 10.0) -> socket.socket:
    """A connection to whoever listens at `path`; `timeout` in seconds, for one that has others waiting already.

    Raises:
        PeerDisconnected: nobody does, or the path is no path of a socket; one line.
    """
    try:
        return reach(path, timeout=timeout)
    except (OSError, ValueError) as error:
        why = "others wait there already" if isinstance(error, BlockingIOError) else _reason(error)
        raise PeerDisconnected(f"no back-end at {os.fspath(path)}: {why}") from None


def _reason(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)


class Wire:
    """One socket, with what its bytes mean.

    Args:
        connection: a connected UNIX stream socket, ours from now on.
        decoder: takes apart what arrives.
        timeout: seconds that sending or receiving one message may take.
    """

    def __init__(self, connection: socket.socket, decoder: Decoder, *, timeout: float) -> None:
        self.socket = connection
        self.timeout = timeout
        self._decoder = decoder

    def __repr__(self) -> str:
        return f"<Wire {self.socket.fileno()}>"

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and fds beside the first of them.

        Raises:
            PeerTimeout: the other side takes nothing.
            PeerDisconnected: it has closed the connection.
        """
        try:
            self.socket.settimeout(self.timeout)
            sent = send(self.socket, data, fds, socket.MSG_NOSIGNAL)
            if sent < len(data):
                self.socket.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise PeerTimeout(f"the back-end took nothing for {self.timeout:g} s") from None
        except OSError as error:
            raise PeerDisconnected(f"the back-end has closed the connection: {_reason(error)}") from None

    def answer(self, data: bytes) -> None:
        """Send without waiting: whoever asks has to read.

        Raises:
            MessageError: RepliesUnread.
        """
        try:
            self.socket.settimeout(0.0)
            sent = self.socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            # It asked and left: that shows where the next message is read.
            return
        if sent < len(data):
            raise violation("RepliesUnread", "the back-end does not read what its own requests are answered with")

    def receive(self) -> Message:
        """The next message, whole.

        Raises:
            PeerTimeout: it did not come in time.
            PeerDisconnected: the other side has closed the connection.
            MessageError: it is malformed.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            message = self._read(deadline)
            if message is not None:
                return message
            if time.monotonic() > deadline:
                raise PeerTimeout(f"the back-end did not end its message within {self.timeout:g} s")

    def take(self) -> Message | None:
        """The next message if one has begun, without waiting for its beginning; raises as `receive`."""
        while self.waiting:
            message = self._read(time.monotonic() + self.timeout)
            if message is not None:
                return message
        return None

    @property
    def waiting(self) -> bool:
        """Whether there is something to read, or will be nothing any more."""
        try:
            self.socket.settimeout(0.0)
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def check_silent(self) -> None:
        """Nothing has been asked, so nothing may come.

        Raises:
            MessageError: UnexpectedReply.
            PeerDisconnected: the other side has closed the connection.
        """
        try:
            self.socket.settimeout(0.0)
            data = self.socket.recv(HEADER_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerDisconnected(f"the back-end has closed the connection: {_reason(error)}") from None
        if not data:
            raise PeerDisconnected("the back-end has closed the connection")
        raise violation("UnexpectedReply", f"{data.hex(' ')} … came from the back-end, which was asked nothing")

    def _read(self, deadline: float) -> Message | None:
        try:
            # A moment at least: 0 would mean not to wait at all.
            self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
            data, fds, cut = receive(self.socket, self._decoder.wanted)
        except TimeoutError:
            raise PeerTimeout(f"the back-end did not answer within {self.timeout:g} s") from None
        except OSError as error:
            raise PeerDisconnected(f"the back-end has closed the connection: {_reason(error)}") from None
        if not data:
            self._decoder.end()
            raise PeerDisconnected("the back-end has closed the connection")
        return next(self._decoder.feed(data, fds, cut=cut), None)

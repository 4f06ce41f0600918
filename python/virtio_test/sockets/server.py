"""A server of one peer at a time.

Theory
------
Another peer that connects meanwhile waits in the socket's backlog and is served when the first has gone. Whatever
ends a connection ends only that, and the next peer finds the server as the first did.
"""

from __future__ import annotations

import logging
import os
import socket
from abc import ABC, abstractmethod
from typing import Final, Self

from virtio_test.clock import Timer
from virtio_test.errors import MessageError
from virtio_test.loop import OwnerLoop

from .endpoint import Endpoint

__all__ = ["PeerServer"]

_ACCEPT_AGAIN_SECONDS: Final = 0.1


class PeerServer(ABC):
    """Accepts one peer after the other and watches its connection; a protocol says what is done with it.

    Args:
        path: listen here (mode 0600); or
        fd: a UNIX stream socket that the launcher gave, listening or connected.
        loop: the owner loop.
        peer: what a peer is called in the log.
        log: where connections are logged.

    Attributes:
        loop: the owner loop.
        last_error: what ended the last connection that did not end by itself.
        sessions: how many peers have come.

    Raises:
        InvalidArgument: the path or fd cannot be used; one line.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, *, fd: int | None, loop: OwnerLoop, peer: str, log: logging.Logger
    ) -> None:
        self.loop = loop
        self.last_error: MessageError | None = None
        self.sessions = 0
        self._peer = peer
        self._log = log
        self._connection_fd: int | None = None
        self._accept_again: Timer | None = None
        self._endpoint = Endpoint(path, fd=fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _begin(self, connection: socket.socket) -> None:
        """Take a connection, which is the protocol's from now on."""

    @abstractmethod
    def _readable(self) -> None:
        """The connection has something to read, or its peer has gone."""

    @abstractmethod
    def _end(self) -> None:
        """Close the connection, and leave nothing of its peer's."""

    @property
    def finished(self) -> bool:
        """Whether no peer can come any more: the one connection that was given has ended, or we are closed."""
        return self._connection_fd is None and self._endpoint.listener is None

    def close(self) -> None:
        """End the connection, stop listening, and remove the socket's file if it is still ours."""
        self._disconnect()
        if self._accept_again is not None:
            self._accept_again.stop()
        if self._endpoint.listener is not None:
            self.loop.remove_reader(self._endpoint.listener.fileno())
        self._endpoint.close()

    def _start(self) -> None:
        if self._endpoint.connected is not None:
            self._connected(self._endpoint.connected)
        else:
            self._listen()

    def _listen(self) -> None:
        if self._endpoint.listener is not None:
            self.loop.add_reader(self._endpoint.listener.fileno(), self._accept)

    def _accept(self) -> None:
        listener = self._endpoint.listener
        if listener is None or self._connection_fd is not None:
            return
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of fds, for one: the peer waits in the backlog, where it stays readable, until there are some.
            if self._accept_again is None:
                self._log.warning("a %s cannot be accepted now: %s", self._peer, error.strerror)
            self.loop.remove_reader(listener.fileno())
            self._accept_again = Timer(self.loop.clock, self._listen, first_after=_ACCEPT_AGAIN_SECONDS)
            return
        self._accept_again = None
        # The next one is looked at when this one has gone.
        self.loop.remove_reader(listener.fileno())
        self._connected(accepted)

    def _connected(self, accepted: socket.socket) -> None:
        self._begin(accepted)
        self._connection_fd = accepted.fileno()
        self.sessions += 1
        self.loop.add_reader(self._connection_fd, self._readable)
        self._log.info("%s %d is connected", self._peer, self.sessions)

    def _disconnect(self, error: MessageError | None = None) -> None:
        gone, self._connection_fd = self._connection_fd, None
        if gone is None:
            return
        self.loop.remove_reader(gone)
        if error is not None:
            # Without the frames in which it was raised: they hold the connection, and what that holds.
            self.last_error = error.with_traceback(None)
            self._log.warning("the connection of %s %d is ended: %s", self._peer, self.sessions, error)
        try:
            self._end()
        finally:
            self._endpoint.connected = None
            self._listen()
        self._log.info("%s %d has gone", self._peer, self.sessions)
        if self.finished:
            self.loop.stop()

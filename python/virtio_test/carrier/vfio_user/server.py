"""The vfio-user server: a PCI function served to one client after the other.

Theory
------
One client at a time. Another that connects meanwhile waits in the socket's backlog and is served when the first
has gone. Whatever ends a connection ends only that: its memory is unmapped, its fds are closed, the function is
reset, and the next client finds the server as the first did.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, Self

from virtio_test.clock import Timer
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.interface import PciEndpoint
from virtio_test.transport.vhost_user.endpoint import Endpoint

from .connection import Connection
from .session import Session

__all__ = ["VfioUserServer", "serve"]

_log: Final = logging.getLogger("virtio_test.vfio_user")
_ACCEPT_AGAIN_SECONDS: Final = 0.1


class VfioUserServer:
    """Serves `endpoint` over a UNIX socket.

    Args:
        endpoint: the PCI function; its guest memory is the client's, so it must be empty.
        path: listen here (mode 0600); or
        fd: a UNIX stream socket that the launcher gave, listening or connected.
        loop: the endpoint's own loop; to say so.
        patience: seconds that a client may take to answer one access to memory that it does not share. QEMU
            waits 5 s for us, so it should be less.

    Attributes:
        last_error: what ended the last connection that did not end by itself.
        sessions: how many clients have come.

    Raises:
        InvalidArgument: the path, the fd or the endpoint cannot be used; one line.
    """

    def __init__(
        self,
        endpoint: PciEndpoint,
        *,
        path: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        loop: OwnerLoop | None = None,
        patience: float = 2.0,
    ) -> None:
        if loop is not None and loop is not endpoint.loop:
            raise InvalidArgument("the loop is not the endpoint's own: give none, or that one")
        if endpoint.memory.regions:
            raise InvalidArgument("the endpoint has guest memory already, and clients bring theirs: give it none")
        self.endpoint = endpoint
        self.loop = endpoint.loop
        self.last_error: MessageError | None = None
        self.sessions = 0
        self._patience = patience
        self._connection: Connection | None = None
        self._listening = Endpoint(path, fd=fd)
        self._accept_again: Timer | None = None
        if self._listening.connected is not None:
            self._connected(self._listening.connected)
        else:
            self._listen()

    def __repr__(self) -> str:
        return f"<VfioUserServer of {self.endpoint!r}, {'connected' if self._connection else 'waiting'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def session(self) -> Session | None:
        """The session of the present client."""
        return None if self._connection is None else self._connection.session

    @property
    def finished(self) -> bool:
        """Whether no client can come any more: the one connection that was given has ended, or we are closed."""
        return self._connection is None and self._listening.listener is None

    def close(self) -> None:
        """End the connection, stop listening, and remove the socket's file if it is still ours."""
        self._disconnect(None)
        if self._accept_again is not None:
            self._accept_again.stop()
        if self._listening.listener is not None:
            self.loop.remove_reader(self._listening.listener.fileno())
        self._listening.close()

    # --- connections ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listening.listener is not None:
            self.loop.add_reader(self._listening.listener.fileno(), self._accept)

    def _accept(self) -> None:
        listener = self._listening.listener
        if listener is None or self._connection is not None:
            return
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of fds, for one: the client waits in the backlog, where it stays readable, until there are some.
            if self._accept_again is None:
                _log.warning("a client cannot be accepted now: %s", error.strerror)
            self.loop.remove_reader(listener.fileno())
            self._accept_again = Timer(self.loop.clock, self._listen, first_after=_ACCEPT_AGAIN_SECONDS)
            return
        self._accept_again = None
        # The next one is looked at when this one has gone.
        self.loop.remove_reader(listener.fileno())
        self._connected(accepted)

    def _connected(self, accepted: socket.socket) -> None:
        connection = Connection(accepted, self.endpoint, ended=self._ended, patience=self._patience)
        self._connection = connection
        self.sessions += 1
        self.loop.add_reader(connection.fileno(), self._readable)
        _log.info("client %d is connected", self.sessions)

    def _readable(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            alive = connection.readable()
        except MessageError as error:
            self._disconnect(error)
        else:
            if not alive:
                self._disconnect(connection.error)

    def _ended(self) -> None:
        """A connection turned out to be dead; it may have been ended since."""
        if self._connection is not None and self._connection.dead:
            self._disconnect(self._connection.error)

    def _disconnect(self, error: MessageError | None) -> None:
        gone, self._connection = self._connection, None
        if gone is None:
            return
        self.loop.remove_reader(gone.fileno())
        if error is not None:
            # Without the frames in which it was raised: they hold the connection, and what that holds.
            self.last_error = error.with_traceback(None)
            _log.warning("the connection of client %d is ended: %s", self.sessions, error)
        try:
            gone.close()
        finally:
            self._listening.connected = None
            self._listen()
        _log.info("client %d has gone", self.sessions)
        if self.finished:
            self.loop.stop()


def serve(
    endpoint: PciEndpoint,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    patience: float = 2.0,
    ready: Callable[[VfioUserServer], object] | None = None,
) -> None:
    """Serve `endpoint` until SIGINT or SIGTERM, or until the connection that `fd` is has ended.

    To be called in the main thread. What happens to connections is logged as ``virtio_test.vfio_user``.

    Args:
        endpoint: the PCI function; its loop runs.
        path: listen here; or
        fd: a UNIX stream socket that the launcher gave.
        patience: see `VfioUserServer`.
        ready: called once clients can connect.

    Raises:
        InvalidArgument: see `VfioUserServer`.
    """
    # Signals first and last: the socket's file is there for no moment in which one of them could end the process.
    with (
        _stopped_by_signals(endpoint.loop),
        VfioUserServer(endpoint, path=path, fd=fd, patience=patience) as server,
    ):
        if ready is not None:
            ready(server)
        endpoint.loop.run()


@contextmanager
def _stopped_by_signals(loop: OwnerLoop) -> Generator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(_number: int, _frame: object) -> None:
        loop.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

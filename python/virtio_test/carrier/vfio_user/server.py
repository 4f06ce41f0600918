"""The vfio-user server: a PCI function served to one client after the other.

Theory
------
One client at a time (see `sockets.server`). When a connection ends its memory is unmapped, its fds are closed and
the function is reset.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.loop import OwnerLoop, stopped_by_signals
from virtio_test.sockets.server import PeerServer
from virtio_test.transport.pci.interface import PciEndpoint

from .connection import Connection
from .session import Session

__all__ = ["VfioUserServer", "serve"]

_log: Final = logging.getLogger("virtio_test.vfio_user")


class VfioUserServer(PeerServer):
    """Serves `endpoint` over a UNIX socket.

    Args:
        endpoint: the PCI function; its guest memory is the client's, so it must be empty.
        path: listen here (mode 0600); or
        fd: a UNIX stream socket that the launcher gave, listening or connected.
        loop: the endpoint's own loop; to say so.
        patience: seconds that a client may take to answer one access to memory that it does not share. QEMU
            waits 5 s for us, so it should be less.

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
        super().__init__(path, fd=fd, loop=endpoint.loop, peer="client", log=_log)
        self.endpoint = endpoint
        self._patience = patience
        self._connection: Connection | None = None
        self._start()

    def __repr__(self) -> str:
        return f"<VfioUserServer of {self.endpoint!r}, {'connected' if self._connection else 'waiting'}>"

    @property
    def session(self) -> Session | None:
        """The session of the present client."""
        return None if self._connection is None else self._connection.session

    def _begin(self, connection: socket.socket) -> None:
        self._connection = Connection(connection, self.endpoint, ended=self._ended, patience=self._patience)

    def _end(self) -> None:
        gone, self._connection = self._connection, None
        if gone is not None:
            gone.close()

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
        stopped_by_signals(endpoint.loop),
        VfioUserServer(endpoint, path=path, fd=fd, patience=patience) as server,
    ):
        if ready is not None:
            ready(server)
        endpoint.loop.run()

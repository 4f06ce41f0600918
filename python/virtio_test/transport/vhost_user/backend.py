"""The vhost-user back-end: a device served to one front-end after the other.

Theory
------
The socket is read exactly as far as the present message goes, so its fds are known (see `sockets.frames`). A request is
answered before anything else is done; what it set in motion runs in the owner loop afterwards. Nothing waits for
the front-end: one that does not read its replies is disconnected.

One front-end at a time (see `sockets.server`). When a connection ends its memory is unmapped, its fds are closed and
the device is reset.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Policy
from virtio_test.clock import Clock
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.features import FeatureSet, check_own_offer
from virtio_test.loop import OwnerLoop, stopped_by_signals
from virtio_test.sockets.fds import Received, receive, send
from virtio_test.sockets.server import PeerServer

from .codec import Decoder, Message
from .messages import FRONTEND_REQUESTS, ProtocolFeature
from .rules import violation
from .session import SUPPORTED, Session

__all__ = ["DEFAULT_PROTOCOL_FEATURES", "Backend", "serve"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_PARTS_PER_TURN: Final = 64
"""Reads of one turn of the loop, so that a front-end that never stops talking starves nobody."""

DEFAULT_PROTOCOL_FEATURES: Final = SUPPORTED & ~ProtocolFeature.INBAND_NOTIFICATIONS
"""What is offered unless told otherwise. With in-band notifications UML would send every kick as a message and
wait for its answer; the protocol itself advises against them where fds can be had."""


class Backend(PeerServer):
    """Serves `device` over a UNIX socket; it is the device's `Bus`.

    Args:
        device: what is served; it is attached at once, so its timers start.
        path: listen here (mode 0600); or
        fd: a UNIX stream socket that the launcher gave, listening or connected.
        loop: the owner loop; one on the monotonic clock when None.
        features: what is offered instead of all that the device can.
        protocol_features: protocol features that are offered.
        policy: tolerances towards the driver's rings.
        memory: what the front-end's memory is mapped into, without regions now; a new one when None.

    Raises:
        InvalidArgument: the path or fd cannot be used, or features are offered that the device does not have, or
            that may not be offered; one line.
    """

    def __init__(
        self,
        device: Device,
        *,
        path: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        loop: OwnerLoop | None = None,
        features: FeatureSet | None = None,
        protocol_features: ProtocolFeature = DEFAULT_PROTOCOL_FEATURES,
        policy: Policy = Policy.interop,
        memory: GuestMemory | None = None,
    ) -> None:
        offered = device.features if features is None else features
        # The device IOTLB is the transport's, whatever the device: it is offered to whoever asks for it.
        if extra := offered - device.features - FeatureSet("ACCESS_PLATFORM"):
            raise InvalidArgument(f"the device does not have the features {extra}; it has {device.features}")
        check_own_offer(offered, requires=device.requires)
        if memory is not None and memory.regions:
            raise InvalidArgument(
                f"the memory has regions of its own: {memory.regions}; the front-end brings all of it"
            )
        if foreign := protocol_features & ~SUPPORTED:
            raise InvalidArgument(f"protocol features {foreign!r} are not served here; those served are {SUPPORTED!r}")
        owner = OwnerLoop() if loop is None else loop
        super().__init__(path, fd=fd, loop=owner, peer="front-end", log=_log)
        self.device = device
        self._offered = offered
        self._protocol_features = protocol_features
        self._policy = policy
        self._memory = GuestMemory() if memory is None else memory
        self._session: Session | None = None
        self._socket: socket.socket | None = None
        self._decoder = Decoder(FRONTEND_REQUESTS)
        try:
            device.attach(self)
        except BaseException:
            self.close()
            raise
        self._start()

    def __repr__(self) -> str:
        return f"<Backend of {self.device!r}, {'connected' if self._socket else 'waiting'}>"

    @property
    def session(self) -> Session | None:
        """The session of the present front-end."""
        return self._session

    # --- the device's bus -----------------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        """See `Bus.memory`; empty while no front-end shares any."""
        return self._memory

    @property
    def clock(self) -> Clock:
        """See `Bus.clock`."""
        return self.loop.clock

    def call(self, queue_index: int) -> None:
        """See `Bus.call`."""
        if self._session is not None:
            self._session.rings.call(queue_index)

    def kick(self, queue_index: int) -> None:
        """See `Bus.kick`."""
        session = self._session
        if session is not None:
            session.rings.kick(queue_index)

    def config_changed(self) -> None:
        """See `Bus.config_changed`."""
        if self._session is not None:
            self._session.config_changed()

    def broken(self, error: Exception) -> None:
        """See `Bus.broken`."""
        if self._session is not None:
            self._session.rings.fail(error)

    # --- connections ----------------------------------------------------------------------------------------

    def _begin(self, connection: socket.socket) -> None:
        connection.settimeout(0.0)
        self._socket = connection
        self._decoder = Decoder(FRONTEND_REQUESTS)
        self._session = Session(
            self.device,
            self._memory,
            self.loop,
            offered=self._offered,
            protocol_features=self._protocol_features,
            policy=self._policy,
        )

    def _end(self) -> None:
        gone, self._socket = self._socket, None
        session, self._session = self._session, None
        try:
            if session is not None:
                session.close()
        finally:
            if gone is not None:
                gone.close()
            self._decoder.close()

    def _readable(self) -> None:
        try:
            for _ in range(_PARTS_PER_TURN):
                if self._socket is None or not self._read_part(self._socket):
                    return
        except MessageError as error:
            self._disconnect(error)

    def _read_part(self, connection: socket.socket) -> bool:
        """Read one part of one message; whether there may be more.

        Raises:
            MessageError: malformed, or refused in a way that ends the connection.
        """
        try:
            data, fds, cut = receive(connection, self._decoder.wanted, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.info("front-end %d: %s", self.sessions, error.strerror)
            data, fds, cut = Received(b"")
        messages = self._decoder.feed(data, fds, cut=cut)
        if not data:
            self._decoder.end()
            self._disconnect()
            return False
        for message in messages:
            self._answer(connection, message)
        return self._socket is not None

    def _answer(self, connection: socket.socket, message: Message) -> None:
        session = self._session
        if session is None:
            return
        try:
            _refuse_own_sockets(connection, message)
            reply = session.handle(message)
        finally:
            # Before the answer: who has read it finds nothing of the message left.
            message.close()
        fds, session.reply_fds = session.reply_fds, []
        if reply is None:
            return
        try:
            sent = send(connection, reply, [fd.fileno() for fd in fds], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # Its end of the connection is read next, and ends the session.
            _log.info("front-end %d: %s", self.sessions, error.strerror)
            return
        finally:
            for fd in fds:
                fd.close()
        if sent != len(reply):
            raise violation("RepliesUnread", f"the answer to request {message.request} cannot be sent")


def _refuse_own_sockets(connection: socket.socket, message: Message) -> None:
    """A front-end's end of a connection to us, kept by us, would never end: not even when the front-end has.

    Raises:
        MessageError: FdType.
    """
    for fd in message.fds:
        if stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode):
            with socket.socket(fileno=os.dup(fd.fileno())) as given:
                try:
                    peer = given.getpeername()
                except OSError:
                    continue
            if peer and given.family == socket.AF_UNIX and peer == connection.getsockname():
                raise violation("FdType", "the fd is one of a connection to this back-end")


def serve(
    device: Device,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    loop: OwnerLoop | None = None,
    features: FeatureSet | None = None,
    protocol_features: ProtocolFeature = DEFAULT_PROTOCOL_FEATURES,
    policy: Policy = Policy.interop,
    memory: GuestMemory | None = None,
    ready: Callable[[Backend], object] | None = None,
) -> None:
    """Serve `device` until SIGINT or SIGTERM, or until the connection that `fd` is has ended.

    To be called in the main thread. The device prints through its own console; what happens to connections is
    logged as ``virtio_test.vhost_user``.

    Args:
        device: what is served.
        path: listen here; or
        fd: a UNIX stream socket that the launcher gave.
        loop: the owner loop; one on the monotonic clock when None.
        features: what is offered instead of all that the device can.
        protocol_features: protocol features that are offered.
        policy: tolerances towards the driver's rings.
        memory: what the front-end's memory is mapped into, without regions now; a new one when None.
        ready: called once front-ends can connect.

    Raises:
        InvalidArgument: see `Backend`.
    """
    owner = OwnerLoop() if loop is None else loop
    # Signals first and last: the socket's file is there for no moment in which one of them could end the process.
    with (
        stopped_by_signals(owner),
        Backend(
            device,
            path=path,
            fd=fd,
            loop=owner,
            features=features,
            protocol_features=protocol_features,
            policy=policy,
            memory=memory,
        ) as backend,
    ):
        if ready is not None:
            ready(backend)
        owner.run()

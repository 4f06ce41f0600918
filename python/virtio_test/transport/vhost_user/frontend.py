"""A small vhost-user front-end: it shares memory, sets rings up and speaks every message of the table.

It waits for each answer, bounded; it asks for an acknowledgement of every request as soon as REPLY_ACK is
negotiated, so a refused request is an error at the place that sent it. `send` takes a payload, fds and flags as
they are, so that wrong messages are as easy to send as right ones.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Final, Self

from virtio_test._core import GuestMemory, Notifier, QueueConfig, Region
from virtio_test.errors import PeerDisconnected, PeerTimeout, StateError
from virtio_test.features import FeatureSet

from .codec import Decoder, Message, encode, encode_reply
from .messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    MAX_FDS,
    PROTOCOL_FEATURES_BIT,
    ProtocolFeature,
    Request,
)
from .payloads import U64, Config, MemoryRegion, MemoryTable, Payload, SingleRegion, VringAddress, VringState
from .rules import violation

__all__ = ["USER_OFFSET", "FrontEnd", "FrontEndRing", "ring_address"]

USER_OFFSET: Final = 0x7000_0000_0000
"""What this front-end adds to a guest address to make its "user address": nobody can take one for the other."""

_PROTOCOL: Final = 1 << PROTOCOL_FEATURES_BIT
_WORD64: Final = (1 << 64) - 1
_FD_SPACE: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_F = ProtocolFeature
_WANTED: Final = (
    _F.MQ | _F.REPLY_ACK | _F.BACKEND_REQ | _F.CONFIG | _F.RESET_DEVICE | _F.CONFIGURE_MEM_SLOTS | _F.STATUS
)


class FrontEndRing:
    """The notifiers of one ring, from the front-end's side.

    Attributes:
        config: the queue's configuration, in guest addresses.
        kick: wakes the back-end.
        call: readable when the back-end has used buffers.
        error: readable when the back-end has stopped the ring.
    """

    def __init__(self, config: QueueConfig, *, call: Notifier | None = None) -> None:
        self.config = config
        self.kick = Notifier.eventfd()
        self.call = Notifier.eventfd() if call is None else call
        self.error = Notifier.eventfd()

    def __repr__(self) -> str:
        return f"<FrontEndRing {self.config.index}>"


class FrontEnd:
    """One connection to a back-end.

    Args:
        path: where the back-end listens; or
        connection: a connected UNIX stream socket, ours from now on.
        timeout: seconds that an answer may take.

    Raises:
        PeerDisconnected: nobody listens at `path`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        connection: socket.socket | None = None,
        timeout: float = 10.0,
    ) -> None:
        if (path is None) == (connection is None):
            raise StateError("a front-end needs either a path or a connection")
        if connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(os.fspath(path or ""))
            except OSError as error:
                connection.close()
                raise PeerDisconnected(f"no back-end at {os.fspath(path or '')}: {error.strerror}") from None
        connection.settimeout(timeout)
        self.socket = connection
        self.timeout = timeout
        self.features = FeatureSet()
        self.protocol = ProtocolFeature(0)
        self.rings: dict[int, FrontEndRing] = {}
        self._replies = Decoder(FRONTEND_REQUESTS, replies=True)
        self._requests = Decoder(BACKEND_REQUESTS)
        self._channel: socket.socket | None = None

    def __repr__(self) -> str:
        return f"<FrontEnd, features {self.features}, protocol {self.protocol!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave: close the connection and the channel."""
        self.socket.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # --- messages -------------------------------------------------------------------------------------------

    def send(
        self,
        request: Request,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        """Send one request as it is given, and wait for nothing."""
        self.send_bytes(encode(request, payload, need_reply=need_reply), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and fds beside the first of them."""
        try:
            sent = socket.send_fds(self.socket, [data], list(fds), socket.MSG_NOSIGNAL)
            if sent < len(data):
                self.socket.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise PeerTimeout(f"the back-end took nothing for {self.timeout} s") from None
        except OSError as error:
            raise PeerDisconnected(f"the back-end has closed the connection: {error.strerror}") from None

    def receive(self) -> Message:
        """The next reply.

        Raises:
            PeerTimeout: none came in time.
            PeerDisconnected: the back-end has closed the connection.
            MessageError: it is malformed.
        """
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(self._replies.wanted, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                raise PeerTimeout(f"the back-end did not answer within {self.timeout} s") from None
            except OSError as error:
                raise PeerDisconnected(f"the back-end has closed the connection: {error.strerror}") from None
            if not data:
                self._replies.end()
                raise PeerDisconnected("the back-end has closed the connection")
            for message in self._replies.feed(data, _fds(ancillary)):
                return message

    def request(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> Message | None:
        """Send a request and wait for its answer; None for one that has none, without REPLY_ACK.

        Raises:
            MessageError: Refused, the answer is a number other than 0.
            PeerTimeout, PeerDisconnected, MessageError: see `receive`.
        """
        row = FRONTEND_REQUESTS[int(request)]
        need_reply = row.reply is None and bool(self.protocol & _F.REPLY_ACK)
        self.send(request, payload, fds, need_reply=need_reply)
        if row.reply is None and not need_reply:
            return None
        reply = self.receive()
        if reply.request != int(request):
            raise violation("UnexpectedReply", f"a reply to request {reply.request}, where {row.name} was asked")
        if row.reply is None and isinstance(reply.payload, U64) and reply.payload.value:
            raise violation("Refused", f"{row.name} was refused with {reply.payload.value}")
        return reply

    def number(self, request: Request) -> int:
        """Send a request whose reply is one number."""
        reply = self.request(request)
        assert reply is not None
        assert isinstance(reply.payload, U64)
        return reply.payload.value

    # --- negotiation ----------------------------------------------------------------------------------------

    def negotiate(
        self,
        wanted: FeatureSet | None = None,
        *,
        protocol_features: ProtocolFeature = _WANTED,
        protocol_bit: bool = True,
    ) -> FeatureSet:
        """Take up ownership, negotiate both kinds of features and open the channel for back-end requests.

        Args:
            wanted: features to accept of those offered; all of them when None.
            protocol_features: protocol features to take of those offered.
            protocol_bit: set bit 30 in SET_FEATURES; without it rings are enabled at once.

        Returns:
            The accepted features.
        """
        self.request(Request.SET_OWNER)
        bits = self.number(Request.GET_FEATURES)
        if bits & _PROTOCOL:
            offered = ProtocolFeature(self.number(Request.GET_PROTOCOL_FEATURES))
            self.set_protocol_features(offered & protocol_features)
        if self.protocol & _F.BACKEND_REQ:
            self.open_channel()
        accepted = FeatureSet.from_bits(bits & ~_PROTOCOL)
        self.set_features(accepted if wanted is None else accepted & wanted, protocol_bit=protocol_bit)
        return self.features

    def set_protocol_features(self, chosen: ProtocolFeature) -> None:
        """SET_PROTOCOL_FEATURES."""
        self.request(Request.SET_PROTOCOL_FEATURES, U64(int(chosen)))
        self.protocol = chosen

    def set_features(self, features: FeatureSet, *, protocol_bit: bool = True) -> None:
        """SET_FEATURES."""
        bits = (features.bits & _WORD64) | (_PROTOCOL if protocol_bit else 0)
        self.request(Request.SET_FEATURES, U64(bits))
        self.features = features

    def open_channel(self) -> None:
        """Make a socket pair and give one end to the back-end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.request(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        if self._channel is not None:
            self._channel.close()
        self._channel = ours
        self._requests = Decoder(BACKEND_REQUESTS)

    # --- memory ---------------------------------------------------------------------------------------------

    def share(self, memory: GuestMemory) -> None:
        """SET_MEM_TABLE with all regions of `memory`, which are memfds."""
        regions = [_shared(region) for region in memory.regions]
        self.request(Request.SET_MEM_TABLE, MemoryTable(tuple(each for each, _ in regions)), [fd for _, fd in regions])

    def add_region(self, region: Region) -> None:
        """ADD_MEM_REG."""
        each, fd = _shared(region)
        self.request(Request.ADD_MEM_REG, SingleRegion(each.guest, each.size, each.user, each.offset), [fd])

    def remove_region(self, region: Region) -> None:
        """REM_MEM_REG."""
        each, _ = _shared(region)
        self.request(Request.REM_MEM_REG, SingleRegion(each.guest, each.size, each.user, each.offset))

    # --- rings ----------------------------------------------------------------------------------------------

    def setup_ring(self, config: QueueConfig, *, base: int = 0, call: Notifier | None = None) -> FrontEndRing:
        """Everything that a ring needs but SET_VRING_ENABLE; the order is QEMU's.

        Args:
            config: sizes and guest addresses.
            base: the value of SET_VRING_BASE.
            call: where the back-end notifies us; an eventfd when None.
        """
        ring = FrontEndRing(config, call=call)
        index = config.index
        self.rings[index] = ring
        self.request(Request.SET_VRING_NUM, VringState(index, config.size))
        self.request(Request.SET_VRING_BASE, VringState(index, base))
        self.request(Request.SET_VRING_ADDR, ring_address(config))
        self.request(Request.SET_VRING_ERR, U64(index), [ring.error.fileno()])
        self.request(Request.SET_VRING_KICK, U64(index), [ring.kick.fileno()])
        self.request(Request.SET_VRING_CALL, U64(index), [ring.call.fileno()])
        return ring

    def enable(self, index: int, *, on: bool = True) -> None:
        """SET_VRING_ENABLE."""
        self.request(Request.SET_VRING_ENABLE, VringState(index, int(on)))

    def get_base(self, index: int) -> int:
        """GET_VRING_BASE: the ring stops."""
        reply = self.request(Request.GET_VRING_BASE, VringState(index))
        assert reply is not None
        assert isinstance(reply.payload, VringState)
        return reply.payload.num

    def kick_inband(self, index: int) -> None:
        """VRING_KICK: a kick as a message."""
        self.request(Request.VRING_KICK, VringState(index))

    # --- configuration space and status ---------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG.

        Raises:
            MessageError: Refused, the back-end answered with an empty payload.
        """
        reply = self.request(Request.GET_CONFIG, Config(offset, size, 0, bytes(size)))
        assert reply is not None
        if not isinstance(reply.payload, Config):
            raise violation("Refused", f"GET_CONFIG of {size} bytes at {offset} was refused")
        return reply.payload.data

    def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """SET_CONFIG."""
        self.request(Request.SET_CONFIG, Config(offset, len(data), flags, data))

    def get_status(self) -> int:
        """GET_STATUS."""
        return self.number(Request.GET_STATUS)

    def set_status(self, status: int) -> None:
        """SET_STATUS."""
        self.request(Request.SET_STATUS, U64(status))

    # --- requests of the back-end ---------------------------------------------------------------------------

    def backend_requests(self, *, timeout: float = 0.0, answer: int = 0) -> list[Message]:
        """What the back-end has asked for since the last call, each answered with `answer` where it wants one.

        Args:
            timeout: seconds to wait for the first.
            answer: 0 for success.
        """
        found: list[Message] = []
        if self._channel is None:
            return found
        while True:
            self._channel.settimeout(timeout if not found and not self._requests.pending else 0.0)
            try:
                data, ancillary, _, _ = self._channel.recvmsg(self._requests.wanted, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, TimeoutError):
                return found
            except ConnectionResetError:
                return found
            if not data:
                return found
            for message in self._requests.feed(data, _fds(ancillary)):
                found.append(message)
                if message.need_reply:
                    self._channel.sendall(encode_reply(message.request, U64(answer)))


def ring_address(config: QueueConfig) -> VringAddress:
    """The addresses of a queue as this front-end writes them."""
    return VringAddress(
        config.index,
        0,
        config.desc + USER_OFFSET,
        config.device + USER_OFFSET,
        config.driver + USER_OFFSET,
    )


def _shared(region: Region) -> tuple[MemoryRegion, int]:
    if region.fd is None:
        raise StateError(f"the region at {region.address:#x} is anonymous memory and cannot be shared; use memfd")
    user = region.address + USER_OFFSET
    return MemoryRegion(region.address, region.size, user, region.offset), region.fd


def _fds(ancillary: Sequence[tuple[int, int, bytes]]) -> Sequence[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return fds

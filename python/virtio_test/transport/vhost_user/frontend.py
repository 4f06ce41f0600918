"""A small vhost-user front-end: it shares memory, sets rings up and speaks every message of the table.

It waits for each answer, bounded; it asks for an acknowledgement of every request as soon as REPLY_ACK is
negotiated, so a refused request is an error at the place that sent it. `send` takes a payload, fds and flags as
they are, so that wrong messages are as easy to send as right ones.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Self

from virtio_test._core import DirtyLog, GuestMemory, Notifier, QueueConfig, Region
from virtio_test.errors import MessageError, PeerDisconnected, PeerTimeout, StateError
from virtio_test.features import FeatureSet

from .codec import Decoder, Message, encode, encode_reply
from .inflight import InflightRegion
from .messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    LOG_ALL_BIT,
    PROTOCOL_FEATURES_BIT,
    VRING_LOG,
    IotlbType,
    Permission,
    ProtocolFeature,
    Request,
)
from .payloads import (
    U64,
    Config,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringState,
)
from .rules import violation
from .wire import Wire, connect

__all__ = ["USER_OFFSET", "FrontEnd", "FrontEndRing", "ring_address"]

USER_OFFSET: Final = 0x7000_0000_0000
"""What this front-end adds to a guest address to make its "user address": nobody can take one for the other."""

_PROTOCOL: Final = 1 << PROTOCOL_FEATURES_BIT
_LOG_ALL: Final = 1 << LOG_ALL_BIT
_WORD64: Final = (1 << 64) - 1
_MOST_REQUESTS: Final = 64
_F = ProtocolFeature
_WANTED: Final = (
    _F.MQ
    | _F.LOG_SHMFD
    | _F.REPLY_ACK
    | _F.BACKEND_REQ
    | _F.CONFIG
    | _F.RESET_DEVICE
    | _F.CONFIGURE_MEM_SLOTS
    | _F.STATUS
)


class FrontEndRing:
    """The notifiers of one ring, from the front-end's side.

    Attributes:
        config: the queue's configuration, in guest addresses.
        kick: wakes the back-end.
        call: readable when the back-end has used buffers.
        error: readable when the back-end has stopped the ring.
    """

    def __init__(self, config: QueueConfig, *, kick: Notifier | None = None, call: Notifier | None = None) -> None:
        self.config = config
        self.kick = Notifier.eventfd() if kick is None else kick
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

    Attributes:
        features: the accepted features.
        protocol: the negotiated protocol features.
        logging: whether the back-end marks what it writes (LOG_ALL).
        guest_offset: what is added to an address of our memory to make the guest physical address that regions are
            shared with. It is 0, unless addresses are those of an IOMMU (ACCESS_PLATFORM): then only logs know it.

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
        if path is not None:
            connection = connect(path, timeout=timeout)
        assert connection is not None
        self.socket = connection
        self.timeout = timeout
        self.features = FeatureSet()
        self.protocol = ProtocolFeature(0)
        self.logging = False
        self.guest_offset = 0
        self.rings: dict[int, FrontEndRing] = {}
        self.channel: Wire | None = None
        self._wire = Wire(connection, Decoder(FRONTEND_REQUESTS, replies=True), timeout=timeout)

    def __repr__(self) -> str:
        return f"<FrontEnd, features {self.features}, protocol {self.protocol!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave: close the connection and the channel."""
        self._wire.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

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
        """Send bytes, and fds beside the first of them.

        Raises:
            PeerTimeout: the back-end takes nothing.
            PeerDisconnected: it has closed the connection.
        """
        self._wire.send(data, fds)

    def receive(self) -> Message:
        """The next reply.

        Raises:
            PeerTimeout: none came in time.
            PeerDisconnected: the back-end has closed the connection.
            MessageError: it is malformed.
        """
        return self._wire.receive()

    def check_silent(self) -> None:
        """Nothing has been asked, so nothing may have come.

        Raises:
            MessageError: UnexpectedReply.
            PeerDisconnected: the back-end has closed the connection.
        """
        self._wire.check_silent()

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
        try:
            reply = self.receive()
        except PeerTimeout:
            raise PeerTimeout(f"the back-end did not answer {row.name} within {self.timeout:g} s") from None
        except PeerDisconnected:
            raise PeerDisconnected(f"the back-end closed the connection instead of answering {row.name}") from None
        if reply.request != int(request):
            # Whoever keeps the error keeps what it was raised over.
            reply.close()
            raise violation("UnexpectedReply", f"a reply to request {reply.request}, where {row.name} was asked")
        if (row.reply is None or row.refusable) and isinstance(reply.payload, U64) and reply.payload.value:
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
        accepted = FeatureSet.from_bits(bits & ~(_PROTOCOL | _LOG_ALL))
        self.set_features(accepted if wanted is None else accepted & wanted, protocol_bit=protocol_bit)
        return self.features

    def set_protocol_features(self, chosen: ProtocolFeature) -> None:
        """SET_PROTOCOL_FEATURES."""
        self.request(Request.SET_PROTOCOL_FEATURES, U64(int(chosen)))
        self.protocol = chosen

    def set_features(self, features: FeatureSet, *, protocol_bit: bool = True, log: bool = False) -> None:
        """SET_FEATURES; with `log` the back-end marks the pages that it writes."""
        bits = (features.bits & _WORD64) | (_PROTOCOL if protocol_bit else 0) | (_LOG_ALL if log else 0)
        self.request(Request.SET_FEATURES, U64(bits))
        self.features = features
        self.logging = log

    @property
    def translated(self) -> bool:
        """Whether addresses are those of an IOMMU."""
        return "ACCESS_PLATFORM" in self.features

    def open_channel(self) -> None:
        """Make a socket pair and give one end to the back-end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self.request(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        if self.channel is not None:
            self.channel.close()
        self.channel = Wire(ours, Decoder(BACKEND_REQUESTS), timeout=self.timeout)

    # --- memory ---------------------------------------------------------------------------------------------

    def share(self, memory: GuestMemory) -> None:
        """SET_MEM_TABLE with all regions of `memory`, which are memfds."""
        regions = [self._shared(region) for region in memory.regions]
        self.request(Request.SET_MEM_TABLE, MemoryTable(tuple(each for each, _ in regions)), [fd for _, fd in regions])

    def add_region(self, region: Region) -> None:
        """ADD_MEM_REG."""
        each, fd = self._shared(region)
        self.request(Request.ADD_MEM_REG, SingleRegion(each.guest, each.size, each.user, each.offset), [fd])

    def remove_region(self, region: Region) -> None:
        """REM_MEM_REG."""
        each, _ = self._shared(region)
        self.request(Request.REM_MEM_REG, SingleRegion(each.guest, each.size, each.user, each.offset))

    def _shared(self, region: Region) -> tuple[MemoryRegion, int]:
        if region.fd is None:
            raise StateError(f"the region at {region.address:#x} is anonymous memory and cannot be shared; use memfd")
        guest, user = region.address + self.guest_offset, region.address + USER_OFFSET
        return MemoryRegion(guest, region.size, user, region.offset), region.fd

    # --- dirty log and IOTLB --------------------------------------------------------------------------------

    def set_log(self, log: DirtyLog) -> None:
        """SET_LOG_BASE: the log that is marked while LOG_ALL is set."""
        self.request(Request.SET_LOG_BASE, Log(log.size, 0), [log.fd])

    def log_rings(self) -> None:
        """SET_VRING_ADDR of every ring again, which says whether its used ring is marked too."""
        for index in sorted(self.rings):
            self.request(Request.SET_VRING_ADDR, self.ring_address(self.rings[index].config))

    def update_iotlb(self, iova: int, size: int, address: int, permission: Permission) -> None:
        """IOTLB_MSG: the device finds `size` bytes from `address` of our memory on at `iova`.

        Raises:
            MessageError: Refused.
        """
        entry = Iotlb(iova, size, address + USER_OFFSET, int(permission), int(IotlbType.UPDATE))
        self.request(Request.IOTLB_MSG, entry)

    def invalidate_iotlb(self, iova: int, size: int) -> None:
        """IOTLB_MSG: the device finds nothing at these addresses any more; once this returns it uses none of them."""
        self.request(Request.IOTLB_MSG, Iotlb(iova, size, 0, 0, int(IotlbType.INVALIDATE)))

    # --- rings ----------------------------------------------------------------------------------------------

    def setup_ring(
        self, config: QueueConfig, *, base: int = 0, kick: Notifier | None = None, call: Notifier | None = None
    ) -> FrontEndRing:
        """Everything that a ring needs but SET_VRING_ENABLE; the order is QEMU's.

        Args:
            config: sizes and guest addresses.
            base: the value of SET_VRING_BASE.
            kick: where we notify the back-end; an eventfd when None.
            call: where the back-end notifies us; an eventfd when None.
        """
        ring = FrontEndRing(config, kick=kick, call=call)
        index = config.index
        self.rings[index] = ring
        self.request(Request.SET_VRING_NUM, VringState(index, config.size))
        self.request(Request.SET_VRING_BASE, VringState(index, base))
        self.request(Request.SET_VRING_ADDR, self.ring_address(config))
        self.request(Request.SET_VRING_ERR, U64(index), [ring.error.fileno()])
        # The kick fd starts the ring, and libvhost-user calls at once: QEMU has given it a call fd long before.
        self.request(Request.SET_VRING_CALL, U64(index), [ring.call.fileno()])
        self.request(Request.SET_VRING_KICK, U64(index), [ring.kick.fileno()])
        return ring

    def ring_address(self, config: QueueConfig) -> VringAddress:
        """The addresses of a queue for this connection: the driver's own where they are an IOMMU's; and how to log."""
        address = ring_address(config, offset=0 if self.translated else USER_OFFSET)
        return replace(address, flags=VRING_LOG, log=config.device + self.guest_offset) if self.logging else address

    def enable(self, index: int, *, on: bool = True) -> None:
        """SET_VRING_ENABLE."""
        self.request(Request.SET_VRING_ENABLE, VringState(index, int(on)))

    def get_base(self, index: int) -> int:
        """GET_VRING_BASE: the ring stops.

        Raises:
            MessageError: UnexpectedReply, it is about another queue.
        """
        reply = self.request(Request.GET_VRING_BASE, VringState(index))
        assert reply is not None
        assert isinstance(reply.payload, VringState)
        if reply.payload.index != index:
            raise violation("UnexpectedReply", f"the base of queue {reply.payload.index} came", queue=index)
        return reply.payload.num

    def kick_inband(self, index: int) -> None:
        """VRING_KICK: a kick as a message."""
        self.request(Request.VRING_KICK, VringState(index))

    # --- configuration space and status ---------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG.

        Raises:
            MessageError: Refused, the answer is an empty payload; ConfigSize, it has another number of bytes.
        """
        reply = self.request(Request.GET_CONFIG, Config(offset, size, 0, bytes(size)))
        assert reply is not None
        if not isinstance(reply.payload, Config):
            raise violation("Refused", f"GET_CONFIG of {size} bytes at {offset} was refused")
        if len(reply.payload.data) != size:
            raise violation("ConfigSize", f"{len(reply.payload.data)} bytes came where {size} were asked for")
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

    # --- what is in flight ----------------------------------------------------------------------------------

    def get_inflight(self, queues: int, queue_size: int, *, packed: bool) -> InflightRegion:
        """GET_INFLIGHT_FD: a new region for `queues` queues of `queue_size` descriptors.

        Raises:
            MessageError: Refused, there is none; InflightRegion, it cannot hold what it is for.
        """
        reply = self.request(Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, queue_size))
        assert reply is not None
        assert isinstance(reply.payload, Inflight)
        size, offset = reply.payload.size, reply.payload.offset
        try:
            if not size or not reply.fds:
                raise violation("Refused", f"GET_INFLIGHT_FD for {queues} queues of {queue_size} was refused")
            return InflightRegion(reply.fds[0], size, offset, queues=queues, queue_size=queue_size, packed=packed)
        except MessageError:
            # Whoever keeps the error keeps the reply as well.
            reply.close()
            raise

    def set_inflight(self, region: InflightRegion) -> None:
        """SET_INFLIGHT_FD."""
        payload = Inflight(region.size, region.offset, region.queues, region.queue_size)
        self.request(Request.SET_INFLIGHT_FD, payload, [region.fileno()])

    # --- requests of the back-end ---------------------------------------------------------------------------

    def backend_requests(self, *, timeout: float = 0.0, answer: int | Callable[[Message], int] = 0) -> list[Message]:
        """What the back-end has asked for since the last call, each answered with `answer` where it wants one.

        Args:
            timeout: seconds to wait for the first.
            answer: 0 for success, or what looks at each request and says so.

        Raises:
            MessageError: a request is malformed, or the back-end does not read its answers.
            PeerDisconnected: the back-end has closed the channel, and everything that it asked for was given before.
        """
        found: list[Message] = []
        channel = self.channel
        if channel is None:
            return found
        if timeout:
            select.select([channel.socket], [], [], timeout)
        while len(found) < _MOST_REQUESTS:
            try:
                message = channel.take()
            except PeerDisconnected:
                if found:
                    break
                raise
            if message is None:
                break
            found.append(message)
            value = answer(message) if callable(answer) else answer
            if message.need_reply:
                channel.answer(encode_reply(message.request, U64(value)))
        return found


def ring_address(config: QueueConfig, *, offset: int = USER_OFFSET) -> VringAddress:
    """The addresses of a queue as this front-end writes them; the back-end refuses what lies nowhere."""
    return VringAddress(
        config.index,
        0,
        config.desc + offset & _WORD64,
        config.device + offset & _WORD64,
        config.driver + offset & _WORD64,
    )

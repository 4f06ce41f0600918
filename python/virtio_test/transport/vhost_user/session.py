"""One front-end's session: what its messages do; no socket is touched here.

Theory
------
`handle` takes a decoded request and gives the bytes of the answer, if one is due. A request that cannot be
honoured changes nothing. It is then answered with a number other than 0 when its sender wants an answer; a
sender that wants none could not learn of it, so its connection ends. A request whose own reply cannot be given
ends the connection too, because a front-end waits for that reply for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Notifier, Policy
from virtio_test.device import Device
from virtio_test.errors import MessageError, StatusViolation
from virtio_test.features import FeatureSet, judge_accepted
from virtio_test.loop import OwnerLoop
from virtio_test.status import Action, DeviceStatus, Status

from .channel import BackendChannel
from .codec import Message, OwnedFd, encode_reply
from .dirtylog import LogFile
from .memory import MAX_SLOTS
from .messages import (
    FRONTEND_REQUESTS,
    LOG_ALL_BIT,
    PROTOCOL_FEATURES_BIT,
    VRING_INDEX_MASK,
    VRING_LOG,
    VRING_NO_FD,
    IotlbType,
    ProtocolFeature,
    Request,
)
from .network import required_of_a_front_end
from .payloads import U64, Config, Inflight, Iotlb, Log, MemoryTable, Payload, SingleRegion, VringAddress, VringState
from .records import Records, new_region
from .rings import Kick, Ring, checked_notifier
from .rules import violation
from .runner import RingSet

__all__ = ["SUPPORTED", "Session"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_PROTOCOL: Final = 1 << PROTOCOL_FEATURES_BIT
_LOG_ALL: Final = 1 << LOG_ALL_BIT
_WORD64: Final = (1 << 64) - 1
_END: Final = 1 << 64
_LOGGED_REFUSALS: Final = 20

_F = ProtocolFeature
SUPPORTED: Final = (
    _F.MQ
    | _F.LOG_SHMFD
    | _F.REPLY_ACK
    | _F.BACKEND_REQ
    | _F.CONFIG
    | _F.RESET_DEVICE
    | _F.INBAND_NOTIFICATIONS
    | _F.CONFIGURE_MEM_SLOTS
    | _F.STATUS
    | _F.INFLIGHT_SHMFD
)
"""Every protocol feature that this back-end serves."""


class Session:
    """The state between the connecting and the leaving of one front-end.

    Args:
        device: what is served.
        memory: the guest memory that the front-end's regions are mapped into.
        loop: the owner loop.
        offered: feature bits that GET_FEATURES shows.
        protocol_features: protocol features that are offered.
        policy: tolerances of the queues.

    Attributes:
        rings: the rings and all that runs.
        protocol: the negotiated protocol features.
        status: the device status as far as the front-end tells it.
        reply_fds: what goes with the answer of the last message; whoever sends it closes them.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        loop: OwnerLoop,
        *,
        offered: FeatureSet,
        protocol_features: ProtocolFeature = SUPPORTED,
        policy: Policy = Policy.interop,
    ) -> None:
        self.device = device
        self.loop = loop
        self.offered = offered
        self.offered_protocol = protocol_features
        self.rings = RingSet(device, memory, loop, policy)
        self.protocol = ProtocolFeature(0)
        self.status = DeviceStatus(width=8)
        self.reply_fds: list[OwnedFd] = []
        self._refusals = 0
        # A request of the table without an entry here is one that this back-end does not serve.
        self._handlers: dict[int, Callable[[Message], Payload | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.RESET_DEVICE: self._reset,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
            Request.SET_BACKEND_REQ_FD: self._set_backend_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.GET_INFLIGHT_FD: self._get_inflight,
            Request.SET_INFLIGHT_FD: self._set_inflight,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_LOG_BASE: self._set_log_base,
            Request.SET_LOG_FD: self._set_log_fd,
            Request.IOTLB_MSG: self._iotlb,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.VRING_KICK: self._vring_kick,
        }

    def __repr__(self) -> str:
        return f"<Session {self.rings}>"

    # --- messages -------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> bytes | None:
        """Do what `message` asks; the bytes of the answer, or None when none is due.

        Raises:
            MessageError: the connection must end.
        """
        row = FRONTEND_REQUESTS.get(message.request)
        try:
            if row is None:
                raise violation("UnknownRequest", f"request {message.request} is not known")
            if row.needs is not None and not row.needs & self.protocol:
                raise violation("NotNegotiated", f"{row.name} needs {row.needs.name}, which was not negotiated")
            handler = self._handlers.get(message.request)
            if handler is None:
                raise violation("NotSupported", f"{row.name} is not served here")
            reply = self._run(handler, message)
        except MessageError as error:
            if row is not None and row.refusable:
                self._told("refused", error)
                return encode_reply(message.request, U64(1))
            if error.rule == "InbandAlone" or (row is not None and row.reply is not None and not row.may_be_empty):
                raise
            if row is not None and row.reply is not None:
                self._told("answered with an error", error)
                return encode_reply(message.request)
            if message.need_reply:
                self._told("refused", error)
                return encode_reply(message.request, U64(1))
            if row is None:
                self._told("ignored", error)
                return None
            raise
        if row.reply is not None:
            return encode_reply(message.request, reply)
        return encode_reply(message.request, U64(0)) if message.need_reply else None

    def _told(self, what: str, error: MessageError) -> None:
        """A line for each refusal; a front-end that causes thousands of them gets a few."""
        self._refusals += 1
        if self._refusals <= _LOGGED_REFUSALS:
            _log.warning("%s: %s", what, error)
        elif self._refusals == _LOGGED_REFUSALS + 1:
            _log.warning("more of it is answered and not told")

    def _run(self, handler: Callable[[Message], Payload | None], message: Message) -> Payload | None:
        try:
            return handler(message)
        except MessageError:
            raise
        except Exception as error:
            # The device's own code, reached through its configuration space or its reset.
            _log.exception("the device failed at request %d", message.request)
            raise violation("DeviceFailed", f"{type(error).__name__}: {error}") from error

    def _ring(self, index: int) -> Ring:
        rings = self.rings.rings
        if index >= len(rings):
            raise violation("VringIndex", f"queue {index} of a device with {len(rings)}", queue=index)
        return rings[index]

    # --- features and status --------------------------------------------------------------------------------

    @property
    def _vhost_bits(self) -> int:
        """The bits of vhost itself that are on offer."""
        return _PROTOCOL | (_LOG_ALL if self.offered_protocol & _F.LOG_SHMFD else 0)

    def _get_features(self, _: Message) -> Payload:
        return U64((self.offered.bits & _WORD64) | self._vhost_bits)

    def _set_features(self, message: Message) -> None:
        value = _u64(message)
        accepted = FeatureSet.from_bits(value & ~self._vhost_bits, device=self.offered.device)
        # No features at all may be a driver that has not come that far; a ring that runs judges it (`RingSet`).
        device = self.rings.device
        found = judge_accepted(
            self.offered,
            accepted,
            requires=required_of_a_front_end(device.device_id, device.requires),
            legacy=device.transitional or not accepted,
        )
        if found is not None:
            rule = "FeatureNotOffered" if found.rule == "FeatureNotOffered" else "FeaturesRefused"
            raise violation(rule, found.message)
        protocol = bool(value & _PROTOCOL)
        changed, running = accepted != self.rings.accepted, self.rings.running
        if protocol and running and changed:
            raise violation("FeaturesWhileRunning", f"from {self.rings.accepted} to {accepted} while rings run")
        # Of what follows only this can fail.
        self.rings.marking.turn(on=bool(value & _LOG_ALL))
        self.rings.always_enabled = not protocol
        if not protocol and (running or self.rings.broken):
            # Such a front-end has no way to stop a ring: its driver begins anew.
            self.rings.reset()
        elif self.rings.active and not running and changed:
            self.rings.reset_device()
        self.rings.accepted = accepted
        self.rings.iommu.turn(on="ACCESS_PLATFORM" in accepted)
        if not protocol:
            for ring in self.rings.rings:
                ring.enabled = True
        self.rings.update()

    def _get_protocol_features(self, _: Message) -> Payload:
        return U64(int(self.offered_protocol))

    def _set_protocol_features(self, message: Message) -> None:
        value = _u64(message)
        if value & ~int(self.offered_protocol):
            raise violation("ProtocolFeatureNotOffered", f"bits {value & ~int(self.offered_protocol):#x}")
        chosen = ProtocolFeature(value)
        if chosen & _F.INBAND_NOTIFICATIONS and not (chosen & _F.BACKEND_REQ and chosen & _F.REPLY_ACK):
            raise violation("InbandAlone", "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK")
        self.protocol = chosen
        self.rings.inband = bool(chosen & _F.INBAND_NOTIFICATIONS)
        self.rings.acknowledged = bool(chosen & _F.REPLY_ACK)

    def _get_queue_num(self, _: Message) -> Payload:
        return U64(len(self.rings.rings))

    def _get_status(self, _: Message) -> Payload:
        return U64(self.status.value | (int(Status.DEVICE_NEEDS_RESET) if self.rings.broken else 0))

    def _set_status(self, message: Message) -> None:
        value = _u64(message)
        if value > 0xFF:
            raise violation("StatusValue", f"status {value:#x}")
        # Front-ends read, add a bit and write: our own bit comes back to us.
        change = self.status.write(value & ~int(Status.DEVICE_NEEDS_RESET), features_ok=self.rings.accepted is not None)
        for found in change.violations:
            _log.info("device status: %s", found)
        if Action.RESET in change.actions:
            self.rings.reset()

    def _set_owner(self, _: Message) -> None:
        """Nothing: the connection itself says who the owner is."""

    def _reset_owner(self, _: Message) -> None:
        # Deprecated; the protocol recommends to disable the rings and no more.
        # One that cannot enable them again keeps them.
        for ring in self.rings.rings:
            ring.enabled = self.rings.always_enabled
        self.rings.update()

    def _reset(self, _: Message) -> None:
        self.status.reset()
        self.rings.reset()

    def _set_backend_fd(self, message: Message) -> None:
        channel = BackendChannel(message.fds[0], self.loop)
        if self.rings.channel is not None:
            self.rings.channel.close()
        channel.on_refused = self.rings.iommu.misses.refused
        self.rings.channel = channel
        self.rings.iommu.ask_again()

    # --- configuration space --------------------------------------------------------------------------------

    def _get_config(self, message: Message) -> Payload:
        asked = _config(message)
        try:
            return Config(asked.offset, asked.size, asked.flags, self.device.config.read(asked.offset, asked.size))
        except StatusViolation as error:
            raise violation("ConfigRange", error.message) from error

    def _set_config(self, message: Message) -> None:
        # Front-ends write the whole space back for one byte: read-only fields in it are left as they are.
        given = _config(message)
        try:
            self.device.config.write(given.offset, given.data)
        except StatusViolation as error:
            raise violation("ConfigRange", error.message) from error

    # --- memory ---------------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        assert isinstance(message.payload, MemoryTable)
        regions = message.payload.regions
        memory = self.rings.memory
        memory.check_table(regions, message.fds)
        self.rings.change_memory(regions, lambda: memory.replace(regions, message.fds))

    def _get_max_mem_slots(self, _: Message) -> Payload:
        return U64(MAX_SLOTS)

    def _add_mem_reg(self, message: Message) -> None:
        assert isinstance(message.payload, SingleRegion)
        region, fd, memory = message.payload.region, message.fds[0], self.rings.memory
        memory.check_added(region, fd)
        self.rings.change_memory((*memory.regions, region), lambda: memory.add(region, fd))

    def _rem_mem_reg(self, message: Message) -> None:
        assert isinstance(message.payload, SingleRegion)
        memory = self.rings.memory
        region = memory.find(message.payload.region)
        left = [each for each in memory.regions if each is not region]
        self.rings.change_memory(left, lambda: memory.remove(region))

    def _set_log_base(self, message: Message) -> Payload:
        assert isinstance(message.payload, Log)
        log = LogFile(message.fds[0], message.payload)
        try:
            self.rings.marking.set_log(log)
        except BaseException:
            log.close()
            raise
        return U64(0)

    def _set_log_fd(self, message: Message) -> None:
        self.rings.set_log_call(checked_notifier(message.fds[0], None))

    def _iotlb(self, message: Message) -> Payload:
        entry = message.payload
        assert isinstance(entry, Iotlb)
        if not self.rings.iommu.on:
            raise violation("NotNegotiated", "IOTLB_MSG needs the feature ACCESS_PLATFORM, which was not accepted")
        if entry.type == IotlbType.UPDATE:
            self.rings.iommu.put(entry)
        elif entry.type == IotlbType.INVALIDATE:
            # Linux and QEMU say so that everything goes: its size does not fit.
            size = _END if entry.iova == entry.size == 0 else entry.size
            if size == 0 or entry.iova + size > _END:
                raise violation("IotlbRange", f"{entry.size:#x} bytes at IOVA {entry.iova:#x} are empty, or wrap")
            self.rings.iommu.invalidate(entry.iova, entry.iova + size)
        else:
            raise violation("IotlbType", f"type {entry.type}, where updates and invalidations are legal")
        return U64(0)

    # --- what is in flight ----------------------------------------------------------------------------------

    def _get_inflight(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, Inflight)
        # What the rings will be is not known before their features are: then either kind has room.
        packed = self.rings.packed or (self.rings.accepted is None and "RING_PACKED" in self.offered)
        try:
            region, fd = new_region(asked, queues=len(self.rings.rings), packed=packed)
        except MessageError as error:
            # No size and no fd say so, as others do; the document has no other answer.
            self._told("answered with no region", error)
            return Inflight(0, 0, asked.queues, asked.queue_size)
        self.reply_fds.append(fd)
        return region

    def _set_inflight(self, message: Message) -> None:
        region = message.payload
        assert isinstance(region, Inflight)
        if self.rings.running:
            raise violation("InflightWhileRunning", "a region for what is in flight comes while rings run")
        self.rings.records = Records.given(
            region, message.fds[0], queues=len(self.rings.rings), packed=self.rings.packed
        )

    # --- rings: what messages say ---------------------------------------------------------------------------

    def _set_vring_num(self, message: Message) -> None:
        state = _state(message)
        ring = self._ring(state.index)
        before = ring.size
        ring.set_size(state.num, packed=self.rings.packed)
        try:
            # A larger used ring is logged in more places.
            self.rings.marking.moved(ring)
        except MessageError:
            ring.size = before
            raise
        self.rings.update()

    def _set_vring_base(self, message: Message) -> None:
        state = _state(message)
        ring = self._ring(state.index)
        ring.check_base(state.num, packed=self.rings.packed)
        if ring.running or ring.broken is not None:
            # Set up anew without having been stopped: it starts with the next kick fd, not with the old addresses.
            self.rings.stop(ring)
            ring.started = False
        if ring.position is not None and state.num & 0xFFFF != ring.position.avail:
            # It does not go on where it stopped: what was in flight then is so no longer.
            self.rings.clear_record(ring)
        ring.set_base(state.num)

    def _set_vring_addr(self, message: Message) -> None:
        address = message.payload
        assert isinstance(address, VringAddress)
        ring = self._ring(address.index)
        if address.flags & ~(VRING_LOG if self.protocol & _F.LOG_SHMFD else 0):
            raise violation("VringFlags", f"flags {address.flags:#x}", queue=ring.index)
        before, ring.address = ring.address, address
        try:
            layout = ring.layout(address, packed=self.rings.packed)
            for name, user, align in (
                ("descriptor", address.descriptor, 16),
                ("available", address.available, 4 if self.rings.packed else 2),
                ("used", address.used, 4),
            ):
                if user % align:
                    raise violation(
                        "VringAddress", f"{name} address {user:#x} is not {align}-aligned", queue=ring.index
                    )
            for at, size in ((layout.desc, layout.desc_bytes), (layout.driver, layout.driver_bytes)):
                if max(at + size, layout.device + layout.device_bytes) > _END:
                    raise violation("VringAddress", f"{size} bytes at {at:#x}: an area wraps", queue=ring.index)
            # The addresses of an IOMMU are asked for when the ring is to run.
            if not self.rings.iommu.on and self.rings.translate(layout) is None:
                raise violation(
                    "VringAddress",
                    f"descriptor {address.descriptor:#x}, available {address.available:#x}, used {address.used:#x}: "
                    "not all in shared memory",
                    queue=ring.index,
                )
            # Without the flag it is not an address: user-mode Linux sends all ones there.
            if address.flags & VRING_LOG and address.log + layout.device_bytes > _END:
                raise violation("LogRange", f"the used ring is logged at {address.log:#x}: it wraps", queue=ring.index)
            self.rings.marking.moved(ring)
        except MessageError:
            ring.address = before
            raise
        self.rings.update()

    def _get_vring_base(self, message: Message) -> Payload:
        ring = self._ring(_state(message).index)
        ring.started = False
        self.rings.set_kick(ring, None)
        self.rings.update()
        base = ring.reply_base(packed=self.rings.packed)
        ring.base = base & 0xFFFF
        ring.read_back = True
        if ring.drained:
            # The front-end knows all there is to know of the ring, and says with the next base where it begins.
            self.rings.clear_record(ring)
        return VringState(ring.index, base)

    def _ring_of_fd(self, message: Message) -> Ring:
        value = _u64(message)
        if value & ~(VRING_INDEX_MASK | VRING_NO_FD):
            raise violation("VringValue", f"reserved bits in {value:#x}")
        return self._ring(value & VRING_INDEX_MASK)

    def _notifier(self, message: Message, ring: Ring) -> Notifier | None:
        return checked_notifier(message.fds[0], ring.index) if message.fds else None

    def _set_vring_kick(self, message: Message) -> None:
        ring = self._ring_of_fd(message)
        kick = Kick(message.fds[0], ring.index) if message.fds else None
        poll = kick is None and not self.protocol & _F.INBAND_NOTIFICATIONS
        self.rings.set_kick(ring, kick, poll=poll)
        ring.started = True
        self.rings.update()

    def _set_vring_call(self, message: Message) -> None:
        ring = self._ring_of_fd(message)
        self.rings.set_call(ring, self._notifier(message, ring))

    def _set_vring_err(self, message: Message) -> None:
        ring = self._ring_of_fd(message)
        self.rings.set_error(ring, self._notifier(message, ring))

    def _set_vring_enable(self, message: Message) -> None:
        state = _state(message)
        ring = self._ring(state.index)
        if state.num > 1:
            raise violation("VringValue", f"enabled is {state.num}, where 0 and 1 are legal", queue=ring.index)
        ring.enabled = bool(state.num)
        if ring.enabled and self.rings.inband and ring.kick is None:
            # No kick fd will come, and a driver that waits for a configuration change first sends no kick either.
            ring.started = True
        self.rings.update()

    def _vring_kick(self, message: Message) -> None:
        state = _state(message)
        ring = self._ring(state.index)
        if state.num:
            raise violation("VringValue", f"an in-band kick carries {state.num}, where 0 is legal", queue=ring.index)
        ring.started = True
        self.rings.update()
        self.rings.mark(ring)

    # --- outside of messages --------------------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the front-end, but only while rings run: before its driver has started them QEMU 11.1 would crash.

        DRIVER_OK cannot be asked for: QEMU's generic device negotiates STATUS and never sends more than FEATURES_OK.
        """
        live = self.rings.running and not self.rings.broken
        if live and self.rings.channel is not None and self.protocol & _F.CONFIG:
            self.rings.channel.config_changed()

    def close(self) -> None:
        """The front-end has gone: nothing of it may be left."""
        self.rings.close()


def _u64(message: Message) -> int:
    assert isinstance(message.payload, U64)
    return message.payload.value


def _state(message: Message) -> VringState:
    assert isinstance(message.payload, VringState)
    return message.payload


def _config(message: Message) -> Config:
    assert isinstance(message.payload, Config)
    if message.payload.flags > 1:
        raise violation("ConfigFlags", f"kind {message.payload.flags} of a configuration access")
    return message.payload

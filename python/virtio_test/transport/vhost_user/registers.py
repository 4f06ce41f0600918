"""A back-end as its driver sees it: the driver model's registers over our front-end.

Theory
------
vhost-user has no registers. Features and configuration are asked for by messages, the status is a message only
where both sides know it and is kept here otherwise, and of a queue nothing is said before the driver sets
DRIVER_OK: then memory, the record of what is in flight, and every ring go over in one piece. What the protocol
cannot tell (the device id, how large queues may be) the caller says.

A back-end can vanish, hang or send nonsense at any time. Each of these ends the connection (`link`): everything
asked of these registers from then on raises the same error, except that a reset succeeds, since nobody uses the
memory any more. The driver is told, and finishes what is in flight with that error.

With `keep_in_flight`, and a back-end that records what it has in flight (`inflight`), the driver is not told:
`reconnect` gives memory, rings and record to the next back-end, which takes up what the last one left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from virtio_test._core import DirtyLog, GuestMemory, Notifier, QueueConfig
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, PeerError, StateError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import FEATURE_NAMES
from virtio_test.spec.status import Status
from virtio_test.status import DeviceStatus

from .frontend import FrontEnd
from .frontrings import FrontEndRings
from .inflight import InflightRegion
from .link import MAX_QUEUES, Link, note
from .messages import LOG_ALL_BIT, Permission, ProtocolFeature, Request
from .network import PAIRS_FIELD, not_ours_to_take
from .payloads import Iotlb
from .rings import MAX_SIZE
from .rules import violation

__all__ = ["DEFAULT_MEMORY_BYTES", "WANTED", "VhostUserRegisters"]

_F = ProtocolFeature

WANTED: Final = (
    _F.MQ
    | _F.LOG_SHMFD
    | _F.REPLY_ACK
    | _F.BACKEND_REQ
    | _F.CONFIG
    | _F.INFLIGHT_SHMFD
    | _F.RESET_DEVICE
    | _F.CONFIGURE_MEM_SLOTS
    | _F.STATUS
)
"""Protocol features that are taken where they are offered, and done without where they are not."""

DEFAULT_MEMORY_BYTES: Final = 16 << 20
_CONFIG_BYTES: Final = 256
"""What a configuration space has at most, where nobody says how much it has."""
_NOT_CARRIED: Final = 1 << LOG_ALL_BIT | 1 << 30 | 1 << 38 | 1 << 39
"""Bits of vhost itself (26, 30), and what kick fds (38, 39) cannot do."""
_ACCESS_PLATFORM: Final = 1 << 33
_GUEST_OFFSET: Final = 1 << 28
"""Where an IOMMU finds the memory that a driver has at 0: nobody can take one address for the other."""
_PAGE: Final = 4096
_PAGES_PER_BYTE: Final = 8

Translate = Callable[[int, Permission], tuple[int, int, int, Permission] | None]
"""From an address of a device, and what it wants to do there, to a translation around it: (address, size, address in
the guest memory, permission); None when there is none."""


class VhostUserRegisters:
    """The registers of the device behind one back-end; a `Registers` for `Driver`.

    Args:
        path: where the back-end listens; or
        connection: a connected UNIX stream socket, ours from now on.
        device_id: what the device is; the protocol has no way to ask.
        loop: the owner loop; one of its own when None.
        memory: the guest memory, of shareable regions; 16 MiB at address 0 when None.
        queues: how many virtqueues; as many as the back-end says when None, or 1 where it cannot be asked.
        queue_size: largest size of each.
        config_size: bytes of the configuration space; 256 when None, and always 0 where there is none.
        protocol_features: which to take of those offered.
        iommu: put an IOMMU between device and memory, if the back-end has an IOTLB and the driver accepts that
            (ACCESS_PLATFORM); see `translate`.
        keep_in_flight: when the connection is lost, keep what is in flight for `reconnect`, if it is recorded.
        on_lost: called in the loop with the error that a connection ended with, after the driver was told.
        timeout: seconds that an answer may take.

    Attributes:
        errors: every rule that the back-end broke, and what each connection ended with, in order; the first 1000.
        translate: the IOMMU: what the back-end is told when it lacks a translation. At first, the same page.
        log: the dirty log, between `start_log` and `stop_log`.

    Raises:
        PeerDisconnected: nobody listens, or the back-end leaves.
        PeerTimeout, MessageError: it does not answer, or not as it should.
        InvalidArgument: a number of queues or descriptors that cannot be, or is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        connection: socket.socket | None = None,
        device_id: int,
        loop: OwnerLoop | None = None,
        memory: GuestMemory | None = None,
        queues: int | None = None,
        queue_size: int = 128,
        config_size: int | None = None,
        protocol_features: ProtocolFeature = WANTED,
        iommu: bool = False,
        keep_in_flight: bool = False,
        on_lost: Callable[[PeerError], object] | None = None,
        timeout: float = 10.0,
    ) -> None:
        if queues is not None and not 1 <= queues <= MAX_QUEUES:
            raise InvalidArgument(f"{queues} queues, and vhost-user counts them from 1 to {MAX_QUEUES}")
        if not 1 <= queue_size <= MAX_SIZE:
            raise InvalidArgument(f"queues of {queue_size} descriptors; 1 to {MAX_SIZE} are possible")
        self._loop = OwnerLoop() if loop is None else loop
        self._memory = GuestMemory([(0, DEFAULT_MEMORY_BYTES)]) if memory is None else memory
        self._device_id = device_id
        self._queues = queues
        self._queue_size = queue_size
        self._config_size = config_size
        self._wanted = protocol_features
        self._path = None if path is None else os.fspath(path)
        self._timeout = timeout
        self._iommu = iommu
        self.translate: Translate = self._same_page
        self.log: DirtyLog | None = None
        self.keep_in_flight = keep_in_flight
        self.on_lost = on_lost
        self.errors: list[PeerError] = []
        self._status = DeviceStatus()
        self._features = FeatureSet()
        self._generation = 0
        self._kept = False
        self._call: Callable[[int], object] = lambda _: None
        self._changed: Callable[[], object] = lambda: None
        self._rings = FrontEndRings(self._loop, self._memory, called=self._called, stopped=self._stopped)
        self._link = self._open(self._path, connection)

    def __repr__(self) -> str:
        state = f"status {self._status}" if self.lost is None else f"lost: {self.lost}"
        return f"<VhostUserRegisters of device {self._device_id}, {state}, {self._rings}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the connection -------------------------------------------------------------------------------------

    @property
    def front(self) -> FrontEnd:
        """The front-end beneath, to send what no driver would."""
        return self._link.front

    @property
    def protocol(self) -> ProtocolFeature:
        """The negotiated protocol features."""
        return self._link.protocol

    @property
    def lost(self) -> PeerError | None:
        """What the connection ended with; None while there is one."""
        return self._link.lost

    @property
    def inflight(self) -> InflightRegion | None:
        """The record of what is in flight, where the back-end keeps one."""
        return self._rings.inflight

    def _open(self, path: str | None, connection: socket.socket | None) -> Link:
        front = FrontEnd(path, connection=connection, timeout=self._timeout)
        link = Link(front, self._loop, wanted=self._wanted, queues=self._queues, errors=self.errors)
        link.on_lost = self._gone
        link.on_config_changed = self._told_of_change
        link.on_miss = self._missed
        front.guest_offset = _GUEST_OFFSET if self._iommu else 0
        return link

    def _gone(self, error: PeerError) -> None:
        self._kept = self.keep_in_flight and self._rings.inflight is not None and self._status.driver_ok
        self._loop.call_soon(lambda: self._tell(error))

    def _tell(self, error: PeerError) -> None:
        if self.lost is error:
            self._tell_driver()
            if self.on_lost is not None:
                self.on_lost(error)

    def _tell_driver(self) -> None:
        """What the back-end has used is used, whatever became of it; the rest is lost, unless it is kept."""
        self._rings.call_all()
        self._rings.disconnected()
        if not self._kept:
            self._changed()

    def reconnect(self, path: str | os.PathLike[str] | None = None, *, connection: socket.socket | None = None) -> bool:
        """Go on with another connection, to the same path when nothing else is given, with the same memory.

        Returns:
            Whether the new back-end has taken over what was in flight. If not, the device is as after a reset, and
            its driver has to `initialize` it.

        Raises:
            StateError: there is no path to connect to.
            PeerError: as at first, or the new back-end has not what is in use. What is kept in flight stays so, for
                another try, until the driver resets the device.
        """
        if path is None and connection is None and self._path is None:
            raise StateError("there is no path to connect to again: give a path or a connection")
        if connection is None:
            self._path = self._path if path is None else os.fspath(path)
        if self.lost is None:
            self._link.close()
            self._kept = self.keep_in_flight and self._rings.inflight is not None and self._status.driver_ok
        # Before there is a new connection, which the driver would take for the one that it knows.
        self._tell_driver()
        self._link = link = self._open(self._path if connection is None else None, connection)
        if not self._kept:
            self._forget()
            return False
        with link.talking() as front:
            self._check_same(link)
            if self.log is not None:
                front.set_log(self.log)
            front.set_features(self._features, protocol_bit=link.knows_protocol, log=self.log is not None)
            self._rings.hand_over(link)
            if link.protocol & _F.STATUS:
                front.set_status(self._status.value)
            link.settle()
        self._kept = False
        for ring in self._rings.running.values():
            ring.kick.notify()
        return True

    def _check_same(self, link: Link) -> None:
        if missing := self._features - FeatureSet.from_bits(link.offered):
            raise PeerError(f"the new back-end does not offer {missing}, which is in use")
        if not link.protocol & _F.INFLIGHT_SHMFD:
            raise PeerError("the new back-end keeps no record of what is in flight (INFLIGHT_SHMFD)")
        last = max(self._rings.configs, default=0)
        if last >= link.queues:
            raise PeerError(f"the new back-end has {link.queues} queues, and queue {last} is in use")

    def close(self) -> None:
        """Leave the back-end; nobody is told."""
        self.on_lost = None
        self._call, self._changed = lambda _: None, lambda: None
        self._link.close()
        self._forget()

    def _forget(self) -> None:
        """Everything that a driver has set."""
        self._rings.forget()
        self._kept = False
        self._status.reset()

    # --- the IOMMU and the dirty log ------------------------------------------------------------------------

    def _same_page(self, address: int, permission: Permission) -> tuple[int, int, int, Permission] | None:
        page = address - address % _PAGE
        return (page, _PAGE, page, permission) if self._memory.is_mapped(page, _PAGE) else None

    def _missed(self, entry: Iotlb) -> bool:
        wanted = entry.permissions if 1 <= entry.permissions <= int(Permission.READ | Permission.WRITE) else 0
        found = self.translate(entry.iova, Permission(wanted)) if wanted else None
        if found is None:
            return False
        with self._link.talking() as front:
            front.update_iotlb(*found)
        return True

    def invalidate(self, address: int, size: int) -> None:
        """Take back the translations of `size` bytes from `address` on; on return the device uses none of them."""
        with self._link.talking() as front:
            front.invalidate_iotlb(address, size)

    def start_log(self) -> None:
        """Have the back-end mark the pages that it writes from now on; rings go on meanwhile.

        Raises:
            StateError: it has no way to (LOG_SHMFD).
        """
        if not self.protocol & _F.LOG_SHMFD:
            raise StateError("the back-end keeps no dirty log (LOG_SHMFD)")
        end = max((region.address + region.size for region in self._memory.regions), default=0)
        self.log = DirtyLog(-(-(end + self.front.guest_offset) // (_PAGE * _PAGES_PER_BYTE)) or 1)
        with self._link.talking() as front:
            self._set_log(front)

    def stop_log(self) -> None:
        """No page is marked any more; what is marked and not yet taken is lost."""
        self.log = None
        with self._link.talking() as front:
            self._set_log(front)

    def _set_log(self, front: FrontEnd) -> None:
        """Tell the back-end what of the log it has to know by now; the order is QEMU's."""
        if self.log is not None:
            front.set_log(self.log)
        if self._status.features_ok:
            front.set_features(self._features, protocol_bit=self._link.knows_protocol, log=self.log is not None)
            front.log_rings()
        self._link.settle()

    def dirty_pages(self) -> list[int]:
        """The addresses of pages that the back-end has marked since this was asked last, ascending.

        Raises:
            StateError: there is no log.
        """
        if self.log is None:
            raise StateError("there is no dirty log: start_log makes one")
        return [page * _PAGE - self.front.guest_offset for page in self.log.take()]

    # --- what the back-end says by itself -------------------------------------------------------------------

    def _told_of_change(self) -> None:
        self._generation += 1
        self._loop.pend((self, "config"), self._deliver_config)

    def _stopped(self, index: int) -> None:
        note(self.errors, DeviceNeedsReset(f"the back-end has stopped queue {index}: it has signalled the err fd"))
        self._status.needs_reset()
        self._loop.pend((self, "config"), self._deliver_config)

    def _deliver_config(self) -> None:
        self._changed()

    def _called(self, index: int) -> None:
        self._call(index)

    # --- the registers --------------------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """See `Registers.loop`."""
        return self._loop

    @property
    def memory(self) -> GuestMemory:
        """See `Registers.memory`."""
        return self._memory

    @property
    def transport(self) -> str | None:
        """See `Registers.transport`."""
        return "vhost-user"

    @property
    def legacy(self) -> bool:
        """See `Registers.legacy`: vhost-user has queue addresses."""
        return False

    def device_id(self) -> int:
        """See `Registers.device_id`: as the caller said."""
        return self._device_id

    def device_features(self) -> int:
        """See `Registers.device_features`: without the bits that vhost keeps for itself, or that it cannot carry.

        Of a network device, without its control queue where that is the front-end's (`network`).
        """
        self._check_there()
        hidden = _NOT_CARRIED if self._iommu else _NOT_CARRIED | _ACCESS_PLATFORM
        if self._device_id == DeviceId.NET:
            hidden |= not_ours_to_take(queues=self._link.queues, pairs=self._net_pairs())
        return self._link.offered & ~hidden

    def _net_pairs(self) -> int | None:
        if not self.protocol & _F.CONFIG:
            return None
        if not self._link.offered & 1 << FEATURE_NAMES["MQ"]:
            return 1
        offset, length = PAIRS_FIELD
        return int.from_bytes(self.read_config(offset, length), "little")

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`; they go over with FEATURES_OK."""
        if not self._status.features_ok:
            self._features = FeatureSet.from_bits(features)

    def read_status(self) -> int:
        """See `Registers.read_status`; raises what the connection ended with, if it was not reset since."""
        if self.lost is not None and not self._status.value:
            return 0
        self._check_there()
        broken = self._status.value & Status.DEVICE_NEEDS_RESET
        if not self.protocol & _F.STATUS:
            return self._status.value
        with self._link.talking() as front:
            status = front.get_status()
            if status > 0xFF:
                raise violation("StatusValue", f"status {status:#x}")
        return status | broken

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`; without a connection only resets and giving up have an effect."""
        if self.lost is not None:
            if status == 0:
                self._forget()
            elif not status & Status.FAILED:
                self._check_there()
            return
        if status & Status.FAILED:
            self._give_up(status)
            return
        with self._link.talking() as front:
            if status == 0:
                self._reset(front)
            elif status & Status.FEATURES_OK and not self._status.features_ok:
                front.set_features(self._features, protocol_bit=self._link.knows_protocol, log=self.log is not None)
            elif status & Status.DRIVER_OK and not self._status.driver_ok:
                self._rings.start(self._link)
            if self.protocol & _F.STATUS:
                front.set_status(status)
            self._link.settle()
        self._status.write(status, features_ok=True)

    def _give_up(self, status: int) -> None:
        """FAILED: whatever made the driver give up is what it has to say, not how the back-end takes it."""
        self._status.write(status, features_ok=self._status.features_ok)
        if self.protocol & _F.STATUS:
            with suppress(PeerError), self._link.talking() as front:
                front.set_status(status)

    def _reset(self, front: FrontEnd) -> None:
        for index in sorted(self._rings.running):
            self._rings.stop_one(self._link, index)
        if self.protocol & _F.RESET_DEVICE:
            front.request(Request.RESET_DEVICE)
        self._forget()

    def _check_there(self) -> None:
        if self.lost is not None:
            raise self.lost.with_traceback(None)

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`: as the caller said."""
        return [self._queue_size] * self._link.queues

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002 - kicks carry nothing
        """See `Registers.kick_notifier`."""
        return self._rings.kick(index)

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`; it goes over with DRIVER_OK, or at once behind that.

        Raises:
            StateError: it is enabled already.
            InvalidArgument: there is no such queue.
        """
        if config.index >= self._link.queues:
            raise InvalidArgument(f"queue {config.index} of a device with {self._link.queues}")
        self._rings.add(config)
        if self._status.driver_ok:
            self._rings.start_one(self._link, config.index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`; it says nothing of the queue any more until that is enabled again."""
        self._rings.remove(self._link, index)

    def config_size(self) -> int:
        """See `Registers.config_size`: as the caller said."""
        if not self.protocol & _F.CONFIG:
            return 0
        return _CONFIG_BYTES if self._config_size is None else self._config_size

    def config_generation(self) -> int:
        """See `Registers.config_generation`: one read is one message, and changes are counted."""
        return self._generation

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`. It is read from its start: libvhost-user looks at no offset."""
        with self._link.talking() as front:
            return front.get_config(0, offset + length)[offset:]

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`."""
        with self._link.talking() as front:
            front.set_config(offset, data)

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self._call = call
        self._changed = config_changed

    def share_memory(self) -> None:
        """Show the back-end the memory as it is now, where it has changed; DRIVER_OK does it too."""
        self._rings.share(self._link)

"""The rings of one front-end while they run: when they start and stop, and what wakes them.

Theory
------
Kicks, timers and messages meet in the owner loop. A kick only marks its queue; messages never run a handler.
Whatever a message has changed, `update` compares what should run with what does.

One broken rule of the driver is one change of state: the ring stops, its err fd is signalled once, GET_STATUS
shows DEVICE_NEEDS_RESET, and no configuration change is sent. The ring works again when it is set up anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Final

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, RingLayout
from virtio_test.clock import Timer
from virtio_test.device import Device, Threaded
from virtio_test.errors import HandlerError, QueueViolation, RuleViolation, StatusViolation, VirtioTestError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop

from .channel import BackendChannel
from .dirtylog import Marking
from .iommu import Iommu
from .memory import SharedMemory
from .payloads import MemoryRegion
from .records import Records
from .rings import Kick, Ring

__all__ = ["RingSet"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_PACKED: Final = 1 << 34
_POLL_SECONDS: Final = 0.001


class RingSet:
    """The rings of one session, over one device and one memory.

    Args:
        device: what works on them.
        memory: the guest memory that the front-end's regions are mapped into.
        loop: the owner loop.
        policy: tolerances of the queues.

    Attributes:
        accepted: the negotiated features; None before SET_FEATURES.
        channel: the back-end's channel to the front-end, once there is one.
        inband: whether calls and errors go through that channel where there is no fd; with NEED_REPLY.
        always_enabled: whether rings are enabled from the start, for a front-end without protocol features.
        acknowledged: whether the front-end answers what it is asked for.
        marking: the front-end's dirty log.
        iommu: the device IOTLB.
        records: where what is in flight is recorded, if the front-end keeps that.
    """

    def __init__(self, device: Device, memory: GuestMemory, loop: OwnerLoop, policy: Policy) -> None:
        self.device = device
        self.loop = loop
        self.policy = policy
        self.memory = SharedMemory(memory)
        self.rings = [Ring(index) for index in range(len(device.queue_sizes))]
        self.accepted: FeatureSet | None = None
        self.channel: BackendChannel | None = None
        self.inband = False
        self.always_enabled = False
        self.acknowledged = False
        self.marking = Marking(self)
        self.iommu = Iommu(self)
        self.records: Records | None = None
        self._active = False
        self._at: Ring | None = None
        self._pollers: dict[int, Timer] = {}

    def __repr__(self) -> str:
        return f"<RingSet {self.rings}>"

    @property
    def packed(self) -> bool:
        """Whether the driver has accepted RING_PACKED."""
        return self.accepted is not None and bool(self.accepted.bits & _PACKED)

    @property
    def running(self) -> bool:
        """Whether any ring runs."""
        return any(ring.running for ring in self.rings)

    @property
    def active(self) -> bool:
        """Whether the device has been activated, and not reset since."""
        return self._active

    @property
    def broken(self) -> bool:
        """Whether a ring was stopped for a broken rule and not set up anew."""
        return any(ring.broken is not None for ring in self.rings)

    def reset(self) -> None:
        """Device reset: every ring back to the state before the first message about it, the device too."""
        self.reset_device()
        for ring in self.rings:
            self.set_kick(ring, None)
            ring.forget()
            ring.enabled = self.always_enabled
            self.clear_record(ring)

    def reset_device(self) -> None:
        """Only the device, and what it works on."""
        for ring in self.rings:
            self.loop.unpend((self, ring.index))
            self.loop.unpend((self, "call", ring.index))
        try:
            self.device.reset()
        except Exception as error:  # noqa: BLE001 - logged with its traceback; the next front-end is served
            _log.error("the reset of the device failed", exc_info=error)
        self._active = False
        for ring in self.rings:
            queue, ring.queue = ring.queue, None
            if queue is not None:
                _revoke(queue)

    def clear_record(self, ring: Ring) -> None:
        """Nothing is in flight on `ring`, and what its record says of the place where it stands does not count."""
        if self.records is not None:
            self.records.clear(ring.index)

    def close(self) -> None:
        """The front-end has gone: nothing of it may be left, and the record of what is in flight stays with it."""
        self.records = None
        self.reset()
        for ring in self.rings:
            ring.call = ring.error = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.iommu.misses.clear()
        self.marking.forget()
        self.marking.call = None
        self.memory.clear()

    # --- memory ---------------------------------------------------------------------------------------------

    def change_memory(self, regions: Sequence[MemoryRegion], change: Callable[[], None]) -> None:
        """Stop what will not lie where it lies, change the table, start what can run.

        Raises:
            MessageError: LogTooSmall, nothing was changed; what `change` raises.
        """
        self.marking.make_room(max((region.guest + region.size for region in regions), default=0))
        for ring in self.rings:
            if ring.queue is not None and _place(self._resolve(ring, regions)) != _place(ring.queue.layout()):
                self.stop(ring)
        try:
            change()
        finally:
            self.marking.renew()
            self.update()

    def update(self) -> None:
        """Stop and start what the present state asks for."""
        for ring in self.rings:
            # One ring that cannot be is no reason to stop the others.
            with self.working_on(ring):
                self._update(ring)

    def _update(self, ring: Ring) -> None:
        where = self._resolve(ring, self.memory.regions) if ring.wanted and self.accepted is not None else None
        if ring.queue is not None and (where is None or _place(where) != _place(ring.queue.layout())):
            self.stop(ring)
        if ring.queue is None and where is not None and ring.wanted:
            self._start(ring, where)
        elif where is None:
            self.iommu.ask(ring)

    def _resolve(self, ring: Ring, regions: Sequence[MemoryRegion]) -> RingLayout | None:
        """The ring's layout in guest addresses; None unless it is known and all of it is shared."""
        if ring.address is None or ring.size is None:
            return None
        layout = ring.layout(ring.address, packed=self.packed)
        if not self.iommu.on:
            return self.translate(layout, regions)
        return layout if self.iommu.holds(layout, regions) else None

    def translate(self, users: RingLayout, regions: Sequence[MemoryRegion] | None = None) -> RingLayout | None:
        """A layout of front-end addresses in guest addresses; None unless all of it is shared."""
        places = (
            (users.desc, users.desc_bytes),
            (users.driver, users.driver_bytes),
            (users.device, users.device_bytes),
        )
        found = [self.memory.guest_address(user, length, regions) for user, length in places]
        desc, driver, device = found
        if desc is None or driver is None or device is None:
            return None
        return RingLayout(users.size, packed=users.packed, desc=desc, driver=driver, device=device)

    def _start(self, ring: Ring, where: RingLayout) -> None:
        assert self.accepted is not None
        with self.working_on(ring):
            if "VERSION_1" not in self.accepted and not self.device.transitional:
                message = "the driver has not accepted VERSION_1, and this device has no legacy rules to serve it by"
                raise StatusViolation("Version1NotAccepted", "6.1", message)
            state = ring.start_state(self.memory.memory, where, packed=self.packed)
            queue = DeviceQueue(
                self.memory.memory,
                ring.queue_config(where, self.accepted.bits, self.policy),
                state=state,
                call=self._call_of(ring),
                # From any thread that pops.
                miss=Notifier.callback(lambda: self.loop.pend((self, "miss", ring.index), lambda: self._missed(ring))),
                record=None if self.records is None else self.records.part(ring.index, packed=self.packed),
            )
            if not self._active:
                self.device.activate(self.accepted)
                self._active = True
            self.device.start_queue(queue)
            ring.queue = queue
            ring.drained = False
            # Nobody knows whether the back-end before this one came to say what it had used last.
            queue.signal()
        # Buffers may lie there already, and no kick need come for them (VIRTIO 1.4, 3.1.1).
        self.mark(ring)

    def stop(self, ring: Ring) -> None:
        """The device stops working on `ring`, whose position is kept."""
        queue, ring.queue = ring.queue, None
        if queue is None:
            return
        self.loop.unpend((self, ring.index))
        with self.working_on(ring):
            self.device.stop_queue(ring.index)
        ring.position = queue.stop()
        ring.drained = queue.in_flight == 0

    @contextmanager
    def working_on(self, ring: Ring) -> Generator[None]:
        """Whatever goes wrong inside stops this ring, and not the server."""
        outer, self._at = self._at, ring
        try:
            yield
        except VirtioTestError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - logged with its traceback; the server lives
            _log.exception("the device failed at queue %d", ring.index)
            self.fail(HandlerError(f"queue {ring.index}: {type(error).__name__}: {error}"))
        finally:
            self._at = outer

    def mark(self, ring: Ring) -> None:
        """A kick: the ring is looked at when the present message has been answered."""
        if ring.queue is not None:
            self.loop.pend((self, ring.index), lambda: self._work(ring))

    def kick(self, index: int) -> None:
        """As `mark`, of ring `index`; from any thread."""
        if 0 <= index < len(self.rings):
            self.mark(self.rings[index])

    def _missed(self, ring: Ring) -> None:
        """A pop lacked a translation, which may have come meanwhile."""
        with self.working_on(ring):
            if not self.iommu.ask(ring):
                self.mark(ring)

    def _kicked(self, ring: Ring, kick: Kick) -> None:
        if kick.drain():
            self.mark(ring)
        elif kick.hung_up():
            _log.info("queue %d: nobody holds the other end of its kick fd any more", ring.index)
            self.set_kick(ring, None)

    def _work(self, ring: Ring) -> bool:
        more = False
        if ring.queue is not None:
            with self.working_on(ring):
                more = self.device.kicked(ring.index)
                # A translation that came may have gone again, and the queue tells of each once.
                self.iommu.ask(ring)
            self.marking.tell()
            self.update()
        return more and ring.running

    def set_kick(self, ring: Ring, kick: Kick | None, *, poll: bool = False) -> None:
        """Wait for `kick` instead of what was there; or look at the ring every millisecond."""
        poller = self._pollers.pop(ring.index, None)
        if poller is not None:
            poller.stop()
        if ring.kick is not None:
            self.loop.remove_reader(ring.kick.fileno())
        # A device with threads waits for it itself; it lets go of the old one before that is closed.
        fd = None if kick is None else kick.fileno()
        taken = isinstance(self.device, Threaded) and self.device.take_kick(ring.index, fd)
        ring.kick = kick
        if kick is not None and not taken:
            self.loop.add_reader(kick.fileno(), lambda: self._kicked(ring, kick))
        if poll:
            self._pollers[ring.index] = Timer(
                self.loop.clock, lambda: self.mark(ring), first_after=_POLL_SECONDS, every=_POLL_SECONDS
            )

    # --- what the device asks for ---------------------------------------------------------------------------

    def _call_of(self, ring: Ring) -> Notifier:
        """What the queue of `ring` wakes its driver with.

        Threads of the device call directly where nothing but the fd has to know of it, else through the loop.
        """
        if not isinstance(self.device, Threaded):
            return Notifier.callback(lambda: self.call(ring.index))
        if ring.call is not None and self.marking.call is None:
            return ring.call
        return Notifier.callback(lambda: self.loop.pend((self, "call", ring.index), lambda: self._deliver(ring)))

    def _deliver(self, ring: Ring) -> None:
        self.call(ring.index)
        self.marking.tell()

    def set_log_call(self, call: Notifier) -> None:
        """Say with `call` that something may have been marked in the dirty log."""
        self.marking.call = call
        for ring in self.rings:
            if ring.queue is not None:
                ring.queue.set_call(self._call_of(ring))

    def call(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        ring = self.rings[index]
        if ring.call is not None:
            _notify(ring.call, "call", index)
        elif self.inband and self.channel is not None:
            self.channel.vring_call(index)
        else:
            ring.call_owed = True

    def fail(self, error: Exception) -> None:
        """A rule was broken, or a handler failed: stop the ring that it happened on, or all when none is known."""
        ring = self._at
        if isinstance(error, RuleViolation) and error.queue is not None and error.queue < len(self.rings):
            ring = self.rings[error.queue]
        for each in self.rings if ring is None else [ring]:
            if each.broken is None:
                each.broken = error
                self._signal_error(each)
        # What a handler raised has its log entry, with the traceback, from the device.
        level = logging.DEBUG if isinstance(error, HandlerError) else logging.WARNING
        _log.log(level, "%s stopped: %s", f"queue {ring.index}" if ring is not None else "the device", error)
        if self._at is None:
            self.loop.call_soon(self.update)

    def _signal_error(self, ring: Ring) -> None:
        if ring.error is not None:
            _notify(ring.error, "err", ring.index)
        elif self.inband and self.channel is not None:
            self.channel.vring_error(ring.index)
        else:
            ring.error_owed = True

    def set_call(self, ring: Ring, call: Notifier | None) -> None:
        """Call with `call` from now on; at once, if there was a call that nobody could hear."""
        ring.call = call
        if ring.queue is not None:
            ring.queue.set_call(self._call_of(ring))
        if call is not None and ring.call_owed:
            ring.call_owed = False
            self.call(ring.index)

    def set_error(self, ring: Ring, error: Notifier | None) -> None:
        """Tell with `error` from now on that the ring is broken; at once, if it is and nobody could hear it."""
        ring.error = error
        if error is not None and ring.error_owed:
            ring.error_owed = False
            self._signal_error(ring)


def _place(layout: RingLayout | None) -> tuple[int, int, int, int] | None:
    return None if layout is None else (layout.size, layout.desc, layout.driver, layout.device)


def _notify(notifier: Notifier, name: str, index: int) -> None:
    try:
        notifier.notify()
    except VirtioTestError as error:
        # The front-end gave us an fd that cannot be written: it only harms itself.
        _log.info("queue %d: its %s fd does not work: %s", index, name, error)


def _revoke(queue: DeviceQueue) -> None:
    """A new generation: whoever still holds a chain of this queue can write nothing any more."""
    try:
        queue.reset()
    except QueueViolation as error:
        # Its memory has gone before it: nothing is written into that, and a latched queue takes nothing either.
        queue.latch(error)

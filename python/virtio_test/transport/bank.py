"""`RegisterBank`: what every register transport shows a driver, before it is laid out as registers.

Theory
------
PCI, MMIO and the loopback differ in where a register lies and how wide it is. What is behind it is the same:
words of features, the status machine, one record per virtqueue, the configuration space, and a device that is
started and stopped by them. That is this class. A transport translates accesses into its calls and is told, in
turns of their own, when the driver is to be interrupted.

**Nothing a driver writes raises.** What it must not do is ignored as the specification says, counted in
`ignored` and kept in `errors` (the first `MAX_ERRORS`). Values that cannot be a queue are not taken over
(Q01 to Q04, Q08 of the robustness catalogue); registers of an enabled queue are frozen (Q05, Q06).

**A broken device**: a queue that cannot be started, or a rule that the driver broke in a ring. NEEDS_RESET appears,
one configuration change notification goes out if DRIVER_OK was set, no queue runs and none interrupts until a reset.

**The legacy interface** (1.3.1) is the same bank with other rules: 32 bits of features, no FEATURES_OK, a queue that
is placed by one page number, and a driver that may use the device before DRIVER_OK (3.1.2): its first kick then
activates it. The first write after a reset decides which interface is in use; writes through the other one are
ignored until the next reset, so no device is driven half by one and half by the other.

**Memory that must not be used** (`hold`, `release`), because a carrier exchanges regions or a function is no bus
master: no queue starts and none is worked on, and what a device's own threads complete waits (`Holdable`).

`suspend` has what happens between SUSPEND and the resume, `saved` what of all this is kept in a saved state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, QueueState
from virtio_test.clock import Clock, VirtualClock
from virtio_test.device import Device, Holdable
from virtio_test.errors import HandlerError, InvalidArgument, PeerError, QueueViolation, StateError, StatusViolation
from virtio_test.features import FeatureSet, check_own_offer, judge_accepted
from virtio_test.loop import OwnerLoop
from virtio_test.status import Action, DeviceStatus, Status

from .queues import QueueRegisters
from .slot import QueueSlot
from .suspend import Suspension

__all__ = ["MAX_ERRORS", "TRANSPORT_FEATURES", "RegisterBank"]

MAX_ERRORS: Final = 1000
"""Errors that are kept; all are counted. A driver can cause any number of them."""

TRANSPORT_FEATURES: Final = FeatureSet(
    "ACCESS_PLATFORM", "ORDER_PLATFORM", "NOTIFICATION_DATA", "NOTIF_CONFIG_DATA", "SUSPEND"
)
"""Features that change nothing for a device, only for what lies between it and its driver. None is offered unasked."""

_MEMORY_SIZE: Final = 16 << 20
_WORD: Final = 0xFFFF_FFFF
_LEGACY_OFFER: Final = FeatureSet("NOTIFY_ON_EMPTY", "ANY_LAYOUT")


class RegisterBank(QueueRegisters):
    """The registers of one device, and its `Bus`.

    Args:
        device: the device; it is attached at once.
        loop: the owner loop; one with a `VirtualClock` that it moves itself, when None.
        memory: the guest memory; 16 MiB at address 0, when None.
        offered: what to offer of the device's features and of `TRANSPORT_FEATURES`; all of the device's when None.
        policy: tolerances towards the driver.
        transport: ``pci``, ``mmio``, …: some features belong to one transport; None restricts nothing.

    Attributes:
        on_call: interrupts the driver for a queue; called in the loop.
        on_config: interrupts it for a configuration change; called in the loop.
        on_reset: tells the transport that the device was reset.
        on_note: told of each broken rule, kept or not.
        resets: how often the device was reset.

    Raises:
        InvalidArgument: the offer contradicts itself, or has features that the device does not.
    """

    def __init__(
        self,
        device: Device,
        *,
        loop: OwnerLoop | None = None,
        memory: GuestMemory | None = None,
        offered: FeatureSet | None = None,
        policy: Policy = Policy.interop,
        transport: str | None = None,
    ) -> None:
        offer = device.features if offered is None else offered
        if extra := offer - device.features - TRANSPORT_FEATURES:
            raise InvalidArgument(f"the device cannot offer {extra}")
        check_own_offer(offer, requires=device.requires, transport=transport)
        self._loop = OwnerLoop(clock=VirtualClock()) if loop is None else loop
        self._memory = GuestMemory([(0, _MEMORY_SIZE)]) if memory is None else memory
        self.device: Device = device
        self.offered = offer
        self.policy = policy
        self.kind = transport
        self.status = DeviceStatus()
        self.suspension = Suspension(self)
        self.errors: list[Exception] = []
        self.ignored: Counter[str] = Counter()
        self.on_call: Callable[[int], object] = lambda _: None
        self.on_config: Callable[[], object] = lambda: None
        self.on_reset: Callable[[], object] = lambda: None
        self.on_note: Callable[[Exception], object] = lambda _: None
        self.resets = 0
        self._accepted = offer - offer
        self._interface: Literal["modern", "legacy"] | None = None
        self._active = False
        self._held = False
        self._config_marked = False
        self._waiting: set[int] = set()
        self._slots = self._fresh_slots()
        device.attach(self)

    # --- the bus, for the device ----------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """The owner loop."""
        return self._loop

    @property
    def memory(self) -> GuestMemory:
        """The guest memory."""
        return self._memory

    @property
    def clock(self) -> Clock:
        """The loop's clock."""
        return self._loop.clock

    def call(self, queue_index: int) -> None:
        """See `Bus.call`."""
        if self.suspension.active:
            self.suspension.calls.add(queue_index)
        elif self.suspension.notices():
            self._loop.pend((self, "call", queue_index), lambda: self._deliver_call(queue_index))

    def config_changed(self) -> None:
        """See `Bus.config_changed`."""
        if self.suspension.active:
            self.suspension.config = True
        elif self.suspension.notices():
            self._mark_config()

    def broken(self, error: Exception) -> None:
        """See `Bus.broken`."""
        self.note(error)
        notify = self.status.needs_reset()
        self._latch_all(str(error))
        if notify:
            self._mark_config()

    def _latch_all(self, why: str) -> None:
        """No queue pops, completes or interrupts any more, not even the ones that nothing was wrong with."""
        for slot in self._slots:
            if slot.queue is not None and slot.queue.latched is None:
                slot.queue.latch(
                    QueueViolation("DeviceBroken", "2.1.2", f"the device is broken: {why}", queue=slot.index)
                )

    def _mark_config(self) -> None:
        self._config_marked = True
        self._loop.pend((self, "config"), self._deliver_config)

    def _deliver_call(self, index: int) -> None:
        # Asked again: since it was pended (by a thread, perhaps) the device may have broken, or the queue been reset.
        slot = self.slot(index)
        if self.suspension.active:
            self.call(index)
        elif self.suspension.notices() and slot is not None and slot.enabled:
            self.on_call(index)

    def _deliver_config(self) -> None:
        self._config_marked = False
        if self.suspension.active:
            self.config_changed()
        else:
            self.on_config()

    def note(self, error: Exception) -> None:
        """Keep and count something that the driver did against the rules."""
        self.ignored[error.rule if isinstance(error, QueueViolation | StatusViolation) else type(error).__name__] += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)
        self.on_note(error)

    # --- features and status --------------------------------------------------------------------------------

    @property
    def legacy(self) -> bool:
        """Whether the driver uses the legacy interface."""
        return self._interface == "legacy"

    @property
    def accepted(self) -> FeatureSet:
        """What the driver has written so far; what was agreed upon once FEATURES_OK stands."""
        return self._accepted

    @property
    def interface(self) -> Literal["modern", "legacy"] | None:
        """The interface in use; None before the first write after a reset."""
        return self._interface

    @property
    def config_due(self) -> bool:
        """Whether a configuration change notification is still to be sent."""
        return self._config_marked or self.suspension.config

    @property
    def live(self) -> bool:
        """Whether the device may use buffers and notify."""
        if self.legacy and self._active:
            return not self.status.value & (Status.DEVICE_NEEDS_RESET | Status.FAILED)
        return self.status.live

    def claim(self, interface: Literal["modern", "legacy"]) -> bool:
        """The driver writes through `interface`: whether that is the one in use. A reset is always allowed."""
        if self._interface is None:
            self._interface = interface
        if self._interface != interface:
            self.note(
                StatusViolation("MixedInterfaces", "1.3.1", f"{interface} write, the {self._interface} one is in use")
            )
        return self._interface == interface

    def legacy_features(self) -> int:
        """The 32 bits that the legacy interface offers (6.3)."""
        return (self.offered.bits | _LEGACY_OFFER.bits) & _WORD

    def device_features(self, select: int) -> int:
        """32 bits of what is offered; 0 for words that do not exist (D14)."""
        return self.offered.word(select) if 0 <= select < 4 else 0

    def driver_features(self, select: int) -> int:
        """32 bits of what the driver wrote; 0 for words that do not exist."""
        return self._accepted.word(select) if 0 <= select < 4 else 0

    def write_driver_features(self, select: int, value: int) -> None:
        """32 bits of what the driver accepts; ignored once FEATURES_OK stands (D02) or the device runs."""
        if self.status.features_ok or self._active:
            self.note(StatusViolation("FeaturesAfterOk", "3.1.1", f"features word {select} written after FEATURES_OK"))
        elif 0 <= select < 4:
            self._accepted = self._accepted.with_word(select, value & _WORD)
        elif value:
            self.note(StatusViolation("FeatureNotOffered", "2.2.1", f"features word {select} = {value:#x}"))

    def read_status(self) -> int:
        """The device status. A legacy driver does not know FEATURES_OK."""
        return int(self.status.value & ~Status.FEATURES_OK) if self.legacy else self.status.value

    def write_status(self, status: int, *, width: int | None = None) -> None:
        """The driver writes the status; 0 resets (D04 to D10, D15: see `virtio_test.status`).

        Args:
            status: what it wrote.
            width: bytes of the access, when it may not be the register's.
        """
        good = True
        if self.legacy and status:
            if status & Status.DRIVER_OK and width in (None, 1):
                self._accept_legacy()
            # Not a bit of this interface: what stands in its place inside is ours.
            status = status & ~Status.FEATURES_OK | self.status.value & Status.FEATURES_OK
        elif not self.legacy and not self.status.features_ok and status & Status.FEATURES_OK:
            problem = judge_accepted(self.offered, self._accepted, requires=self.device.requires, transport=self.kind)
            if problem is not None:
                good = False
                self.note(problem)
        change = self.status.write(
            status, features_ok=good, suspend_negotiated="SUSPEND" in self._accepted, width=width
        )
        for violation in change.violations:
            self.note(violation)
        for action in change.actions:
            if action is Action.RESET:
                self._reset()
            elif action is Action.ACTIVATE:
                self._activate()
            elif action is Action.SUSPEND:
                self.suspension.suspend()
            elif action is Action.RESUME:
                self.suspension.resume()
            elif action is Action.FAILED:
                self.stop_queues()

    def _accept_legacy(self) -> None:
        """What a legacy driver has written is agreed upon: there is no step in which it could be refused."""
        if not self.status.features_ok:
            offer = FeatureSet.from_bits(self.legacy_features(), device=self.offered.device)
            self._accepted &= offer
            self.status.write(self.status.value | Status.FEATURES_OK, features_ok=True)

    def _activate(self) -> None:
        if self._active:
            return
        self._active = True
        with self._guarded():
            self.device.activate(self._accepted)
        for slot in self._slots:
            if slot.enabled:
                self._start(slot)

    def reset(self) -> None:
        """Reset of the device, by whatever way it came."""
        self.status.reset()
        self._reset()

    def _reset(self) -> None:
        self.resets += 1
        for slot in self._slots:
            slot.revoke()
            self._loop.unpend((self, "kick", slot.index))
            self._loop.unpend((self, "call", slot.index))
        self._loop.unpend((self, "config"))
        self._config_marked = False
        self.suspension.reset()
        self._waiting.clear()
        self._slots = self._fresh_slots()
        self._accepted = self.offered - self.offered
        self._interface = None
        self._active = False
        with self._guarded():
            self.device.reset()
        self.on_reset()

    # --- queues ---------------------------------------------------------------------------------------------

    def enable_queue(self, index: int) -> None:
        """The driver enables a queue. One that cannot be breaks the device (D11) once it is to run."""
        slot = self._writable(index, "enable")
        if slot is None:
            return
        slot.enabled = True
        if self.status.features_ok or self._active:
            self._build(slot)
        if self._active:
            self._start(slot)

    def disable_queue(self, index: int) -> None:
        """The driver takes a queue back, where its transport allows that (4.2.2.2, legacy)."""
        slot = self.slot(index)
        if slot is None or not slot.enabled:
            return
        # A new generation first: what the device lets go of while it stops must not reach the driver's ring.
        slot.revoke()
        self._stop(slot)
        self._loop.unpend((self, "kick", index))
        self._loop.unpend((self, "call", index))
        self._waiting.discard(index)
        self._slots[index] = QueueSlot(index, slot.max_size, slot.max_size)

    def reset_queue(self, index: int) -> None:
        """The driver resets one queue (RING_RESET; 2.6.1); ignored without the feature."""
        if "RING_RESET" not in self._accepted or not self.status.features_ok:
            without = "reset alone without RING_RESET"
            self.note(QueueViolation("QueueResetNotNegotiated", "2.6.1", without, queue=index))
        else:
            self.disable_queue(index)

    def kick(self, queue_index: int) -> None:
        """The driver kicks a queue: it is marked, and looked at in a turn of its own. From any thread; see `Bus.kick`.

        A queue that does not exist, or is not enabled, is no reason to do anything (X03).
        """
        if 0 <= queue_index < len(self._slots):
            self._loop.pend((self, "kick", queue_index), lambda: self._run(queue_index))

    def _fresh_slots(self) -> list[QueueSlot]:
        return [QueueSlot(index, size, size) for index, size in enumerate(self.device.queue_sizes)]

    def _build(self, slot: QueueSlot) -> None:
        """Make the device end of an enabled queue; an impossible one breaks the device."""
        try:
            slot.queue = self.make_queue(slot, self._accepted)
        except PeerError as error:
            self.broken(error)

    def make_queue(self, slot: QueueSlot, features: FeatureSet, state: QueueState | None = None) -> DeviceQueue:
        """The device end of a queue as its registers say, which interrupts through this bank.

        Raises:
            PeerError: they cannot be a queue.
        """
        index = slot.index
        call = Notifier.callback(lambda: self.call(index))
        return slot.make(self._memory, features, policy=self.policy, state=state, call=call)

    def start_queues(self) -> None:
        """Let every enabled queue run, of a device that does."""
        if not self._active:
            self._activate()
        for slot in self._slots:
            if slot.enabled and not slot.started:
                self._start(slot)

    def stop_queues(self) -> None:
        """Stop every queue; marks of kicks, threads' last too, are forgotten: one that starts again is looked at."""
        self._waiting.clear()
        for slot in self._slots:
            self._stop(slot)
            self._loop.unpend((self, "kick", slot.index))

    def _start(self, slot: QueueSlot) -> None:
        if slot.queue is None:
            self._build(slot)
        if slot.queue is None or not self.live or self._held:
            return
        if slot.queue.stopped:
            slot.queue.resume()
        slot.started = True
        with self._guarded():
            self.device.start_queue(slot.queue)
        self.kick(slot.index)

    def _stop(self, slot: QueueSlot) -> None:
        if slot.started:
            slot.started = False
            with self._guarded():
                self.device.stop_queue(slot.index)

    def _run(self, index: int) -> bool:
        if self._held:
            self._waiting.add(index)
            return False
        if self.legacy and not self._active and self._slots[index].enabled:
            # Some legacy drivers use the device before DRIVER_OK, which a transitional device must bear (3.1.2).
            self._accept_legacy()
            self._activate()
        if self.suspension.refuses(f"queue {index} kicked"):
            return False
        with self._guarded():
            return self.live and self.device.kicked(index)
        return False

    @contextmanager
    def _guarded(self) -> Generator[None]:
        """Whatever goes wrong inside breaks the device, and not who serves it."""
        try:
            yield
        except PeerError as error:
            self.broken(error)
        except Exception as error:
            # Loaded only here: importing the package must stay cheap.
            import logging

            logging.getLogger("virtio_test.device").exception("the device failed")
            self.broken(HandlerError(f"the device failed: {type(error).__name__}: {error}"))

    # --- memory that moves ----------------------------------------------------------------------------------

    def hold(self) -> None:
        """Use no guest memory until `release`; kicks are remembered."""
        self._held = True
        if isinstance(self.device, Holdable):
            with self._guarded():
                self.device.hold()

    def release(self) -> None:
        """Go on after `hold`: queues that were enabled meanwhile start, and every one is looked at."""
        self._held = False
        if isinstance(self.device, Holdable):
            with self._guarded():
                self.device.release()
        for slot in self._slots:
            if self._active and slot.enabled and not slot.started:
                self._start(slot)
            elif slot.started or slot.index in self._waiting:
                self.kick(slot.index)
        self._waiting.clear()

    # --- configuration space --------------------------------------------------------------------------------

    def config_size(self) -> int:
        """Bytes of the configuration space."""
        return self.device.config.size

    def config_generation(self) -> int:
        """The generation of the configuration space; a transport shows as many bits of it as it has."""
        view = self.suspension.view
        return self.device.config.generation if view is None else view[1]

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration space.

        Raises:
            StatusViolation: `ConfigOutOfRange`.
        """
        data, view = self.device.config.read(offset, length), self.suspension.view
        return data if view is None else view[0][offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space; fields that the driver may not write stay.

        Raises:
            StatusViolation: `ConfigOutOfRange`; nothing was written.
        """
        if self.suspension.refuses("configuration space written"):
            return
        try:
            self.device.config.write(offset, data)
        except StatusViolation:
            raise
        except Exception:
            with self._guarded():
                raise

    # --- saved state ----------------------------------------------------------------------------------------

    def park(self) -> list[tuple[QueueSlot, QueueState | None]]:
        """Stop each queue, note where it stands, and let it go on; None for one that was never made.

        What was under way towards a suspension, or out of it, is done before.

        Raises:
            StateError: requests in flight are neither in a ring nor answered; everything goes on all the same.
        """
        self.suspension.finish()
        parked: list[tuple[QueueSlot, QueueState | None]] = []
        flying: list[int] = []
        for slot in self._slots:
            running = slot.started
            self._stop(slot)
            parked.append((slot, None if slot.queue is None else slot.queue.state))
            if slot.queue is not None and slot.queue.latched is None:
                if slot.queue.in_flight:
                    flying.append(slot.index)
                if running:
                    self._start(slot)
        if flying:
            why = "that fit their rings no more, and it is held, or was suspended so: release or resume it first"
            raise StateError(f"the device has requests in flight of the queues {flying} {why}")
        return parked

    def adopt(
        self,
        device: Device,
        *,
        status: int,
        features: FeatureSet,
        interface: Literal["modern", "legacy"] | None,
        slots: list[QueueSlot],
        own: Mapping[str, object],
        config_due: bool,
    ) -> None:
        """Take over a saved state that `saved` has checked, around `device`.

        Args:
            device: the device from now on; the present one, or another.
            status: the device status.
            features: what was accepted.
            interface: the interface in use.
            slots: the virtqueues, each enabled one with its queue where it has one.
            own: the device's own state.
            config_due: whether a configuration change notification is still to be sent.

        Raises:
            SavedStateError: the device refuses `own`; nothing was changed.
        """
        device.restore(own)
        self.reset()
        if device is self.device:
            # Its reset may have taken something back; the same state was accepted a moment ago.
            device.restore(own)
        else:
            self.device.detach()
            device.attach(self)
            if self._held and isinstance(device, Holdable):
                device.hold()
        self.device: Device = device
        self._slots, self._accepted, self._interface = slots, features, interface
        self.status.restore(status)
        indices = {slot.index for slot in slots if slot.queue is not None}
        self.suspension.restored(calls=indices, config=config_due)
        if self.status.broken:
            self._latch_all("it was when its state was saved")
        # A legacy driver that used its device before DRIVER_OK, which alone leaves features agreed upon, may wait.
        if self.status.live or (self.legacy and self.status.features_ok):
            self._activate()
            for index in sorted(indices):
                # What was used just before the state was saved may not have been told.
                self.call(index)
        elif self.suspension.active and not self.status.broken:
            # Its queues start with the resume; what it changes until then has to be told with that.
            self._activate()
        if config_due and not self.suspension.active:
            self._mark_config()

"""`Loopback`: a device and its driver in one process, over one guest memory, without any transport's registers.

Theory
------
The loopback has two faces. To the driver it is `Registers`; to the device it is its `Bus`. Between them stand
the status machine, the negotiation and the queues, as the specification has them, and the owner loop: a kick, a
call and a configuration change only leave a mark, and are delivered in turns of their own. So the order of
events is that of a machine with a fast guest, and two runs are the same run.

**When the driver breaks a rule** the device is broken once: NEEDS_RESET appears, and one configuration change
notification goes out if DRIVER_OK was set. From then on no queue runs and no queue interrupts, until a reset.
What was found is in `errors`.

**Saved state**: `save()` stops each queue, drains it, notes where it stands and lets it go on. `restore()` puts
all of it in place, if wanted around another device object; the driver notices nothing and finds its requests
still in flight. Guest memory itself is not part of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, QueueConfig, QueueState
from virtio_test.clock import Clock, VirtualClock
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, NoFeature, PeerError, QueueViolation, SavedStateError, StateError
from virtio_test.features import FeatureSet, check_own_offer, judge_accepted
from virtio_test.loop import OwnerLoop
from virtio_test.status import Action, DeviceStatus

__all__ = ["Loopback"]

_MEMORY_SIZE: Final = 16 << 20
_STATE_VERSION: Final = 1
_STATE_FIELDS: Final = {"version", "status", "features", "queues", "device"}
_QUEUE_FIELDS: Final = ("index", "size", "desc", "driver", "device", "avail", "used")


@dataclass(slots=True)
class _Slot:
    """One virtqueue: what the driver set up, and the queue made of it once it is enabled."""

    config: QueueConfig
    queue: DeviceQueue
    started: bool = False


class Loopback:
    """One device, and the registers that its driver uses.

    Args:
        device: the device; it is attached at once.
        loop: the owner loop; one with a `VirtualClock` that it moves itself, when None.
        memory: the guest memory; 16 MiB at address 0, when None.
        offered: what of the device's features to offer; all when None.
        policy: tolerances towards the driver.

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
    ) -> None:
        offer = device.features if offered is None else offered
        if extra := offer - device.features:
            raise InvalidArgument(f"the device cannot offer {extra}")
        check_own_offer(offer)
        self._loop = OwnerLoop(clock=VirtualClock()) if loop is None else loop
        self._memory = GuestMemory([(0, _MEMORY_SIZE)]) if memory is None else memory
        self.device = device
        self.offered = offer
        self.policy = policy
        self.status = DeviceStatus()
        self.errors: list[Exception] = []
        self._accepted = offer - offer
        self._slots: dict[int, _Slot] = {}
        self._call: Callable[[int], object] = lambda _: None
        self._changed: Callable[[], object] = lambda: None
        device.attach(self)

    def __repr__(self) -> str:
        return f"<Loopback of {self.device!r}, status {self.status}, queues {sorted(self._slots)}>"

    # --- both faces -----------------------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """The owner loop of both ends."""
        return self._loop

    @property
    def memory(self) -> GuestMemory:
        """The guest memory."""
        return self._memory

    # --- the bus, for the device ----------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        """The loop's clock."""
        return self._loop.clock

    def call(self, queue_index: int) -> None:
        """See `Bus.call`."""
        if self.status.live:
            self._loop.pend((self, "call", queue_index), lambda: self._call(queue_index))

    def config_changed(self) -> None:
        """See `Bus.config_changed`."""
        if self.status.live:
            self._loop.pend((self, "config"), self._deliver_config)

    def broken(self, error: Exception) -> None:
        """See `Bus.broken`."""
        self.errors.append(error)
        notify = self.status.needs_reset()
        for index, slot in self._slots.items():
            # No queue pops, completes or interrupts any more, not even the ones that nothing was wrong with.
            if slot.queue.latched is None:
                slot.queue.latch(QueueViolation("DeviceBroken", "2.1.2", f"the device is broken: {error}", queue=index))
        if notify:
            self._loop.pend((self, "config"), self._deliver_config)

    def _deliver_config(self) -> None:
        self._changed()

    # --- the registers, for the driver ----------------------------------------------------------------------

    @property
    def transport(self) -> str | None:
        """No transport's features are out of place here."""
        return None

    def device_id(self) -> int:
        """See `Registers.device_id`."""
        return self.device.device_id

    def device_features(self) -> int:
        """See `Registers.device_features`."""
        return self.offered.bits

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`; without effect once FEATURES_OK stands."""
        if not self.status.features_ok:
            self._accepted = FeatureSet.from_bits(features, device=self.offered.device)

    def read_status(self) -> int:
        """See `Registers.read_status`."""
        return self.status.value

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`."""
        good = judge_accepted(self.offered, self._accepted) is None
        change = self.status.write(status, features_ok=good, suspend_negotiated="SUSPEND" in self._accepted)
        self.errors += change.violations
        for action in change.actions:
            if action is Action.RESET:
                self._reset()
            elif action is Action.ACTIVATE:
                self.device.activate(self._accepted)
                for index in sorted(self._slots):
                    self._start(index)
            elif action is Action.FAILED:
                for index in self._slots:
                    self._stop(index)

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`."""
        return list(self.device.queue_sizes)

    def kick_notifier(self, index: int) -> Notifier:
        """See `Registers.kick_notifier`."""
        return Notifier.callback(lambda: self._loop.pend((self, "kick", index), lambda: self._run(index)))

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`. An impossible queue breaks the device, as its register writes would.

        Raises:
            StateError: features are not agreed upon yet, or the queue is enabled already.
            InvalidArgument: the device has no such queue, or it is smaller.
        """
        sizes = self.device.queue_sizes
        if not self.status.features_ok:
            raise StateError("queues are set up after FEATURES_OK (VIRTIO 1.4, 3.1.1)")
        if config.index in self._slots:
            raise StateError(f"queue {config.index} is enabled already: reset it first")
        if config.index >= len(sizes) or config.size > sizes[config.index]:
            raise InvalidArgument(f"queue {config.index} with {config.size} entries, but the device has {list(sizes)}")
        own = self._own_config(config.index, config.size, config.desc, config.driver, config.device)
        try:
            self._slots[config.index] = self._slot(own, None)
        except PeerError as error:
            self.broken(error)
            return
        if self.status.live:
            self._start(config.index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`.

        Raises:
            NoFeature: RING_RESET was not negotiated.
            InvalidArgument: the queue is not enabled.
        """
        if "RING_RESET" not in self._accepted:
            raise NoFeature("a queue cannot be reset alone: RING_RESET was not negotiated")
        slot = self._slots.get(index)
        if slot is None:
            raise InvalidArgument(f"queue {index} is not enabled; enabled are {sorted(self._slots)}")
        # A new generation first: what the device lets go of while it stops must not reach the driver's ring.
        slot.queue.reset()
        self._stop(index)
        del self._slots[index]
        self._loop.unpend((self, "kick", index))
        self._loop.unpend((self, "call", index))

    def config_size(self) -> int:
        """See `Registers.config_size`."""
        return self.device.config.size

    def config_generation(self) -> int:
        """See `Registers.config_generation`."""
        return self.device.config.generation

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`."""
        return self.device.config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`."""
        self.device.config.write(offset, data)

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self._call = call
        self._changed = config_changed

    # --- queues ---------------------------------------------------------------------------------------------

    def queue(self, index: int) -> DeviceQueue:
        """The device end of an enabled queue.

        Raises:
            StateError: it is not enabled.
        """
        slot = self._slots.get(index)
        if slot is None:
            raise StateError(f"queue {index} is not enabled; enabled are {sorted(self._slots)}")
        return slot.queue

    def _own_config(self, index: int, size: int, desc: int, driver: int, device: int) -> QueueConfig:
        features = self._accepted.bits & 0xFFFF_FFFF_FFFF_FFFF
        return QueueConfig(
            size, desc=desc, driver=driver, device=device, index=index, features=features, policy=self.policy
        )

    def _slot(self, config: QueueConfig, state: QueueState | None) -> _Slot:
        call = Notifier.callback(lambda: self.call(config.index))
        return _Slot(config, DeviceQueue(self._memory, config, state=state, call=call))

    def _start(self, index: int) -> None:
        slot = self._slots[index]
        slot.started = True
        self.device.start_queue(slot.queue)
        self._loop.pend((self, "kick", index), lambda: self._run(index))

    def _stop(self, index: int) -> None:
        slot = self._slots[index]
        if slot.started:
            slot.started = False
            self.device.stop_queue(index)

    def _run(self, index: int) -> bool:
        return self.status.live and self.device.kicked(index)

    def _reset(self) -> None:
        for index, slot in self._slots.items():
            slot.queue.reset()
            slot.queue.stop()
            self._loop.unpend((self, "kick", index))
            self._loop.unpend((self, "call", index))
        self._loop.unpend((self, "config"))
        self._slots.clear()
        self._accepted = self.offered - self.offered
        self.device.reset()

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """Status, features, queues and the device's own state as JSON values; everything goes on afterwards."""
        queues: list[dict[str, int]] = []
        for index, slot in sorted(self._slots.items()):
            running = slot.started
            self._stop(index)
            state = slot.queue.state
            config = slot.config
            values = (index, config.size, config.desc, config.driver, config.device, state.avail, state.used)
            queues.append(dict(zip(_QUEUE_FIELDS, values, strict=True)))
            if running and slot.queue.latched is None and self.status.live:
                slot.queue.resume()
                self._start(index)
        return {
            "version": _STATE_VERSION,
            "status": self.status.save(),
            "features": self._accepted.bits,
            "queues": queues,
            "device": self.device.save(),
        }

    def restore(self, state: Mapping[str, object], *, device: Device | None = None) -> None:
        """Take over what `save` gave, around `device` if one is given.

        Raises:
            SavedStateError: the state is malformed or does not fit; nothing was changed.
        """
        target = self.device if device is None else device
        status, features, configs = self._checked(state, target)
        before = self._accepted
        self._accepted = features
        try:
            slots = {
                each["index"]: self._slot(
                    self._own_config(*(each[name] for name in _QUEUE_FIELDS[:5])),
                    QueueState(each["avail"], each["used"]),
                )
                for each in configs
            }
            target.restore(cast("Mapping[str, object]", state["device"]))
        except SavedStateError:
            self._accepted = before
            raise
        except (PeerError, ValueError) as error:
            self._accepted = before
            raise SavedStateError(f"the saved queues do not fit: {error}") from error
        for slot in self._slots.values():
            slot.queue.reset()
            slot.queue.stop()
        self.device.reset()
        if target is self.device:
            # Its reset may have taken something back; the same state was accepted a moment ago.
            target.restore(cast("Mapping[str, object]", state["device"]))
        else:
            self.device.detach()
            target.attach(self)
        self.device = target
        self._slots = slots
        self.status.restore(status)
        if self.status.live:
            target.activate(features)
            for index in sorted(slots):
                self._start(index)
                # What was used just before the state was saved may not have been told.
                self.call(index)

    def _checked(self, state: Mapping[str, object], device: Device) -> tuple[int, FeatureSet, list[dict[str, int]]]:
        if set(state) != _STATE_FIELDS or state["version"] != _STATE_VERSION or isinstance(state["version"], bool):
            raise SavedStateError(f"a saved state has version {_STATE_VERSION} and the fields {sorted(_STATE_FIELDS)}")
        DeviceStatus().restore(state["status"])
        bits = state["features"]
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise SavedStateError(f"the saved features {bits!r} are no number")
        try:
            features = FeatureSet.from_bits(bits, device=self.offered.device)
        except InvalidArgument as error:
            raise SavedStateError(f"the saved features do not fit: {error}") from None
        if problem := judge_accepted(self.offered, features) if bits else None:
            raise SavedStateError(f"the saved features do not fit: {problem}")
        if not isinstance(state["device"], Mapping) or not isinstance(state["queues"], list):
            raise SavedStateError("the saved state has no device, or no list of queues")
        queues = [_checked_queue(each, device) for each in cast("list[object]", state["queues"])]
        if len({each["index"] for each in queues}) != len(queues):
            raise SavedStateError("the saved state has a queue twice")
        return cast("int", state["status"]), features, queues


def _checked_queue(saved: object, device: Device) -> dict[str, int]:
    fields = cast("dict[str, Any]", saved)
    if not isinstance(saved, dict) or set(fields) != set(_QUEUE_FIELDS):
        raise SavedStateError(f"a saved queue has the fields {', '.join(_QUEUE_FIELDS)}")
    if any(
        isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64 for value in fields.values()
    ):
        raise SavedStateError(f"the fields of a saved queue are numbers, not {fields}")
    sizes = device.queue_sizes
    if fields["index"] >= len(sizes) or not 1 <= fields["size"] <= sizes[fields["index"]]:
        raise SavedStateError(f"the saved queue {fields['index']} of {fields['size']} does not fit into {list(sizes)}")
    if fields["avail"] > 0xFFFF or fields["used"] > 0xFFFF:
        raise SavedStateError(f"the saved positions {fields['avail']}, {fields['used']} have more than 16 bits")
    return fields

"""`Loopback`: a device and its driver in one process, over one guest memory, without any transport's registers.

Theory
------
To the driver the loopback is `Registers`; behind it stands a `RegisterBank`, as behind every register transport,
which is the device's `Bus`. A kick, a call and a configuration change only leave a mark, and are delivered in turns
of their own. So the order of events is that of a machine with a fast guest, and two runs are the same run.

What the driver did against the rules, and what broke the device, is in `errors`.

**Saved state**: `save()` stops each queue, drains it, notes where it stands and lets it go on. `restore()` puts
all of it in place, if wanted around another device object; the driver notices nothing and finds its requests
still in flight. Guest memory itself is not part of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, QueueConfig
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, NoFeature, StateError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.status import DeviceStatus
from virtio_test.transport.bank import RegisterBank
from virtio_test.transport.saved import check, restore, save

__all__ = ["Loopback"]


class Loopback:
    """One device, and the registers that its driver uses.

    Args:
        device: the device; it is attached at once.
        loop: the owner loop; one with a `VirtualClock` that it moves itself, when None.
        memory: the guest memory; 16 MiB at address 0, when None.
        offered: what of the device's features to offer; all when None.
        policy: tolerances towards the driver.

    Attributes:
        bank: the registers behind this face; the device's bus.

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
        self.bank = RegisterBank(device, loop=loop, memory=memory, offered=offered, policy=policy)

    def __repr__(self) -> str:
        enabled = [slot.index for slot in self.bank.slots if slot.enabled]
        return f"<Loopback of {self.device!r}, status {self.status}, queues {enabled}>"

    @property
    def device(self) -> Device:
        """The device behind the registers."""
        return self.bank.device

    @property
    def status(self) -> DeviceStatus:
        """The status machine."""
        return self.bank.status

    @property
    def errors(self) -> list[Exception]:
        """What was found, oldest first; see `RegisterBank`."""
        return self.bank.errors

    @property
    def offered(self) -> FeatureSet:
        """The features on offer."""
        return self.bank.offered

    def queue(self, index: int) -> DeviceQueue:
        """The device end of an enabled queue.

        Raises:
            StateError: it is not enabled.
        """
        return self.bank.queue(index)

    # --- the registers, for the driver ----------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """The owner loop of both ends."""
        return self.bank.loop

    @property
    def memory(self) -> GuestMemory:
        """The guest memory."""
        return self.bank.memory

    @property
    def transport(self) -> str | None:
        """No transport's features are out of place here."""
        return None

    @property
    def legacy(self) -> bool:
        """See `Registers.legacy`; there is no legacy interface here."""
        return False

    def device_id(self) -> int:
        """See `Registers.device_id`."""
        return self.device.device_id

    def device_features(self) -> int:
        """See `Registers.device_features`."""
        return self.offered.bits

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`; without effect once FEATURES_OK stands."""
        for select in range(4):
            self.bank.write_driver_features(select, features >> 32 * select)

    def read_status(self) -> int:
        """See `Registers.read_status`."""
        return self.bank.read_status()

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`."""
        self.bank.write_status(status)

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`."""
        return [slot.max_size for slot in self.bank.slots]

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002 - kicks carry nothing
        """See `Registers.kick_notifier`."""
        return Notifier.callback(lambda: self.bank.kick(index))

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`. An impossible queue breaks the device, as its register writes would.

        Raises:
            StateError: features are not agreed upon yet, or the queue is enabled already.
            InvalidArgument: the device has no such queue, or it is smaller.
        """
        if not self.status.features_ok:
            raise StateError("queues are set up after FEATURES_OK (VIRTIO 1.4, 3.1.1)")
        slot = self.bank.slot(config.index)
        if slot is None or config.size > slot.max_size:
            sizes = self.queue_max_sizes()
            raise InvalidArgument(f"queue {config.index} with {config.size} entries, but the device has {sizes}")
        if slot.enabled:
            raise StateError(f"queue {config.index} is enabled already: reset it first")
        slot.size = config.size
        slot.desc, slot.driver, slot.device = config.desc, config.driver, config.device
        self.bank.enable_queue(config.index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`.

        Raises:
            NoFeature: RING_RESET was not negotiated.
            InvalidArgument: the queue is not enabled.
        """
        if "RING_RESET" not in self.bank.accepted:
            raise NoFeature("a queue cannot be reset alone: RING_RESET was not negotiated")
        slot = self.bank.slot(index)
        if slot is None or not slot.enabled:
            enabled = [each.index for each in self.bank.slots if each.enabled]
            raise InvalidArgument(f"queue {index} is not enabled; enabled are {enabled}")
        self.bank.reset_queue(index)

    def config_size(self) -> int:
        """See `Registers.config_size`."""
        return self.bank.config_size()

    def config_generation(self) -> int:
        """See `Registers.config_generation`."""
        return self.bank.config_generation()

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`."""
        return self.bank.read_config(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`."""
        self.bank.write_config(offset, data)

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self.bank.on_call = call
        self.bank.on_config = config_changed

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The state as JSON values, as `transport.saved` describes it; everything goes on afterwards."""
        return save(self.bank)

    def restore(self, state: Mapping[str, object], *, device: Device | None = None) -> None:
        """Take over what `save` gave, around `device` if one is given.

        Raises:
            SavedStateError: the state is malformed or does not fit; nothing was changed.
        """
        restore(self.bank, check(self.bank, state, self.device if device is None else device))

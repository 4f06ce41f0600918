"""`Registers`: what any transport shows a driver.

Theory
------
A driver sees the same few things through PCI, MMIO, vhost-user or the loopback: features, a status, queues to
set up, a configuration space and two kinds of interrupt. A transport implements this protocol once, and every
driver runs over it, on our devices and on other people's.

The registers only carry: they neither negotiate nor wait. Interrupts come as calls in the owner loop, as turns
of their own, never from inside one of the methods below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from virtio_test._core import GuestMemory, Notifier, QueueConfig
from virtio_test.loop import OwnerLoop

__all__ = ["Registers"]


@runtime_checkable
class Registers(Protocol):
    """The device as its driver sees it."""

    @property
    def loop(self) -> OwnerLoop:
        """The loop that the interrupts arrive in; a driver that waits, runs it."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory, where the driver puts its rings and buffers."""
        ...

    @property
    def transport(self) -> str | None:
        """``pci``, ``mmio``, …: some features belong to one transport; None restricts nothing."""
        ...

    @property
    def legacy(self) -> bool:
        """Whether this is a legacy interface (VIRTIO 1.4, 1.3.1): 32 feature bits, no FEATURES_OK, no queue addresses.

        Queues then have the size that the device gives and lie as `RingLayout.legacy` says, from a multiple of
        4096 on.
        """
        ...

    def device_id(self) -> int:
        """The virtio device id; 0 means that there is no device."""
        ...

    def device_features(self) -> int:
        """The feature bits that the device offers."""
        ...

    def write_driver_features(self, features: int) -> None:
        """The feature bits that the driver accepts."""
        ...

    def read_status(self) -> int:
        """The device status."""
        ...

    def write_status(self, status: int) -> None:
        """Write the device status; 0 resets, and the reset has ended when 0 is read back."""
        ...

    def queue_max_sizes(self) -> list[int]:
        """The largest size of each virtqueue; 0 means that the queue is not available."""
        ...

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:
        """What kicks the queue `index`; the kick has an effect once the queue is enabled.

        Args:
            index: the virtqueue.
            position: where the driver will make the next buffer available, 16 bits as in `QueueState.avail`, for
                kicks that carry it (NOTIFICATION_DATA; 2.9).
        """
        ...

    def enable_queue(self, config: QueueConfig) -> None:
        """Set the queue `config.index` up and enable it. Size, addresses and the packed ring count, no policy."""
        ...

    def reset_queue(self, index: int) -> None:
        """Reset one queue alone (RING_RESET; VIRTIO 1.4, 2.6.1); when this returns, it is reset."""
        ...

    def config_size(self) -> int:
        """Bytes of the device configuration space."""
        ...

    def config_generation(self) -> int:
        """The generation of the configuration space."""
        ...

    def read_config(self, offset: int, length: int) -> bytes:
        """Read `length` bytes of the configuration space."""
        ...

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space."""
        ...

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """From now on: `call(queue_index)` per used buffer notification, `config_changed()` per configuration's."""
        ...

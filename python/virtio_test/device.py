"""`Device` and `Bus`: the two protocols between a device and whatever transports it.

Theory
------
A device knows its features, its configuration space and what its queues mean. It knows no register, no
socket and no status bit: these are the transport's. The transport (or the loopback) hands it validated
queues and tells it when one was kicked; the device answers through the queues and through its `Bus`.

The life of a device, as its transport sees it; everything runs in the owner loop, never nested::

    attach(bus) ──► activate(features) ──► start_queue(q) … ──► kicked(i)* ──► stop_queue(i) … ──► reset()
                         ▲                                                                            │
                         └────────────────────────────────────────────────────────────────────────────┘

* `activate` comes with DRIVER_OK; behind vhost-user, which may not carry the status, with the first ring
  that runs. `start_queue` follows it, once per queue that the driver enabled.
* Buffers may lie in a ring before it starts, and no kick need come for them (VIRTIO 1.4, 3.1.1): whoever
  calls `start_queue` marks that queue pending afterwards.
* `kicked` does a bounded amount of work. It returns True when more is waiting: the queue stays pending.
  A callback of `OwnerLoop.pend` may return that value as it is.
* `stop_queue` returns when nothing of that queue runs any more; the transport then reads `queue.state`.
* A device that uses queues elsewhere than in these calls, from a timer or a thread of its own, is `Holdable` too: there
  are times in which nobody may touch guest memory, such as those in which a PCI function is not bus master.
* A device whose threads work on queues may wait for kicks itself, where they come on an fd (`Threaded`).
* A broken rule of the driver is reported once through `bus.broken`; the queue is latched by then. What the
  other side gets to see of it (NEEDS_RESET, an err fd) is the transport's matter.

`virtio_test.devices.base.BaseDevice` implements `Device` for handlers; a device of one's own is one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

from ._core import DeviceQueue, GuestMemory
from .clock import Clock
from .config import ConfigSpace
from .features import FeatureSet, Requirements

__all__ = ["RING_FEATURES", "Bus", "Device", "Holdable", "Threaded"]

RING_FEATURES: Final = FeatureSet("VERSION_1", "INDIRECT_DESC", "EVENT_IDX", "RING_PACKED", "IN_ORDER", "RING_RESET")
"""What the queues of the core can do at either end; a device offers these beside the bits of its class."""


@runtime_checkable
class Bus(Protocol):
    """What a device may ask of its transport. All calls are made in the owner loop, unless said otherwise."""

    @property
    def memory(self) -> GuestMemory:
        """The guest memory that queues and buffers lie in."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock that the device's timers run on."""
        ...

    def call(self, queue_index: int) -> None:
        """Interrupt the driver for that queue, whatever it asked for; `DeviceQueue.signal` is the usual way."""
        ...

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed; dropped while the driver is not live."""
        ...

    def kick(self, queue_index: int) -> None:
        """Have `Device.kicked` called for that queue, as if the driver had kicked it. From any thread."""
        ...

    def broken(self, error: Exception) -> None:
        """The device cannot go on: `error` is the broken rule, or what a handler raised. At most once per reset."""
        ...


@runtime_checkable
class Device(Protocol):
    """One virtio device, the same object behind every transport and carrier."""

    @property
    def device_id(self) -> int:
        """The virtio device id (VIRTIO 1.4, 5)."""
        ...

    @property
    def features(self) -> FeatureSet:
        """All that the device can offer: bits of its class and bits of the ring."""
        ...

    @property
    def requires(self) -> Requirements:
        """Features of the class that presuppose others, by name (VIRTIO 1.4, 2.2.1)."""
        ...

    @property
    def transitional(self) -> bool:
        """Whether a driver may leave VERSION_1 out and is then served by the legacy rules (1.3.1)."""
        ...

    @property
    def queue_sizes(self) -> Sequence[int]:
        """The largest size of each virtqueue, in order of their indices."""
        ...

    @property
    def config(self) -> ConfigSpace:
        """The device configuration space; the transport reads and writes it for the driver."""
        ...

    def attach(self, bus: Bus) -> None:
        """The device now lives on `bus`. Timers that run from the making of the device start here, once."""
        ...

    def detach(self) -> None:
        """The device leaves its bus for good, after a reset: its timers stop."""
        ...

    def activate(self, features: FeatureSet) -> None:
        """The driver is live with these negotiated features."""
        ...

    def start_queue(self, queue: DeviceQueue) -> None:
        """`queue` runs from now on, until `stop_queue` or `reset`."""
        ...

    def kicked(self, queue_index: int) -> bool:
        """Process what is available now; True when the bound was reached and more is waiting.

        A queue that does not run, is latched or does not exist is no error: there is nothing to do.
        """
        ...

    def stop_queue(self, queue_index: int) -> None:
        """No new chains of that queue. Kept chains go back to the ring or are completed; bounded in time."""
        ...

    def reset(self) -> None:
        """Device reset: every queue is forgotten, what was in flight is dropped, the driver's choices too."""
        ...

    def save(self) -> dict[str, object]:
        """The device's own state as JSON values, with its version; queues and status are saved by the carrier."""
        ...

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over a saved state.

        Raises:
            SavedStateError: the state is malformed or of another device; nothing was changed.
        """
        ...


@runtime_checkable
class Holdable(Protocol):
    """A device that uses queues or guest memory when nobody has called it, and can let that be.

    Both calls are made in the owner loop.
    """

    def hold(self) -> None:
        """Nothing of the device's uses a queue or guest memory from when this returns until `release`; bounded in time.

        It may come again, and lasts over a `reset`. No queue starts meanwhile, and none is kicked.
        """
        ...

    def release(self) -> None:
        """Memory may be used again. Every queue that runs is kicked afterwards."""
        ...


@runtime_checkable
class Threaded(Protocol):
    """A device whose queues may be worked on by threads of its own. It is `Holdable` too."""

    def take_kick(self, queue_index: int, fd: int | None) -> bool:
        """Kicks of that queue arrive on `fd` from now on; None: on none, or on no fd. In the owner loop.

        Returns:
            Whether the device waits for them itself while the queue runs; then nobody else may read `fd`, which stays
            open until the next call.
        """
        ...

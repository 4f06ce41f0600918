"""`QueueSlot`: the registers of one virtqueue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, QueueConfig, QueueState
from virtio_test.errors import QueueViolation
from virtio_test.features import FeatureSet

__all__ = ["Area", "QueueSlot"]

Area: TypeAlias = Literal["desc", "driver", "device"]


@dataclass(slots=True)
class QueueSlot:
    """One virtqueue: what the driver has written for it, and the queue made of it once it can be.

    Attributes:
        index: the virtqueue.
        max_size: the largest size that the device takes.
        size: what the driver chose, `max_size` before it does.
        desc: guest address of the descriptor area.
        driver: guest address of the driver area.
        device: guest address of the device area.
        enabled: whether the driver has enabled it; the registers above are frozen then.
        queue: the device end, from then on.
        started: whether the device works on it.
    """

    index: int
    max_size: int
    size: int
    desc: int = 0
    driver: int = 0
    device: int = 0
    enabled: bool = False
    queue: DeviceQueue | None = None
    started: bool = False

    def make(
        self,
        memory: GuestMemory,
        features: FeatureSet,
        *,
        policy: Policy,
        state: QueueState | None,
        call: Notifier,
    ) -> DeviceQueue:
        """The device end of a queue as the registers say.

        Raises:
            PeerError: they cannot be a queue.
        """
        config = QueueConfig(
            self.size,
            desc=self.desc,
            driver=self.driver,
            device=self.device,
            index=self.index,
            features=features.bits & 0xFFFF_FFFF_FFFF_FFFF,
            policy=policy,
        )
        return DeviceQueue(memory, config, state=state, call=call)

    def revoke(self) -> None:
        """A new generation: whoever still holds a chain of the queue can write nothing any more."""
        if self.queue is None:
            return
        try:
            self.queue.reset()
        except QueueViolation as error:
            # Its memory has gone before it: nothing is written into that, and a latched queue takes nothing either.
            self.queue.latch(error)
        self.queue.stop()

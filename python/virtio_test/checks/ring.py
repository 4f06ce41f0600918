"""A ring at rest as one object: where it lies, where its two ends stand, and what is broken in it."""

from __future__ import annotations

from dataclasses import dataclass

from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Policy, QueueConfig, QueueState
from virtio_test.errors import QueueViolation

from .lint import check_ring

__all__ = ["Ring"]


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring in guest memory that nobody is at work on: a dump, a device that stands still, a running queue's own.

    Attributes:
        memory: where it lies; it is only read.
        config: size, addresses, features and policy.
        state: where the device stands; as `check_ring` says if None.
        driver_state: where the driver stands; as `check_ring` says if None. Split rings only.
    """

    memory: GuestMemory
    config: QueueConfig
    state: QueueState | None = None
    driver_state: QueueState | None = None

    @classmethod
    def of(cls, queue: DeviceQueue | DriverQueue) -> Ring:
        """The ring of a queue, where that end of it stands now; the other end must not be at work meanwhile."""
        if isinstance(queue, DeviceQueue):
            return cls(queue.memory, queue.config, state=queue.state)
        driver_state = None if queue.config.packed else queue.state
        return cls(queue.memory, queue.config, driver_state=driver_state)

    def check(self, *, policy: Policy | None = None) -> list[QueueViolation]:
        """Everything that is broken in it, not only the first; see `check_ring`.

        Args:
            policy: what is tolerated; that of the config if None. `Policy.strict` tells all.

        Raises:
            InvalidArgument: a driver state for a packed ring.
        """
        config = self.config if policy is None else _under(self.config, policy)
        return check_ring(self.memory, config, state=self.state, driver_state=self.driver_state)


def _under(config: QueueConfig, policy: Policy) -> QueueConfig:
    return QueueConfig(
        config.size,
        desc=config.desc,
        driver=config.driver,
        device=config.device,
        index=config.index,
        features=config.features,
        policy=policy,
    )

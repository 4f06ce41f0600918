"""Used elements of a split ring, judged one by one by driver ends of our own making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from virtio_test._core import DriverQueue, GuestMemory, QueueConfig, QueueState, RingLayout
from virtio_test.errors import QueueViolation

__all__ = ["LONGEST", "UsedJudge", "moved"]

LONGEST: Final = 2**32 - 1


def moved(error: QueueViolation, config: QueueConfig, *, position: int, address: int | None = None) -> QueueViolation:
    """An error that a ring of our own making has raised, at the place in the image that it is about."""
    return QueueViolation(
        error.rule,
        error.clause,
        error.message,
        queue=config.index,
        position=position,
        head=error.head,
        address=address,
    )


class _Ring:
    """A ring of our own, whose used elements we write."""

    def __init__(self, config: QueueConfig) -> None:
        self.layout = RingLayout.contiguous(config.size, 0)
        self.memory = GuestMemory([(0, -(-self.layout.end // 4096) * 4096)], backing="anonymous")
        self.config = QueueConfig.from_layout(self.layout, policy=config.policy)

    def driver(self, state: QueueState | None = None) -> DriverQueue:
        return DriverQueue(self.memory, self.config, state=state)

    def use(self, queue: DriverQueue, number: int, identity: int, length: int) -> QueueViolation | None:
        """Give the driver its used element `number`; what is wrong with it."""
        slot = number % self.layout.size
        self._put("used.ring.id", slot, identity.to_bytes(4, "little"))
        self._put("used.ring.len", slot, length.to_bytes(4, "little"))
        return self.publish(queue, number + 1)

    def publish(self, queue: DriverQueue, idx: int) -> QueueViolation | None:
        """Show the driver this used idx; what is wrong with it, or with the next element."""
        self._put("used.idx", 0, (idx & 0xFFFF).to_bytes(2, "little"))
        try:
            queue.get_used()
        except QueueViolation as error:
            return error
        return None

    def _put(self, name: str, index: int, value: bytes) -> None:
        self.memory.write(self.layout.at(name, index), value)


class UsedJudge:
    """A driver that has made a buffer available for every descriptor.

    Args:
        config: the queue in the image; size and policy count.
        writable: bytes that the buffer of a head can take; `LONGEST` for those that are not in it.
    """

    def __init__(self, config: QueueConfig, writable: Mapping[int, int]) -> None:
        self._writable = writable
        self._ring = _Ring(config)
        self._spare = _Ring(config)
        self._queue: DriverQueue | None = None
        self._taken: list[int] = []

    def idx(self, taken: int, idx: int, in_flight: int) -> QueueViolation | None:
        """Whether used.idx can be `idx`, with `taken` elements taken and `in_flight` buffers, size at most."""
        queue = self._spare.driver(QueueState(taken))
        for _ in range(in_flight):
            queue.add((), [(0, LONGEST)])
        queue.publish()
        error = self._spare.publish(queue, idx)
        return error if error is not None and error.rule == "UsedIdxTooFar" else None

    def identity(self, identity: int) -> QueueViolation | None:
        """Whether the queue can have this id at all."""
        queue = self._spare.driver()
        queue.add((), [(0, LONGEST)])
        queue.publish()
        error = self._spare.use(queue, 0, identity, 0)
        return error if error is not None and error.rule == "UsedIdOutOfRange" else None

    def take(self, identity: int, length: int) -> QueueViolation | None:
        """The next used element: what is wrong with it, or None; then its head is in flight no more."""
        # Cheaper to find than by the queue below, which has to be built anew after each error.
        if (error := self.identity(identity)) is not None:
            return error
        queue = self._full() if self._queue is None else self._queue
        error = self._ring.use(queue, len(self._taken), identity, length)
        self._queue = queue if error is None else None
        if error is None:
            self._taken.append(identity)
        return error

    def _full(self) -> DriverQueue:
        """A queue where all is in flight but what was taken."""
        queue = self._ring.driver()
        # A fresh queue gives out its descriptors in order, so each buffer's head is its number.
        for head in range(self._ring.layout.size):
            size = self._writable.get(head, LONGEST)
            queue.add(() if size else [(0, 1)], [(0, size)] if size else ())
        queue.publish()
        for number, identity in enumerate(self._taken):
            self._ring.use(queue, number, identity, 0)
        return queue

"""The two ends of a queue behind one interface each, so that a script plays the same on the model and on the core.

Any driver end meets any device end over one memory: core with core, core with model, model with core, and the
model with itself, whose transcript is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from virtio_test._core import Chain, DeviceQueue, DriverQueue, GuestMemory, Policy, QueueConfig, QueueState, RingLayout

from tests.property.model import (
    Element,
    Memory,
    PackedDevice,
    PackedDriver,
    PackedRing,
    Plan,
    Segment,
    SplitDevice,
    SplitDriver,
    SplitRing,
    gather,
    scatter,
)

INDIRECT_DESC, EVENT_IDX, RING_PACKED, IN_ORDER = 1 << 28, 1 << 29, 1 << 34, 1 << 35


def features_of(features: int, *, packed: bool) -> int:
    """The feature bits of a queue of this format."""
    return features | RING_PACKED * packed


@dataclass(frozen=True)
class Setup:
    """A queue before anything happens: format, size, place, where it begins, what was negotiated."""

    packed: bool
    size: int
    base: int
    start: int
    features: int
    policy: Policy = Policy.interop
    seed: int = 0

    @property
    def event_idx(self) -> bool:
        return bool(self.features & EVENT_IDX)

    @property
    def in_order(self) -> bool:
        return bool(self.features & IN_ORDER)

    @cached_property
    def layout(self) -> RingLayout:
        return RingLayout.contiguous(self.size, self.base, packed=self.packed)

    def config(self) -> QueueConfig:
        return QueueConfig.from_layout(self.layout, index=3, features=self.features, policy=self.policy)

    def state(self) -> QueueState:
        return QueueState(self.start, self.start)

    def split_ring(self, memory: Memory) -> SplitRing:
        return SplitRing(memory, self.size, self.layout.desc, self.layout.driver, self.layout.device)

    def packed_ring(self, memory: Memory) -> PackedRing:
        return PackedRing(memory, self.size, self.layout.desc, self.layout.driver, self.layout.device)

    def ring(self, memory: Memory) -> SplitRing | PackedRing:
        return self.packed_ring(memory) if self.packed else self.split_ring(memory)

    def model_driver(self, memory: Memory) -> SplitDriver | PackedDriver:
        if self.packed:
            ring = self.packed_ring(memory)
            return PackedDriver(ring, start=self.start, in_order=self.in_order, seed=self.seed)
        return SplitDriver(self.split_ring(memory), start=self.start, in_order=self.in_order, seed=self.seed)

    def model_device(self, memory: Memory) -> SplitDevice | PackedDevice:
        if self.packed:
            return PackedDevice(self.packed_ring(memory), start=self.start)
        return SplitDevice(self.split_ring(memory), start=self.start)


class DriverEnd(Protocol):
    """A driver end: tokens are whatever it gives for a buffer."""

    def add(self, plan: Plan) -> int: ...
    def publish(self) -> object: ...
    def kick(self) -> bool:
        """Whether the device wants to be kicked for what was published since the last time."""
        ...

    def take(self) -> list[tuple[int, int]]: ...


class DeviceEnd(Protocol):
    """A device end: buffers are handled by the number of their pop."""

    def pop(self) -> int | None: ...
    def segments(self, number: int) -> list[Segment]: ...
    def read(self, number: int) -> bytes: ...
    def finish(self, number: int, response: bytes) -> None: ...
    def call(self) -> bool:
        """Whether the driver wants to be called for what was used since the last time."""
        ...


class ModelDriverEnd:
    def __init__(self, setup: Setup, memory: Memory) -> None:
        self._driver = setup.model_driver(memory)
        self._event_idx = setup.event_idx

    def add(self, plan: Plan) -> int:
        return self._driver.add(plan)

    def publish(self) -> None:
        self._driver.publish()

    def kick(self) -> bool:
        return self._driver.wants_to_kick(event_idx=self._event_idx)

    def take(self) -> list[tuple[int, int]]:
        return self._driver.take()


class ModelDeviceEnd:
    """With IN_ORDER it keeps what is finished early until its turn comes (6.2)."""

    def __init__(self, setup: Setup, memory: Memory) -> None:
        self._device = setup.model_device(memory)
        self._memory = memory
        self._setup = setup
        self._popped: list[Element] = []
        self._done: dict[int, int] = {}
        self._next = 0

    def pop(self) -> int | None:
        element = self._device.pop()
        if element is None:
            return None
        self._popped.append(element)
        return len(self._popped) - 1

    def segments(self, number: int) -> list[Segment]:
        return self._popped[number].segments

    def read(self, number: int) -> bytes:
        return gather(self._memory, self._popped[number].segments)

    def finish(self, number: int, response: bytes) -> None:
        scatter(self._memory, self._popped[number].segments, response)
        if not self._setup.in_order:
            self._push(number, len(response))
            return
        self._done[number] = len(response)
        while self._next in self._done:
            self._push(self._next, self._done.pop(self._next))
            self._next += 1

    def _push(self, number: int, written: int) -> None:
        self._device.push((self._popped[number], written))

    def call(self) -> bool:
        return self._device.wants_to_call(event_idx=self._setup.event_idx)


class CoreDriverEnd:
    def __init__(
        self, setup: Setup, memory: GuestMemory, *, tables: int | None = None, entries: int = 16, fresh: bool = False
    ) -> None:
        state = None if fresh else setup.state()
        self.queue = DriverQueue(memory, setup.config(), state=state, indirect=tables, indirect_entries=entries)

    def add(self, plan: Plan) -> int:
        readable, writable = halves(plan.segments)
        return self.queue.add(readable, writable, indirect=plan.table is not None)

    def publish(self) -> None:
        self.queue.publish()

    def kick(self) -> bool:
        return self.queue.signal()

    def take(self) -> list[tuple[int, int]]:
        return self.queue.get_used_many()


class CoreDeviceEnd:
    def __init__(self, setup: Setup, memory: GuestMemory) -> None:
        self.queue = DeviceQueue(memory, setup.config(), state=setup.state())
        self._popped: list[Chain] = []

    def pop(self) -> int | None:
        chain = self.queue.pop()
        if chain is None:
            return None
        self._popped.append(chain)
        return len(self._popped) - 1

    def segments(self, number: int) -> list[Segment]:
        return [Segment(*segment) for segment in self._popped[number].segments]

    def read(self, number: int) -> bytes:
        return self._popped[number].read()

    def finish(self, number: int, response: bytes) -> None:
        chain = self._popped[number]
        assert chain.write(response) == len(response)
        assert chain.written == len(response)
        assert self.queue.push(chain)

    def call(self) -> bool:
        return self.queue.signal()


def halves(segments: Iterable[Segment]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(address, length) of the device-readable and of the device-writable segments."""
    segments = list(segments)
    return (
        [(s.address, s.length) for s in segments if not s.writable],
        [(s.address, s.length) for s in segments if s.writable],
    )

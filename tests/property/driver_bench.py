"""A bench for our driver end: an evil device's pen, beside the model's device which does what is right."""

from __future__ import annotations

from dataclasses import dataclass, field

from virtio_test._core import DriverQueue, GuestMemory, Policy, Trace

from tests.property.bench import DATA, RING
from tests.property.ends import Setup, features_of
from tests.property.model import Element


@dataclass
class DriverBench:
    """Our driver end of a queue of 8, and the pen of its device."""

    packed: bool
    policy: Policy = Policy.interop
    features: int = 0
    start: int = -1
    size: int = 8
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        start = self.start if self.start >= 0 else 0x8000 if self.packed else 0
        features = features_of(self.features, packed=self.packed)
        self.setup = Setup(self.packed, self.size, RING, start, features, self.policy)
        self.memory = GuestMemory([(RING, 1 << 16), (DATA, 1 << 16)], trace=self.trace)
        self.setup.ring(self.memory).begin_at(start)
        self.queue = DriverQueue(self.memory, self.setup.config(), state=self.setup.state())
        self.device = self.setup.model_device(self.memory)

    def publish(self, count: int = 1, length: int = 32) -> list[int]:
        """Buffers of one writable descriptor."""
        tokens = [self.queue.add([], [(DATA + 64 * number, length)]) for number in range(count)]
        assert self.queue.publish() == count
        return tokens

    def pop(self) -> Element:
        element = self.device.pop()
        assert element is not None
        return element

    def put(self, name: str, value: int, index: int = 0) -> None:
        width = self.queue.layout().fields()[name][1]
        self.memory.write(self.queue.layout().at(name, index), value.to_bytes(width, "little"))

    def get(self, name: str, index: int = 0) -> int:
        width = self.queue.layout().fields()[name][1]
        return int.from_bytes(self.memory.read(self.queue.layout().at(name, index), width), "little")

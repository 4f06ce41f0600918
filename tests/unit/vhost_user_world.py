"""A back-end in its own thread and a front-end with a real driver queue before it, over a real socket."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from virtio_test._core import DriverQueue, GuestMemory, Notifier, Policy, QueueConfig, RingLayout
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.test import TestDevice
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import DEFAULT_PROTOCOL_FEATURES, Backend
from virtio_test.transport.vhost_user.frontend import FrontEnd, FrontEndRing
from virtio_test.transport.vhost_user.messages import ProtocolFeature

from .world import PATIENCE, ServerThread, eventually

REQUEST = struct.Struct("<4I32s")
RESPONSE = struct.Struct("<3I")
SIZE = 128
MEMORY_BYTES = 1 << 20
BUFFERS = 0x8_0000


class Server(ServerThread):
    """A `Backend` of a test device, running in a thread."""

    def __init__(
        self,
        path: Path,
        device: BaseDevice | None = None,
        *,
        features: FeatureSet | None = None,
        protocol_features: ProtocolFeature = DEFAULT_PROTOCOL_FEATURES,
        policy: Policy = Policy.interop,
    ) -> None:
        self.lines: list[str] = []
        self.device = TestDevice(console=self.lines.append) if device is None else device
        self.backend = Backend(
            self.device,
            path=path,
            features=features,
            protocol_features=protocol_features,
            policy=policy,
        )
        super().__init__(path, self.backend)


def serving(path: Path, device: BaseDevice | None = None, **options: object) -> closing[Server]:
    """A server at `path`, which must live to the end."""
    return closing(Server(path, device, **options))  # type: ignore[arg-type]


@dataclass
class Guest:
    """A front-end with one ring of the test device and a driver queue on it."""

    front: FrontEnd
    memory: GuestMemory
    config: QueueConfig
    ring: FrontEndRing | None = None
    queue: DriverQueue | None = None
    sent: dict[int, int] = field(default_factory=dict[int, int])

    def setup(self, *, base: int = 0, call: Notifier | None = None) -> None:
        """Everything but enabling, with a fresh driver queue."""
        self.queue = DriverQueue(self.memory, self.config)
        self.ring = self.front.setup_ring(self.config, base=base, call=call)

    def post(self, number: int, *, indirect: bool = False) -> int:
        """Make a request available without kicking; its token."""
        assert self.queue is not None
        at = BUFFERS + 128 * (number % 2048)
        self.memory.write(at, REQUEST.pack(number, number + 1, number + 2, number + 3, b"hello back end!"))
        self.memory.fill(at + 64, 16, 0xAA)
        token = self.queue.add([(at, 48)], [(at + 64, 12)], indirect=indirect)
        self.queue.publish()
        self.sent[token] = number
        return token

    def kick(self) -> None:
        assert self.ring is not None
        self.ring.kick.notify()

    def used(self, count: int = 1) -> list[int]:
        """Wait for `count` used buffers, check each answer, and give their numbers."""
        queue = self.queue
        assert queue is not None
        found: list[int] = []
        assert eventually(lambda: found.extend(self._take(queue)) or len(found) >= count), f"only {found}"
        assert len(found) == count
        return found

    def _take(self, queue: DriverQueue) -> list[int]:
        numbers: list[int] = []
        for token, written in queue.get_used_many():
            number = self.sent.pop(token)
            at = BUFFERS + 128 * (number % 2048)
            assert written == 12
            assert RESPONSE.unpack(self.memory.read(at + 64, 12)) == (number + 101, number + 102, number + 103)
            assert self.memory.read(at + 76, 4) == b"\xaa" * 4
            numbers.append(number)
        return numbers

    def request(self, number: int) -> None:
        """One request, there and back."""
        self.post(number)
        self.kick()
        assert self.used() == [number]


@contextmanager
def guest(
    path: Path,
    *,
    packed: bool = False,
    wanted: FeatureSet | None = None,
    protocol_features: ProtocolFeature = DEFAULT_PROTOCOL_FEATURES,
    protocol_bit: bool = True,
) -> Generator[Guest]:
    """A front-end that has negotiated and shared its memory, with nothing said of its ring."""
    with FrontEnd(path, timeout=PATIENCE) as front:
        names = FeatureSet.from_bits((1 << 64) - 1) if wanted is None else wanted
        features = front.negotiate(
            names if packed else names - FeatureSet("RING_PACKED"),
            protocol_features=protocol_features,
            protocol_bit=protocol_bit,
        )
        memory = GuestMemory([(0, MEMORY_BYTES)])
        front.share(memory)
        layout = RingLayout.contiguous(SIZE, 0x1000, packed=packed)
        yield Guest(front, memory, QueueConfig.from_layout(layout, features=features.bits))

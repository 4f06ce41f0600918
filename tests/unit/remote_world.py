"""Memory of somebody else's, and queues over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout

PAGE = 4096
RING, DATA = 0x1000, 0x8000
SIZE = 0x10000
FORMATS = pytest.mark.parametrize("packed", [False, True])


class Other:
    """Memory of somebody else's; `before` runs at the start of each call."""

    def __init__(self, size: int = SIZE) -> None:
        self.store = GuestMemory([(0, size)])
        self.calls: list[tuple[str, int, int]] = []
        self.before: Callable[[int], object] = int
        self.kept: list[object] = []
        self.memory = GuestMemory()
        self.memory.add_remote(0, size, read=self.read, write=self.write)

    def read(self, address: int, length: int) -> bytes:
        self.calls.append(("read", address, length))
        self.before(address)
        return self.store.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        assert type(data) is bytes
        self.calls.append(("write", address, len(data)))
        self.before(address)
        self.store.write(address, data)


def config(*, packed: bool, size: int = 8) -> QueueConfig:
    return QueueConfig.from_layout(RingLayout.contiguous(size, RING, packed=packed), index=2)


def ends(
    memory: GuestMemory, *, packed: bool, size: int = 8, kick: Notifier | None = None
) -> tuple[DriverQueue, DeviceQueue]:
    both = config(packed=packed, size=size)
    return DriverQueue(memory, both, kick=kick), DeviceQueue(memory, both)


def raising(error: BaseException) -> Callable[[int], object]:
    def function(_: int) -> object:
        raise error

    return function

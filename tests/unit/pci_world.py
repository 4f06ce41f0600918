"""A PCI function and a driver that writes into its registers exactly what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import pytest
from virtio_test._core import DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import Device
from virtio_test.devices.base import BaseDevice
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import COMMON
from virtio_test.status import Status
from virtio_test.transport.pci.declaration import Declaration, Place
from virtio_test.transport.pci.flavours import Flavour, declare
from virtio_test.transport.pci.function import VirtioPci

S = Status
UP: Final = S.ACKNOWLEDGE | S.DRIVER
READY: Final = UP | S.FEATURES_OK
LIVE: Final = READY | S.DRIVER_OK
SIZE: Final = 16
BASE: Final = 0x10000
DEVICE_ID: Final = 45
MEMORY: Final = 1 << 20
COMMAND: Final = 4
MASTER_AND_BARS: Final = 0x7

_CaseT = TypeVar("_CaseT", bound=Callable[..., object])
ROWS: dict[str, list[str]] = {}
"""Row of the robustness catalogue → the tests that are its cases."""


def row(*ids: str) -> Callable[[_CaseT], _CaseT]:
    """This test is a case of these rows: it runs once for each, under its id."""

    def mark(test: _CaseT) -> _CaseT:
        for each in ids:
            ROWS.setdefault(each, []).append(test.__name__)
        return pytest.mark.parametrize("row", [pytest.param(each, marks=pytest.mark.row(each)) for each in ids])(test)

    return mark


class Sink:
    """Interrupts as they come."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, int, int]] = []
        self.levels: list[bool] = []

    @property
    def vectors(self) -> list[int]:
        return [vector for vector, _, _ in self.messages]

    def message(self, vector: int, address: int, data: int) -> None:
        self.messages.append((vector, address, data))

    def line(self, asserted: bool) -> None:
        self.levels.append(asserted)


def upper(features: FeatureSet | None = None, **more: Any) -> BaseDevice:
    """A device that answers in upper case on two queues; `word` can be written, `count` cannot."""
    config = ConfigSpace(ConfigLayout(("count", "le32"), ("word", "le32", "rw"), ("tail", "le16")))
    handlers = {0: bytes.upper, 1: bytes.upper}
    made: dict[str, Any] = {"handlers": handlers, "queue_sizes": (SIZE, SIZE), "config": config, **more}
    return BaseDevice(DEVICE_ID, features=features, **made)


class World:
    """A function, its interrupts, and the means of a driver."""

    def __init__(
        self,
        device: Device | None = None,
        *,
        change: Callable[[Declaration], Declaration] = lambda good: good,
        offered: FeatureSet | None = None,
        on: bool = True,
        flavour: Flavour = "non-transitional",
        **declared: Any,
    ) -> None:
        self.device = upper() if device is None else device
        plan = change(declare(self.device, flavour=flavour, **declared))
        memory = GuestMemory([(0, MEMORY)])
        self.function = VirtioPci(self.device, declaration=plan, memory=memory, offered=offered)
        self.plan = plan
        self.layout = plan.layout
        self.bank = self.function.bank
        self.memory = memory
        self.run = self.function.loop.run_pending
        self.sink = Sink()
        self.function.connect(self.sink)
        if on:
            self.set_config(COMMAND, 2, MASTER_AND_BARS)

    # --- accesses -------------------------------------------------------------------------------------------

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.read_config(offset, size), "little")

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.function.write_config(offset, value.to_bytes(size, "little"))

    def read(self, place: Place | None, offset: int, size: int) -> int:
        assert place is not None
        return int.from_bytes(self.function.read_bar(place.bar, place.offset + offset, size), "little")

    def write(self, place: Place | None, offset: int, size: int, value: int) -> None:
        assert place is not None
        self.function.write_bar(place.bar, place.offset + offset, value.to_bytes(size, "little"))

    def get(self, name: str) -> int:
        """A register of the common configuration, 64 bits as two halves."""
        at = COMMON[name]
        if at.size == 8:
            low, high = (self.read(self.layout.common, at.offset + half, 4) for half in (0, 4))
            return low | high << 32
        return self.read(self.layout.common, at.offset, at.size)

    def set(self, name: str, value: int) -> None:
        at = COMMON[name]
        for half in range(0, at.size, 4):
            size = min(4, at.size)
            self.write(self.layout.common, at.offset + half, size, value >> 8 * half & (1 << 8 * size) - 1)

    def capability(self, name: str) -> int:
        """Offset of a capability, by walking the list as software does."""
        wanted = list(self.plan.capabilities).index(name)
        at = self.config(0x34, 1)
        for _ in range(wanted):
            at = self.config(at + 1, 1)
        return at

    def notify(self, index: int, value: int | None = None, *, size: int = 2) -> None:
        self.write(self.layout.notify, index * self.layout.multiplier, size, index if value is None else value)

    def rules(self) -> dict[str, int]:
        return dict(self.bank.ignored)

    def status(self, value: int) -> int:
        self.set("device_status", value)
        return self.get("device_status")

    # --- bringing up ----------------------------------------------------------------------------------------

    def features(self, accepted: FeatureSet) -> None:
        for select in range(2):
            self.set("driver_feature_select", select)
            self.set("driver_feature", accepted.word(select))

    def negotiate(self, *without: str) -> FeatureSet:
        """Everything up to FEATURES_OK."""
        accepted = self.bank.offered - FeatureSet("RING_PACKED", *without)
        self.status(0)
        self.status(S.ACKNOWLEDGE)
        self.status(UP)
        self.features(accepted)
        assert self.status(READY) == READY
        return accepted

    def queue(self, index: int = 0, *, size: int = SIZE, enable: bool = True) -> DriverQueue:
        layout = RingLayout.contiguous(size, BASE * (index + 1), packed="RING_PACKED" in self.bank.accepted)
        self.memory.fill(BASE * (index + 1), BASE // 2)
        self.set("queue_select", index)
        if size != SIZE:
            self.set("queue_size", size)
        for name, area in (("queue_desc", "desc"), ("queue_driver", "driver"), ("queue_device", "device")):
            self.set(name, getattr(layout, area))
        if enable:
            self.set("queue_enable", 1)
        config = QueueConfig.from_layout(layout, index=index, features=self.bank.accepted.bits)
        return DriverQueue(self.memory, config, kick=Notifier.callback(lambda: self.notify(index)))

    def live(self, *without: str) -> DriverQueue:
        """A live device; queue 0 of it."""
        self.negotiate(*without)
        queue = self.queue()
        self.status(LIVE)
        self.run()
        return queue

    def post(self, queue: DriverQueue, text: bytes = b"hello", *, kick: bool = True) -> None:
        """A request, and its kick whether the device asks for one or not: a call is asked for as well."""
        self.memory.write(0x1000, text)
        self.memory.fill(0x2000, 64)
        queue.add([(0x1000, len(text))], [(0x2000, 64)])
        queue.enable_calls()
        queue.signal()
        if kick:
            self.notify(queue.index)

    def answer(self, queue: DriverQueue) -> bytes | None:
        """What the next used buffer says, after the loop has run; None when there is none."""
        self.run()
        used = queue.get_used()
        return None if used is None else self.memory.read(0x2000, used[1])

    def works(self, queue: DriverQueue) -> bool:
        self.post(queue)
        return self.answer(queue) == b"HELLO"

    # --- MSI-X ----------------------------------------------------------------------------------------------

    def msix(self, *vectors: int, enable: bool = True, masked: Sequence[int] = ()) -> None:
        """Program and unmask `vectors`, then switch MSI-X on; vector v is told as (0xfee00000 + v, 0x40 + v)."""
        for vector in vectors:
            self.write(self.layout.table, 16 * vector, 8, 0xFEE0_0000 + vector)
            self.write(self.layout.table, 16 * vector + 8, 4, 0x40 + vector)
            self.mask(vector, masked=vector in masked)
        if enable:
            self.control(enabled=True)

    def mask(self, vector: int, *, masked: bool) -> None:
        self.write(self.layout.table, 16 * vector + 12, 4, int(masked))

    def control(self, *, enabled: bool, masked: bool = False) -> None:
        self.set_config(self.capability("msix") + 2, 2, enabled << 15 | masked << 14)

    @property
    def pending(self) -> int:
        return self.read(self.layout.pba, 0, 8)

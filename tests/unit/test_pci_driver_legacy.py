"""The legacy interface of a function that lies, and what a driver may not ask of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import LegacyPciRegisters, open_pci
from virtio_test.errors import InvalidArgument, NoFeature, PeerTimeout, StatusViolation
from virtio_test.spec.pci import LEGACY, NO_VECTOR
from virtio_test.status import Status

from tests.unit.pci_driver_world import FakePci, le, msix


class FakeLegacy(FakePci):
    """The same byte arrays as a legacy device: the registers in I/O BAR 0, and one record for each queue."""

    def __init__(self, sizes: tuple[int, ...] = (64,), *, with_msix: bool = False) -> None:
        super().__init__([msix()] if with_msix else (), device_id=0x1005)
        self.masks[0] = (0xFFE0, 1)
        self.bars[0] = bytearray(0x20)
        self.fresh = bytearray(0x20)
        self.sizes = sizes
        self.pages = dict.fromkeys(range(65536), 0)
        self.queue_vectors = dict.fromkeys(range(65536), NO_VECTOR)
        self.bars[0][0:4] = le(1 << 28 | 1 << 29 | 1 << 24 | 1 << 27, 4)
        self.bars[0][0x14:0x16] = le(NO_VECTOR, 2)

    @property
    def selected(self) -> int:
        return int.from_bytes(self.bars[0][0x0E:0x10], "little")

    def lie(self, register: str, value: int | Callable[[], int]) -> None:
        self.reads[0, LEGACY[register].offset] = value if callable(value) else lambda: value

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        self.accesses.append((bar, offset, size))
        if (bar, offset) in self.reads:
            return self.reads[bar, offset]() & (1 << 8 * size) - 1
        if bar == 0 and offset == 0x0C:
            return self.sizes[self.selected] if self.selected < len(self.sizes) else 0
        if bar == 0 and offset == 0x08:
            return self.pages[self.selected]
        if bar == 0 and offset == 0x16 and self.places:
            return self.queue_vectors[self.selected]
        return int.from_bytes(self.bars[bar][offset : offset + size].ljust(size, b"\xff"), "little")

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.accesses.append((bar, offset, size))
        self.writes.append((bar, offset, size, value))
        if bar == 0 and offset == 0x08:
            self.pages[self.selected] = value
        elif bar == 0 and offset == 0x16 and self.places:
            self.queue_vectors[self.selected] = value
        else:
            self.bars[bar][offset : offset + size] = le(value, size)
        if (bar, offset, value) == (0, 0x12, 0):
            self.pages = dict.fromkeys(self.pages, 0)


def opened(fake: FakeLegacy) -> LegacyPciRegisters:
    registers = open_pci(fake, strict=True)
    assert isinstance(registers, LegacyPciRegisters)
    return registers


@pytest.mark.parametrize("with_msix", [False, True])
def test_bring_up(with_msix: bool) -> None:
    fake = FakeLegacy((64, 0, 128), with_msix=with_msix)
    registers = opened(fake)
    assert (registers.legacy, registers.transport, registers.device_id()) == (True, "pci", 4)
    driver = Driver(registers)
    driver.initialize()
    assert sorted(driver.queues) == [0, 2]
    assert fake.bars[0][0x12] == 0x07, "there is no FEATURES_OK"
    assert fake.pages[0] * 4096 >= 4096
    assert registers.interrupts.kind == ("msix" if with_msix else "intx")
    assert registers.interrupts.vectors == ({0: 1, 2: 3} if with_msix else {0: 0, 2: 0})
    driver.submit(2, [b"x"])
    assert fake.writes[-1] == (0, 0x10, 2, 2)
    assert registers.config_generation() == 0
    assert registers.config_size() == 0x20 - (0x18 if with_msix else 0x14)
    registers.write_config(0, b"\x34\x12")
    assert registers.read_config(0, 2) == b"\x34\x12"
    assert fake.bars[0][0x18 if with_msix else 0x14 :][:2] == b"\x34\x12"
    widths = {each.offset: each.size for each in LEGACY.values()}
    assert all(widths[at] == size for bar, at, size in fake.accesses if bar == 0 and at < 0x14)


Case = tuple[Callable[[FakeLegacy], object], str, str]

BAD: dict[str, Case] = {
    "queue-size-3": (lambda it: setattr(it, "sizes", (3,)), "BadQueueSize", "2.7"),
    "queue-size-all-ones": (lambda it: setattr(it, "sizes", (65535,)), "BadQueueSize", "2.7"),
    "queue-size-changes": (
        lambda it: it.lie("queue_size", iter((8, *[0] * 8, 16)).__next__),
        "QueueSizeRefused",
        "4.1.5.1.3.1",
    ),
    "placed-before": (lambda it: it.lie("queue_address", 5), "QueueEnabledOnReset", "4.1.5.1.3.1"),
    "never-placed": (lambda it: it.lie("queue_address", 0), "QueueNotEnabled", "4.1.5.1.3.1"),
    "vector-refused": (lambda it: it.lie("queue_msix_vector", NO_VECTOR), "VectorRefused", "4.1.5.1.2.1"),
    "vector-another": (lambda it: it.lie("queue_msix_vector", 2), "VectorMismatch", "4.1.5.1.2.1"),
    "config-vector-refused": (lambda it: it.lie("config_msix_vector", NO_VECTOR), "VectorRefused", "4.1.5.1.2.1"),
}


@pytest.mark.parametrize(("change", "rule", "clause"), BAD.values(), ids=BAD)
def test_bring_up_ends_with_the_rule_that_was_broken(
    change: Callable[[FakeLegacy], object], rule: str, clause: str
) -> None:
    fake = FakeLegacy(with_msix=True)
    change(fake)
    with pytest.raises(StatusViolation) as caught:
        Driver(opened(fake)).initialize()
    assert (caught.value.rule, caught.value.clause) == (rule, clause)
    assert fake.writes[-1][:3] == (0, 0x12, 1)
    assert fake.writes[-1][3] & Status.FAILED


def test_queues_without_an_end() -> None:
    registers = opened(FakeLegacy((2,) * 70000))
    assert registers.queue_max_sizes() == [2] * 1024
    assert opened(FakeLegacy(())).queue_max_sizes() == []


def test_a_reset_that_never_ends() -> None:
    fake = FakeLegacy()
    fake.lie("device_status", 1)
    with pytest.raises(PeerTimeout):
        Driver(opened(fake)).initialize()


def test_a_configuration_that_never_stands_still() -> None:
    fake = FakeLegacy()
    registers = opened(fake)
    numbers = iter(range(1000))
    fake.reads[0, 0x14] = lambda: next(numbers)
    assert registers.read_config(0, 4) == le(0, 4), "one access cannot be torn"
    with pytest.raises(StatusViolation, match="ConfigNeverStable"):
        registers.read_config(0, 8)
    fake.reads[0, 0x14] = iter((1, 2, 2)).__next__
    assert registers.read_config(0, 8)[0] == 2


def test_what_the_interface_does_not_have() -> None:
    registers = opened(FakeLegacy())
    with pytest.raises(NoFeature):
        registers.reset_queue(0)
    with pytest.raises(InvalidArgument, match="bits 0 to 31"):
        registers.write_driver_features(1 << 32)
    for base in (0x1010, 0, 1 << 44):
        with pytest.raises(InvalidArgument, match="multiple of 4096"):
            registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(64, base)))
    with pytest.raises(InvalidArgument, match="layout of a legacy queue"):
        registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(64, 0x1000)))
    for offset, length in ((-1, 1), (8, 8), (12, 1)):
        with pytest.raises(InvalidArgument):
            registers.read_config(offset, length)
        with pytest.raises(InvalidArgument):
            registers.write_config(offset, bytes(length))

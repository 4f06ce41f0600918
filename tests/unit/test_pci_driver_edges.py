"""A driver of PCI functions at the edges: the last byte of a space, a BAR, a table, and the first that is none."""

from __future__ import annotations

from typing import Any

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.driver.pci import LegacyPciRegisters, PciRegisters, open_pci, probe
from virtio_test.driver.pci.capabilities import Capabilities, walk
from virtio_test.driver.pci.msix import MsixTable
from virtio_test.driver.pci.probe import BarInfo, Findings, PciFunction
from virtio_test.errors import InvalidArgument, StateError, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import COMMON, CapType

from tests.unit.pci_driver_world import (
    CAPS,
    FEATURES,
    GOOD,
    FakePci,
    common,
    isr,
    msix,
    shared,
    vendor,
    virtio,
)
from tests.unit.test_pci_driver_legacy import FakeLegacy

RING_RESET = 1 << 40
PACKED = FeatureSet("VERSION_1", "RING_PACKED").bits


class Patient(FakePci):
    """Writes down what is read of the configuration space."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.looked: list[int] = []
        super().__init__(*arguments, **options)

    def read_config(self, offset: int, size: int) -> int:
        self.looked.append(offset)
        return super().read_config(offset, size)


def walked(fake: FakePci) -> tuple[Capabilities, list[str]]:
    """What is found, and the rules that were broken; only what the walk looks at is written down."""
    function = PciFunction(fake, Findings())
    if isinstance(fake, Patient):
        fake.looked.clear()
    return walk(function), [each.rule for each in function.findings]


def modern(fake: FakePci | None = None, **options: Any) -> PciRegisters:
    registers = open_pci(FakePci() if fake is None else fake, **options)
    assert isinstance(registers, PciRegisters)
    return registers


def legacy(fake: FakeLegacy | None = None, **options: Any) -> LegacyPciRegisters:
    registers = open_pci(FakeLegacy() if fake is None else fake, **options)
    assert isinstance(registers, LegacyPciRegisters)
    return registers


# --- capabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cap", [common(), shared(1, 0, 0x1000), vendor(0x1234), virtio(0x77), common(length=1)], ids=lambda cap: cap.hex()
)
def test_any_capability_of_virtio_makes_it_no_legacy_device(cap: bytes) -> None:
    assert walked(FakePci([cap]))[0].virtio
    assert not walked(FakePci([msix()]))[0].virtio


@pytest.mark.parametrize(
    ("position", "rule"),
    [
        (0x3C, "CapabilityBelowHeader"),
        (0x3F, "CapabilityBelowHeader"),
        (0x02, "CapabilityBelowHeader"),
        (0x40, "CapabilityLoop"),
        (0x43, "CapabilityUnaligned"),
    ],
)
def test_a_link_that_leads_nowhere_ends_the_list(position: int, rule: str) -> None:
    fake = Patient()
    fake.config[fake.places[-1] + 1] = position
    found, rules = walked(fake)
    assert rules == [rule]
    assert len(found.structures) == 5
    assert found.msix is not None
    heads = [offset for offset in fake.looked if offset in fake.places or offset < CAPS]
    assert [offset for offset in heads if offset not in (0x06, 0x34)] == fake.places


def test_a_link_with_low_bits_leads_to_the_first_place_there_is() -> None:
    fake = FakePci()
    fake.config[0x34] = CAPS + 1
    found, rules = walked(fake)
    assert rules == ["CapabilityUnaligned"]
    assert len(found.structures) == 5


@pytest.mark.parametrize(("cap", "size"), [(msix(), 12), (common(), 16)])
def test_a_capability_may_end_with_the_space(cap: bytes, size: int) -> None:
    fake = FakePci([])
    at = 256 - size
    fake.config[at:256] = cap
    fake.config[0x34] = at
    found, rules = walked(fake)
    assert rules == []
    assert found.structures or found.msix


def test_a_region_is_cut_to_what_is_just_enough() -> None:
    found, rules = walked(FakePci([isr(offset=0x3FFF, length=2)]))
    assert (found.structures[CapType.ISR_CFG].length, rules) == (1, ["RegionBeyondBar"])
    found, rules = walked(FakePci([isr(offset=0x4000, length=2)]))
    assert (found.structures, rules) == ({}, ["RegionBeyondBar"])


# --- interrupts --------------------------------------------------------------------------------------------


def test_the_line_says_nothing_where_messages_are_in_use() -> None:
    fake = FakePci()
    modern(fake, interrupts="msix").listen(call=lambda _: None, config_changed=lambda: None)
    fake.accesses.clear()
    fake.line_handler()
    assert fake.accesses == []


def test_a_vector_behind_the_table_has_no_entry() -> None:
    fake = FakePci([msix(4)])
    function = PciFunction(fake, Findings())
    capability = walk(function).msix
    assert capability is not None
    function.place(1)
    table = MsixTable(function, capability)
    assert [table.program(vector) for vector in (0, 3)] == [True, True]
    fake.writes.clear()
    assert [table.program(vector) for vector in (-1, 4, 5)] == [False] * 3
    assert fake.writes == []


def test_messages_that_are_no_longer_there_are_not_asked_for_for_ever() -> None:
    fake = FakePci()
    registers = modern(fake)
    fake.messages = 0
    registers.write_driver_features(FEATURES)
    with pytest.raises(StatusViolation, match="VectorRefused"):
        registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(64, 0x1000)))


# --- the modern registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "packed", "good"),
    [
        (0, False, True),
        (32768, False, True),
        (32767, False, False),
        (32767, True, True),
        (32768, True, True),
        (32769, True, False),
        (0xFFFF, True, False),
    ],
)
def test_the_largest_queue(size: int, packed: bool, good: bool) -> None:
    fake = FakePci()
    fake.lie("queue_size", size)
    registers = modern(fake)
    registers.write_driver_features(PACKED if packed else PACKED & ~(1 << 34))
    if good:
        assert registers.queue_max_sizes() == [size]
    else:
        with pytest.raises(StatusViolation, match="BadQueueSize"):
            registers.queue_max_sizes()


RESET_END = COMMON["queue_reset"].offset + COMMON["queue_reset"].size


@pytest.mark.parametrize(
    ("length", "features", "good"),
    [(RESET_END, RING_RESET, True), (RESET_END - 1, RING_RESET, False), (0x38, 0, True)],
)
def test_a_register_is_needed_only_by_its_feature(length: int, features: int, good: bool) -> None:
    registers = modern(FakePci([common(length=length), *GOOD[1:]]))
    if good:
        registers.write_driver_features(features)
    else:
        with pytest.raises(StatusViolation, match="CommonTooShort"):
            registers.write_driver_features(features)


def test_a_queue_is_reset_inside_the_loop_where_that_takes_no_time() -> None:
    fake = FakePci()
    registers = modern(fake)
    registers.write_driver_features(RING_RESET)
    registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(64, 0x1000)))
    done: list[int] = []

    def turn() -> None:
        registers.reset_queue(0)
        done.append(0)

    fake.loop.pend((fake, "turn"), turn)
    fake.loop.run_pending()
    assert done == [0]
    assert registers.interrupts.vectors == {}


PLACES = [
    (0, 0, True),
    (0, 0x100, True),
    (0x100, 0, True),
    (0x101, 0, False),
    (0xFF, 2, False),
    (-1, 1, False),
    (4, -1, False),
]


@pytest.mark.parametrize(("offset", "length", "good"), PLACES)
def test_a_place_in_the_configuration_space(offset: int, length: int, good: bool) -> None:
    old = FakeLegacy()
    old.masks[0], old.bars[0] = (0xFE00, 1), bytearray(0x200)
    shorter = legacy(old)
    assert shorter.config_size() == 0x200 - 20
    for registers, more in ((modern(), 0), (shorter, shorter.config_size() - 0x100)):
        at = offset + more if offset >= 0x100 or offset + length > 0x100 else offset
        if good:
            assert len(registers.read_config(at, length)) == length
            registers.write_config(at, bytes(length))
        else:
            with pytest.raises(InvalidArgument, match="of a configuration space of"):
                registers.read_config(at, length)


# --- the legacy registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((), []),
        ((0, 64), [0, 64]),
        ((64, 0, 8), [64, 0, 8]),
        ((0,) * 7 + (8,), [0] * 7 + [8]),
        ((0,) * 8 + (8,), []),
        ((4,) + (0,) * 7 + (8,), [4] + [0] * 7 + [8]),
        ((4,) + (0,) * 8 + (8,), [4]),
        ((32768, 1), [32768, 1]),
    ],
)
def test_queues_are_looked_for_behind_seven_that_are_none(sizes: tuple[int, ...], found: list[int]) -> None:
    assert legacy(FakeLegacy(sizes)).queue_max_sizes() == found


@pytest.mark.parametrize("size", [3, 32767, 32769, 65536])
def test_no_legacy_queue_has_such_a_size(size: int) -> None:
    class Wide(FakeLegacy):
        def read_bar(self, bar: int, offset: int, size: int) -> int:
            return self.sizes[0] if (bar, offset) == (0, 0x0C) else super().read_bar(bar, offset, size)

    with pytest.raises(StatusViolation, match="BadQueueSize"):
        legacy(Wide((size,))).queue_max_sizes()


@pytest.mark.parametrize("address", [0, 0x1800, 0x1001, 1 << 44])
def test_a_legacy_queue_lies_at_a_page_with_a_number(address: int) -> None:
    registers = legacy()
    config = QueueConfig(64, desc=address, driver=address + 0x400, device=address + 0x1000)
    with pytest.raises(InvalidArgument, match="lies at a multiple of 4096 below"):
        registers.enable_queue(config)
    last = RingLayout.legacy(64, 0xFFFF_FFFF << 12)
    registers.enable_queue(QueueConfig.from_layout(last))
    assert registers.read("queue_address") == 0xFFFF_FFFF


# --- finding out what it is --------------------------------------------------------------------------------


def io_bar(size: int, *, device_id: int) -> FakeLegacy:
    fake = FakeLegacy()
    fake.set(0x02, 2, device_id)
    fake.masks[0] = (-size & 0xFFFF, 1)
    return fake


def test_a_bar_that_could_hold_the_legacy_interface() -> None:
    assert legacy(io_bar(0x20, device_id=0x1005)).config_size() == 12
    assert legacy(io_bar(0x20, device_id=0x1044), interface="legacy").config_size() == 12
    with pytest.raises(StateError, match="no legacy interface"):
        open_pci(io_bar(0x10, device_id=0x1005), interface="legacy")
    for size, device_id, rule in ((0x10, 0x1005, "NoInterface"), (0x20, 0x1044, "MissingCommon")):
        with pytest.raises(StatusViolation, match=rule):
            open_pci(io_bar(size, device_id=device_id))


@pytest.mark.parametrize("wrong", [{"interface": "new"}, {"interrupts": "polling"}])
def test_what_cannot_be_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="is unknown"):
        open_pci(FakePci(), **wrong)


@pytest.mark.parametrize(("device_id", "good"), [(0x1000, True), (0x107F, True), (0x0FFF, False), (0x1080, False)])
def test_the_first_and_the_last_id(device_id: int, good: bool) -> None:
    if good:
        assert PciFunction(FakePci(device_id=device_id), Findings()).device_id == device_id
    else:
        with pytest.raises(StatusViolation, match="NotVirtio"):
            PciFunction(FakePci(device_id=device_id), Findings())


def test_a_bar_that_is_not_there_is_not_placed() -> None:
    function = PciFunction(FakePci(), Findings())
    for index in (3, 6):
        with pytest.raises(StateError, match="has no BAR"):
            function.place(index)


@pytest.mark.parametrize(
    ("low", "high", "size"),
    [
        (0xFFFF_FFFD, 0, 4),
        (0x0000_FFFD, 0, 4),
        (0xFFFF_FFF0, 0, 16),
        (0xFFFF_FFF4, 0xFFFF_FFFF, 16),
        (0x0000_0004, 0xFFFF_FFFF, 1 << 32),
        (0x0000_0004, 0x8000_0000, 1 << 63),
        (0x8000_0000, 0, 1 << 31),
        (0x0000_0001, 0, 1 << 16),
        (0x0000_000C, 0, None),
        (0x0000_0008, 0, None),
        (0x7FFF_FFF0, 0, None),
        (0xFFFF_FFF2, 0, None),
        (0xFFFF_FFF4, 0, None),
    ],
)
def test_the_size_of_a_bar(low: int, high: int, size: int | None) -> None:
    found = probe._bar_of(0, low, high)  # pyright: ignore[reportPrivateUsage] - what a bus shows has fewer values
    wide = low & 7 == 4
    assert found == (None if size is None else BarInfo(0, size, io=bool(low & 1), wide=wide))

"""A driver reads the capabilities of a function that lies: each item of the catalogue's list in 2.8 that is one.

Where the device can still be driven, the finding is kept, and raised when asked to be strict; where it cannot, it is
raised in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from virtio_test.driver.access import PciAccess
from virtio_test.driver.pci import PciRegisters, open_pci
from virtio_test.driver.pci.capabilities import Capabilities, Ignored, Structure, VendorData
from virtio_test.errors import StateError, StatusViolation
from virtio_test.spec.clauses import CLAUSES
from virtio_test.spec.pci import CapType

from tests.unit.pci_driver_world import (
    GOOD,
    FakePci,
    common,
    device,
    isr,
    le,
    msix,
    notify,
    shared,
    vendor,
    virtio,
    window,
)

Case = tuple[Callable[[FakePci], object], str, str]

REST = (notify(), isr(), device(), window(), msix())
"""All but COMMON."""


def opened(fake: FakePci, **options: str) -> PciRegisters:
    registers = open_pci(fake, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(registers, PciRegisters)
    return registers


def link(fake: FakePci, position: int, caps: Sequence[bytes] = GOOD) -> None:
    """Let the last capability lead to `position`."""
    places = fake.lay(caps)
    fake.config[places[-1] + 1] = position


def edit(offset: int, size: int, value: int) -> Callable[[FakePci], None]:
    return lambda fake: fake.set(offset, size, value)


def lay(*caps: bytes) -> Callable[[FakePci], object]:
    return lambda fake: fake.lay(caps)


def bar(index: int, mask: int, flags: int = 0) -> Callable[[FakePci], None]:
    def change(fake: FakePci) -> None:
        fake.masks[index] = (mask, flags)

    return change


def test_the_function_is_right_as_it_comes() -> None:
    fake = FakePci()
    registers = open_pci(fake, strict=True)
    assert isinstance(fake, PciAccess)
    assert isinstance(registers, PciRegisters)
    assert registers.findings == []
    assert (registers.device_id(), registers.transport, registers.legacy) == (4, "pci", False)
    assert registers.interrupts.kind == "msix"
    assert fake.read_config(4, 2) == 0x0406, "memory, bus master, no interrupt line"
    assert fake.read_config(fake.places[-1] + 2, 2) == 0x8003


# What the device can be driven in spite of: the finding, and nothing else is different.
TOLERATED: dict[str, Case] = {
    "list-loops": (lambda fake: link(fake, 0x40), "CapabilityLoop", "4.1.1"),
    "list-loops-in-itself": (lambda fake: link(fake, fake.lay(GOOD)[-1]), "CapabilityLoop", "4.1.1"),
    "link-below-the-header": (lambda fake: link(fake, 0x3C), "CapabilityBelowHeader", "4.1.1"),
    "link-unaligned": (lambda fake: link(fake, 0xEE), "CapabilityUnaligned", "4.1.1"),
    "link-unaligned-and-below": (lambda fake: link(fake, 0x03), "CapabilityBelowHeader", "4.1.1"),
    "capability-ends-outside": (
        lambda fake: (link(fake, 0xFC), fake.set(0xFC, 4, 0x01100009)),
        "CapabilityBeyondSpace",
        "4.1.1",
    ),
    "msix-ends-outside": (
        lambda fake: (link(fake, 0xF8, GOOD[:-1]), fake.set(0xF8, 4, 0x11)),
        "CapabilityBeyondSpace",
        "4.1.1",
    ),
    "cap-len-15-then-good": (
        lay(virtio(CapType.COMMON_CFG, length=0x40, cap_len=15), *GOOD),
        "CapabilityTooShort",
        "4.1.4.2",
    ),
    "cap-len-0-then-good": (
        lay(virtio(CapType.COMMON_CFG, length=0x40, cap_len=0), *GOOD),
        "CapabilityTooShort",
        "4.1.4.2",
    ),
    "length-beyond-the-bar": (lay(common(length=0xFFFF_FFFF), *REST), "RegionBeyondBar", "4.1.4"),
    "length-wraps": (
        lay(common(), notify(length=0xFFFF_FFFF), isr(), device(), window(), msix()),
        "RegionWraps",
        "4.1.4",
    ),
    "no-isr": (lay(common(), notify(), device(), window(), msix()), "MissingIsr", "4.1.4.5.1"),
    "no-window": (lay(common(), notify(), isr(), device(), msix()), "MissingWindow", "4.1.4.9.1"),
    "device-misaligned": (
        lay(common(), notify(), isr(), device(offset=0x3002), window(), msix()),
        "RegionMisaligned",
        "4.1.4.6.1",
    ),
    "device-without-bytes": (
        lay(common(), notify(), isr(), device(length=0), window(), msix()),
        "RegionTooShort",
        "4.1.4.6.1",
    ),
    "device-in-no-bar": (
        lay(common(), notify(), isr(), device(bar=4), window(), msix()),
        "NoSuchBar",
        "4.1.4",
    ),
    "shm-cap-too-short": (lay(*GOOD, shared(1, 0, 0x1000, cap_len=16)), "CapabilityTooShort", "4.1.4.2"),
    "shm-beyond-the-bar": (lay(*GOOD, shared(1, 0xF_F000, 0x2000)), "RegionBeyondBar", "4.1.4.7.1"),
    "shm-wraps-64-bits": (lay(*GOOD, shared(1, 0xFFFF_FFFF_FFFF_F000, 0x2000)), "RegionWraps", "4.1.4.7.1"),
    "shm-in-no-bar": (lay(*GOOD, shared(1, 0, 0x1000, bar=5)), "NoSuchBar", "4.1.4"),
    "shm-in-an-io-bar": (
        lambda fake: (bar(4, 0xFFFF_FF00, 1)(fake), fake.lay([*GOOD, shared(1, 0, 16, bar=4)])),
        "RegionInIoBar",
        "4.1.4.7.1",
    ),
    "shm-id-twice": (
        lay(*GOOD, shared(1, 0, 0x1000), shared(1, 0x1000, 0x1000)),
        "DuplicateSharedMemory",
        "4.1.4.7.1",
    ),
    "vendor-data-of-virtio": (lay(*GOOD, vendor(0x1AF4)), "VendorDataOfVirtio", "4.1.4.8.1"),
    "vendor-data-odd-size": (lay(*GOOD, vendor(0x1234, cap_len=10)), "VendorDataSize", "4.1.4.8.1"),
    "msix-table-in-no-bar": (lay(*GOOD[:-1], msix(table=5)), "BadMsixTable", "4.1.5.1.2.1"),
    "msix-table-in-bar-7": (lay(*GOOD[:-1], msix(table=7)), "BadMsixTable", "4.1.5.1.2.1"),
    "msix-table-beyond-the-bar": (lay(*GOOD[:-1], msix(2048, pba=0)), "BadMsixTable", "4.1.5.1.2.1"),
    "msix-pba-beyond-the-bar": (lay(*GOOD[:-1], msix(pba=0x1001)), "BadMsixTable", "4.1.5.1.2.1"),
    "msix-table-in-an-io-bar": (
        lambda fake: (bar(4, 0xFFFF_FF00, 1)(fake), fake.lay([*GOOD[:-1], msix(table=4)])),
        "BadMsixTable",
        "4.1.5.1.2.1",
    ),
    "bar-sizes-with-holes": (bar(4, 0xFFFF_5000), "BadBar", "4.1.1"),
    "bar-of-8-bytes": (bar(4, 0xFFFF_FFF0, 0x2), "BadBar", "4.1.1"),
    "bar-5-of-64-bits": (bar(5, 0xFFFF_0000, 0x4), "BadBar", "4.1.1"),
    "bar-64-without-upper-half": (bar(3, 0), "BadBar", "4.1.1"),
    "no-interrupt-at-all": (
        lambda fake: (fake.lay(GOOD[:-1]), fake.config.__setitem__(0x3D, 0)),
        "NoInterrupt",
        "4.1.1",
    ),
    "subsystem-of-another": (
        lambda fake: (fake.set(2, 2, 0x1005), fake.set(0x2E, 2, 9)),
        "SubsystemMismatch",
        "4.1.2.3",
    ),
}


@pytest.mark.row("X-capabilities")
@pytest.mark.parametrize(("change", "rule", "clause"), TOLERATED.values(), ids=TOLERATED)
def test_found_and_lived_with(change: Callable[[FakePci], object], rule: str, clause: str) -> None:
    fake = FakePci()
    change(fake)
    registers = opened(fake)
    assert rule in [each.rule for each in registers.findings]
    found = next(each for each in registers.findings if each.rule == rule)
    assert found.clause == clause
    assert clause in CLAUSES
    assert registers.read("queue_size") == 64
    with pytest.raises(StatusViolation) as caught:
        open_pci(fake, strict=True)
    assert caught.value == registers.findings[0]


# What nobody can drive.
FATAL: dict[str, Case] = {
    "no-capabilities": (edit(0x34, 1, 0), "MissingCommon", "4.1.4.3.1"),
    "capabilities-not-announced": (edit(0x06, 2, 0), "MissingCommon", "4.1.4.3.1"),
    "first-link-below-the-header": (edit(0x34, 1, 0x10), "MissingCommon", "4.1.4.3.1"),
    "no-common": (lay(*REST), "MissingCommon", "4.1.4.3.1"),
    "no-notify": (lay(common(), isr(), device(), window(), msix()), "MissingNotify", "4.1.4.4.1"),
    "no-isr-for-the-line": (lay(common(), notify(), device(), window()), "MissingIsr", "4.1.4.5.1"),
    "common-cap-len": (lay(virtio(1, length=0x40, cap_len=12), *REST), "CapabilityTooShort", "4.1.4.2"),
    "notify-cap-len": (lay(common(), virtio(2, length=2, cap_len=16)), "CapabilityTooShort", "4.1.4.2"),
    "common-in-bar-6": (lay(common(bar=6), *REST), "MissingCommon", "4.1.4.3.1"),
    "common-in-bar-255": (lay(common(bar=255), *REST), "MissingCommon", "4.1.4.3.1"),
    "common-in-no-bar": (lay(common(bar=5), *REST), "NoSuchBar", "4.1.4"),
    "common-in-an-upper-half": (lay(common(bar=3), *REST), "NoSuchBar", "4.1.4"),
    "common-beyond-the-bar": (lay(common(offset=0x4000), *REST), "RegionBeyondBar", "4.1.4"),
    "common-half-beyond-the-bar": (lay(common(offset=0x3FE0), *REST), "RegionBeyondBar", "4.1.4"),
    "common-wraps": (lay(common(offset=0xFFFF_FFE0), *REST), "RegionWraps", "4.1.4"),
    "common-too-short": (lay(common(length=0x37), *REST), "RegionTooShort", "4.1.4.3.1"),
    "common-misaligned": (lay(common(offset=2), *REST), "RegionMisaligned", "4.1.4.3.1"),
    "notify-misaligned": (lay(common(), notify(offset=0x1001)), "RegionMisaligned", "4.1.4.4.1"),
    "notify-too-short": (lay(common(), notify(length=1)), "RegionTooShort", "4.1.4.4.1"),
    "multiplier-1": (lay(common(), notify(1)), "BadNotifyMultiplier", "4.1.4.4.1"),
    "multiplier-6": (lay(common(), notify(6)), "BadNotifyMultiplier", "4.1.4.4.1"),
    "multiplier-all-ones": (lay(common(), notify(0xFFFF_FFFF)), "BadNotifyMultiplier", "4.1.4.4.1"),
    "bar-0-without-size": (bar(0, 0), "NoSuchBar", "4.1.4"),
    "bar-0-not-of-a-size": (bar(0, 0xFFFF_8100), "NoSuchBar", "4.1.4"),
    "bar-0-keeps-no-address": (
        lambda fake: (fake.masks.__setitem__(0, (0xFFFF_C000, 0)), setattr(fake, "write_config", forgetful(fake))),
        "BarNotWritable",
        "4.1.1",
    ),
    "another-vendor": (edit(0, 2, 0x8086), "NotVirtio", "4.1.2.2"),
    "device-id-below": (edit(2, 2, 0x0FFF), "NotVirtio", "4.1.2.2"),
    "device-id-above": (edit(2, 2, 0x1080), "NotVirtio", "4.1.2.2"),
    "bridge": (edit(0x0E, 1, 0x81), "BadHeader", "4.1.1"),
    "transitional-with-nothing": (
        lambda fake: (fake.set(2, 2, 0x1005), fake.set(0x34, 1, 0)),
        "NoInterface",
        "4.1.5.1.1.1",
    ),
}


def forgetful(fake: FakePci) -> Callable[[int, int, int], None]:
    """BAR 0 can be sized, and then keeps nothing."""
    write = fake.write_config

    def write_config(offset: int, size: int, value: int) -> None:
        write(offset, size, 0 if offset == 0x10 and value != 0xFFFF_FFFF else value)

    return write_config


@pytest.mark.row("X-capabilities")
@pytest.mark.parametrize(("change", "rule", "clause"), FATAL.values(), ids=FATAL)
def test_found_and_refused(change: Callable[[FakePci], object], rule: str, clause: str) -> None:
    fake = FakePci()
    change(fake)
    with pytest.raises(StatusViolation) as caught:
        open_pci(fake)
    assert (caught.value.rule, caught.value.clause) == (rule, clause)
    assert clause in CLAUSES
    assert len(str(caught.value).splitlines()) == 1


def test_nobody_is_there() -> None:
    fake = FakePci()
    fake.config[:] = b"\xff" * 256
    with pytest.raises(StateError, match="no PCI function"):
        open_pci(fake)


def test_the_first_usable_structure_wins() -> None:
    """Reserved BARs and types are ignored by the letter, and so is whatever comes second."""
    fake = FakePci(
        [
            common(bar=6),
            virtio(7, length=8),
            virtio(0, bar=3, offset=1, length=1, cap_len=1),
            common(),
            common(offset=0x2000),
            *REST,
        ]
    )
    registers = open_pci(fake, strict=True)
    assert isinstance(registers, PciRegisters)
    assert registers.capabilities.structures[CapType.COMMON_CFG].position == fake.places[3]
    whys = [each.why for each in registers.capabilities.ignored]
    assert whys == ["reserved BAR 6", "reserved type", "reserved type", "not the first of its type"]


def test_longer_capabilities_and_regions_are_accepted() -> None:
    longer = [cap[:2] + bytes([cap[2] + 8]) + cap[3:] + bytes(8) for cap in (common(length=0x1000), notify(), isr())]
    registers = open_pci(FakePci([*longer, device(), window(), msix()]), strict=True)
    assert isinstance(registers, PciRegisters)
    assert registers.capabilities.structures[CapType.COMMON_CFG].length == 0x1000


def test_a_region_is_cut_to_its_bar() -> None:
    fake = FakePci([common(), notify(), isr(), device(length=0xFFFF_FFFF), window(), msix()])
    registers = opened(fake)
    assert registers.config_size() == 0x1000
    assert [each.rule for each in registers.findings] == ["RegionWraps"]


@pytest.mark.row("X-capabilities")
def test_what_of_a_region_lies_in_its_bar_is_enough() -> None:
    registers = opened(FakePci([common(), notify(), isr(offset=0x3FFF, length=2), device(), window(), msix()]))
    assert registers.capabilities.structures[CapType.ISR_CFG].length == 1
    assert [each.rule for each in registers.findings] == ["RegionBeyondBar"]


@pytest.mark.row("X-capabilities")
@pytest.mark.parametrize("kind", ["msix", "vendor"])
def test_a_capability_ends_where_the_space_ends(kind: str) -> None:
    fake = FakePci()
    last = msix() if kind == "msix" else vendor(0x1234)
    link(fake, 0xF4, GOOD[:-1] if kind == "msix" else GOOD)
    fake.config[0xF4:] = last
    registers = open_pci(fake, strict=True)
    assert isinstance(registers, PciRegisters)
    assert registers.interrupts.kind == "msix"
    assert [each.position for each in registers.capabilities.vendor] == ([0xF4] if kind == "vendor" else [])


@pytest.mark.row("X-capabilities")
def test_an_unaligned_link_is_followed_without_its_lowest_bits() -> None:
    fake = FakePci()
    link(fake, 0xF7)
    fake.config[0x34] = 0x42
    fake.config[0xF4:] = vendor(0x1234)
    registers = opened(fake)
    assert [each.rule for each in registers.findings] == ["CapabilityUnaligned"] * 2
    assert set(registers.capabilities.structures) >= {CapType.COMMON_CFG, CapType.NOTIFY_CFG}
    assert [each.position for each in registers.capabilities.vendor] == [0xF4]


@pytest.mark.row("X-capabilities")
@pytest.mark.parametrize(
    ("position", "rule"),
    [
        (0x41, "CapabilityUnaligned"),
        (0x40, "CapabilityLoop"),
        (0x3C, "CapabilityBelowHeader"),
        (0x3F, "CapabilityBelowHeader"),
    ],
)
def test_the_list_ends_where_it_leads_back(position: int, rule: str) -> None:
    fake = FakePci()
    link(fake, position)
    read, left = fake.read_config, iter(range(2000))

    def read_config(offset: int, size: int) -> int:
        next(left)
        return read(offset, size)

    fake.read_config = read_config
    registers = opened(fake)
    assert [each.rule for each in registers.findings] == [rule]
    assert registers.capabilities.ignored == []


def test_any_virtio_capability_makes_a_virtio_function() -> None:
    place = Structure(CapType.ISR_CFG, 0x40, 0, 0, 1)
    assert not Capabilities().virtio
    assert Capabilities(structures={CapType.ISR_CFG: place}).virtio
    assert Capabilities(shared_memory={0: place}).virtio
    assert Capabilities(vendor=[VendorData(0x40, 0x1234, b"")]).virtio
    assert Capabilities(ignored=[Ignored(0x40, 7, "reserved type")]).virtio
    assert Capabilities(broken={CapType.ISR_CFG: StatusViolation("MissingIsr", "4.1.4.5.1", "none")}).virtio


def test_shared_memory_and_vendor_data() -> None:
    fake = FakePci([*GOOD, shared(0, 0, 0x1000), shared(7, 0x8_0000, 0x8_0000), vendor(0x1234)])
    registers = open_pci(fake, strict=True)
    assert isinstance(registers, PciRegisters)
    places = {number: (each.bar, each.offset, each.length) for number, each in registers.shared_memory.items()}
    assert places == {0: (2, 0, 0x1000), 7: (2, 0x8_0000, 0x8_0000)}
    assert [each[1:] for each in registers.capabilities.vendor] == [(0x1234, b"abcdef")]
    assert 2 in fake.placed


def test_shared_memory_that_no_bus_has_room_for_is_left_out() -> None:
    fake = FakePci([*GOOD, shared(3, 0, 1 << 40)])
    fake.masks[2:4] = [(0, 0x4), (0xFFFF_FF00, 0)]
    registers = open_pci(fake, strict=True)
    assert isinstance(registers, PciRegisters)
    assert registers.shared_memory == {}


def test_structures_may_lie_in_io_space() -> None:
    fake = FakePci([common(), notify(bar=4, offset=0, length=16), isr(), device(), window(), msix()])
    bar(4, 0xFFE0, 1)(fake)
    registers = open_pci(fake, strict=True)
    registers.write_driver_features(1 << 32)
    registers.kick_notifier(0, lambda: 0).notify()
    assert fake.writes[-1] == (4, 0, 2, 0)
    assert fake.read_config(4, 2) & 3 == 3
    assert fake.read_config(0x20, 4) & 0xFFFC == fake.placed[4]


@pytest.mark.parametrize("revision", [0, 1, 77, 255])
def test_any_revision_is_accepted(revision: int) -> None:
    fake = FakePci()
    fake.config[8] = revision
    assert open_pci(fake, strict=True).device_id() == 4


def test_transitional_ids() -> None:
    fake = FakePci(device_id=0x1005)
    assert open_pci(fake, strict=True).device_id() == 4
    fake = FakePci(device_id=0x1013)
    fake.set(0x2E, 2, 45)
    assert open_pci(fake, strict=True).device_id() == 45


def test_legacy_needs_its_bar() -> None:
    with pytest.raises(StateError, match="no legacy interface"):
        open_pci(FakePci(), interface="legacy")
    fake = FakePci(())
    fake.set(2, 2, 0x1005)
    bar(0, 0xFFE0, 1)(fake)
    registers = open_pci(fake, strict=True)
    assert registers.legacy
    assert le(fake.placed[0], 4)[0] & 3 == 0
    # A modern-only id with nothing but an I/O BAR is not a legacy device.
    fake.set(2, 2, 0x1044)
    with pytest.raises(StatusViolation, match="MissingCommon"):
        open_pci(fake)

"""Our driver on our own function, over a PCI bus in process: every flavour, and devices that are wrong on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
from virtio_test.carrier.pci import PciLoopback
from virtio_test.devices.test import TestDevice
from virtio_test.driver.pci import PciRegisters, open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.errors import PeerTimeout, StateError, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.status import Status
from virtio_test.transport.pci.capabilities import SharedMemory, VendorData
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import Flavour, declare
from virtio_test.transport.pci.function import VirtioPci

Lines = Literal["msix", "intx"]


def driver_of(
    declaration: Declaration | None = None, *, wanted: FeatureSet | None = None, **options: Any
) -> TestDriver:
    """A driver of the test device behind a function; all in one process and one loop."""
    device = TestDevice(console=lambda _line: None)
    function = VirtioPci(device, declaration=declaration or declare(device, flavour="non-transitional"))
    registers = open_pci(PciLoopback(function), **options)
    return TestDriver(registers, wanted=wanted, console=lambda _line: None)


def good(flavour: Flavour = "non-transitional", **more: Any) -> Declaration:
    return declare(TestDevice(console=lambda _line: None), flavour=flavour, **more)


@pytest.mark.parametrize("lines", ["msix", "intx"])
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize(
    ("flavour", "interface", "legacy"),
    [
        ("generic", "auto", False),
        ("transitional", "modern", False),
        ("transitional", "legacy", True),
        ("non-transitional", "auto", False),
    ],
)
def test_requests_in_every_flavour(
    flavour: Flavour, interface: Literal["auto", "modern", "legacy"], legacy: bool, lines: Lines, ring: str
) -> None:
    wanted = FeatureSet(
        "INDIRECT_DESC", "EVENT_IDX", "RING_RESET", "NOTIFICATION_DATA", "IN_ORDER", "NOTIF_CONFIG_DATA"
    )
    if ring == "packed":
        wanted |= FeatureSet("RING_PACKED")
    driver = driver_of(good(flavour), wanted=wanted, interface=interface, interrupts=lines, strict=True)
    driver.initialize()
    assert driver.registers.legacy is legacy
    assert ("RING_PACKED" in driver.features) is (ring == "packed" and not legacy)
    assert driver.request(7) == (108, 109, 110)
    assert len(driver.request_many(range(200))) == 200
    if not legacy:
        driver.reset_queue(0)
        assert driver.request(9).ret == 110
    driver.initialize()
    assert driver.request(100).ret == 201
    driver.detach()


def test_one_vector_for_everything() -> None:
    driver = driver_of(good(vectors=1), interrupts="msix", strict=True)
    driver.initialize()
    assert driver.request(1).ret == 102


@pytest.mark.parametrize("multiplier", [0, 2, 4096])
def test_any_multiplier(multiplier: int) -> None:
    driver = driver_of(good(multiplier=multiplier), wanted=FeatureSet(), strict=True)
    driver.initialize()
    assert driver.request(1).ret == 102


def test_shared_memory_is_found_and_reached() -> None:
    device = TestDevice(console=lambda _line: None)
    declaration = declare(device, shared_memory={1: 0x1000, 9: 0x2000}, vendor_data=[VendorData(0x1234, b"hi")])
    function = VirtioPci(device, declaration=declaration)
    bus = PciLoopback(function)
    registers = open_pci(bus, strict=True)
    assert isinstance(registers, PciRegisters)
    place = registers.shared_memory[9]
    bus.write_bar(place.bar, place.offset + 4, 4, 0x1234_5678)
    assert bus.read_bar(place.bar, place.offset + 4, 2) == 0x5678
    assert registers.shared_memory[1].length == 0x1000
    assert registers.capabilities.vendor[0].vendor_id == 0x1234


def without_features_ok(real: int) -> int:
    return real & ~Status.FEATURES_OK


def never_zero(real: int) -> int:
    return real or 1


Wrong = tuple[Callable[[Declaration], Declaration], str]

WRONG: dict[str, Wrong] = {
    "common-missing": (lambda it: it.without("common"), "MissingCommon"),
    "notify-missing": (lambda it: it.without("notify"), "MissingNotify"),
    "common-bar": (lambda it: it.change("common", bar=6), "MissingCommon"),
    "common-no-such-bar": (lambda it: it.change("common", bar=3), "NoSuchBar"),
    "common-wraps": (lambda it: it.change("common", offset=0xFFFF_FFF0), "RegionWraps"),
    "common-beyond": (lambda it: it.change("common", offset=0x10_0000), "RegionBeyondBar"),
    "common-misaligned": (lambda it: it.change("common", offset=1), "RegionMisaligned"),
    "common-cap-len": (lambda it: it.change("common", cap_len=8), "CapabilityTooShort"),
    "common-without-reset": (lambda it: it.change("common", length=0x38), "CommonTooShort"),
    "notify-length": (
        lambda it: it.change("notify", length=5).replace(registers={"queue_notify_off": 1}),
        "NotifyBeyondRegion",
    ),
    "notify-multiplier": (lambda it: it.change("notify", multiplier=3), "BadNotifyMultiplier"),
    "notify-off": (lambda it: it.replace(registers={"queue_notify_off": 0xFFFF}), "NotifyBeyondRegion"),
    "queue-size-5": (lambda it: it.replace(registers={"queue_size": 5}), "BadQueueSize"),
    "queue-size-65535": (lambda it: it.replace(registers={"queue_size": 65535}), "BadQueueSize"),
    "queue-size-deaf": (lambda it: it.replace(deaf=frozenset({"queue_enable"})), "QueueNotEnabled"),
    "vector-refused": (lambda it: it.replace(registers={"queue_msix_vector": 0xFFFF}), "VectorRefused"),
    "config-vector-refused": (lambda it: it.replace(registers={"config_msix_vector": 0xFFFF}), "VectorRefused"),
    "vector-another": (lambda it: it.replace(registers={"queue_msix_vector": 9}), "VectorMismatch"),
    "features-ok-never": (
        lambda it: it.replace(registers={"device_status": without_features_ok}),
        "FeaturesRefused",
    ),
    "version-1-never": (lambda it: it.replace(registers={"device_feature": 0}), "Version1NotOffered"),
}


@pytest.mark.parametrize(("change", "rule"), WRONG.values(), ids=WRONG)
def test_wrong_on_purpose(change: Callable[[Declaration], Declaration], rule: str) -> None:
    wanted = FeatureSet("RING_RESET", "NOTIFICATION_DATA")
    with pytest.raises(StatusViolation) as caught:
        driver_of(change(good()), wanted=wanted).initialize()
    assert caught.value.rule == rule


FOUND: dict[str, Wrong] = {
    "loop": (lambda it: it.change("reset", next=0x40), "CapabilityLoop"),
    "below": (lambda it: it.change("reset", next=0x20), "CapabilityBelowHeader"),
    "isr-missing": (lambda it: it.without("isr"), "MissingIsr"),
    "window-missing": (lambda it: it.without("pci_cfg"), "MissingWindow"),
    "config-too-long": (lambda it: it.change("device", length=1 << 31), "RegionBeyondBar"),
    "msix-elsewhere": (lambda it: it.change("msix", table_bar=0), "BadMsixTable"),
    "shm-64-bits": (
        lambda it: it.add("shm", SharedMemory(bar=4, offset=1 << 63, length=1 << 63)),
        "RegionWraps",
    ),
}


@pytest.mark.parametrize(("change", "rule"), FOUND.values(), ids=FOUND)
def test_wrong_and_driven_all_the_same(change: Callable[[Declaration], Declaration], rule: str) -> None:
    driver = driver_of(change(good()))
    registers = driver.registers
    assert isinstance(registers, PciRegisters)
    assert [each.rule for each in registers.findings] == [rule]


def test_a_reset_that_never_ends() -> None:
    stuck = good().replace(registers={"device_status": never_zero})
    with pytest.raises(PeerTimeout):
        driver_of(stuck).initialize()


def test_a_queue_reset_that_never_ends() -> None:
    driver = driver_of(good().replace(registers={"queue_reset": 1}), wanted=FeatureSet("RING_RESET"))
    driver.initialize()
    with pytest.raises(PeerTimeout):
        driver.reset_queue(0)


def test_a_generation_that_never_stands_still() -> None:
    ticks = itertools.count()

    def tick(_real: int) -> int:
        return next(ticks) & 0xFF

    moving = good().replace(registers={"config_generation": tick})
    with pytest.raises(StatusViolation, match="ConfigNeverStable"):
        driver_of(moving).initialize()


def test_there_is_no_legacy_interface_to_be_forced() -> None:
    with pytest.raises(StateError, match="no legacy interface"):
        driver_of(good(), interface="legacy")

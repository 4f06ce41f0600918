"""The driver model on the PCI function in one process: flavours, interfaces, rings, interrupts, notifications."""

from __future__ import annotations

from typing import Literal

import pytest
from virtio_test.carrier.pci import PciLoopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.test import TestDevice
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.features import FeatureSet
from virtio_test.transport.bank import TRANSPORT_FEATURES
from virtio_test.transport.pci.flavours import Flavour
from virtio_test.transport.pci.function import VirtioPci

from tests.combinations import record

Lines = Literal["msix", "intx"]
Interface = Literal["modern", "legacy"]

WORDS = {"msix": "MSI-X", "intx": "INTx"}
PLACES: list[tuple[Flavour, bool, Interface]] = [
    ("generic", False, "modern"),
    ("generic", False, "legacy"),
    ("generic", True, "modern"),
    ("transitional", False, "modern"),
    ("transitional", False, "legacy"),
    ("non-transitional", False, "modern"),
]
NOTIFICATIONS = {
    "plain": FeatureSet(),
    "data": FeatureSet("NOTIFICATION_DATA"),
    "config": FeatureSet("NOTIF_CONFIG_DATA"),
    "both": FeatureSet("NOTIFICATION_DATA", "NOTIF_CONFIG_DATA"),
}


def ring(agreed: FeatureSet) -> str:
    words = ["packed" if "RING_PACKED" in agreed else "split"]
    return ", ".join(words + [name.lower() for name in ("IN_ORDER", "EVENT_IDX") if name in agreed])


@pytest.mark.parametrize("timer", [False, True])
@pytest.mark.parametrize("notification", NOTIFICATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lines", WORDS)
@pytest.mark.parametrize(("flavour", "port", "interface"), PLACES)
def test_both_variants(
    flavour: Flavour, port: bool, interface: Interface, lines: Lines, packed: bool, notification: str, timer: bool
) -> None:
    said: list[str] = []
    device = TestDevice(timer=timer, console=said.append)
    function = VirtioPci(
        device, flavour=flavour, behind_express_port=port, offered=device.features | TRANSPORT_FEATURES
    )
    registers = open_pci(PciLoopback(function), interface=interface, interrupts=lines, strict=True)
    wanted = RING_FEATURES | NOTIFICATIONS[notification]
    wanted = wanted if packed else wanted - FeatureSet("RING_PACKED")
    driver = TestDriver(registers, timer=timer, wanted=wanted, console=said.append)
    agreed = driver.initialize()
    old = interface == "legacy"
    assert function.bank.legacy is old
    assert ("RING_PACKED" in agreed) is (packed and not old)
    assert (NOTIFICATIONS[notification] <= agreed) is (not old or notification == "plain")
    if timer:
        driver.run_until(lambda: said.count("virttest get ack") == 3, "three ticks", timeout=60)
        assert said[:5] == [
            "==============set config:0",
            "virttest virttest_changed",
            "virttest get config change",
            "=========get virtio num:1",
            "virttest get ack",
        ]
    else:
        # More than the indices of the ring go through, so places and wrap counters in notifications are tried too.
        for number in range(300):
            assert driver.request(number & 0xFF).ret == (number + 1) % 256 + 100
        assert len(driver.request_many(range(200))) == 200
        assert "virtio response ret is 111" in said
    driver.detach()
    assert function.violations == []
    way = flavour if not port else f"{flavour} behind an Express port"
    way = f"{way} through its legacy interface" if old else way
    record(
        device="test (timer)" if timer else "test",
        transport=f"pci {way}, {WORDS[lines]}",
        carrier="in process",
        ring=ring(agreed),
        peer="virtio-test's driver",
    )


@pytest.mark.parametrize("lines", WORDS)
def test_a_function_reset_under_a_driver(lines: Lines) -> None:
    """FLR takes all that was set up; the driver comes back by opening the function anew."""
    device = TestDevice(console=lambda _: None)
    function = VirtioPci(device, behind_express_port=True)
    bus = PciLoopback(function)
    for _ in range(3):
        driver = TestDriver(open_pci(bus, interrupts=lines, strict=True), console=lambda _: None)
        driver.initialize()
        assert driver.request(1).ret == 102
        request = driver.submit_number(2)
        function.reset()
        driver.loop.run_pending()
        assert not request.done
    assert function.violations == []

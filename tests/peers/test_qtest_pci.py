"""Our drivers on QEMU's own devices over virtio-pci: every form, both interrupts, both rings, each ring feature.

One QEMU carries all devices in all forms; a test opens one, drives it with data that is checked, and leaves it reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from virtio_test.carrier.qtest.process import Machine
from virtio_test.driver.pci import PciRegisters, open_pci
from virtio_test.features import FeatureSet

from tests.combinations import record
from tests.peers.exercise import drive, ring
from tests.peers.machines import KINDS, Form, Kind, World

Lines = Literal["msix", "intx"]
Interface = Literal["modern", "legacy"]

RINGS = {"split": FeatureSet(), "packed": FeatureSet("RING_PACKED")}
EXTRAS = {
    "plain": FeatureSet(),
    "event-idx": FeatureSet("EVENT_IDX"),
    "indirect": FeatureSet("INDIRECT_DESC"),
    "in-order": FeatureSet("IN_ORDER"),
    "queue-reset": FeatureSet("RING_RESET"),
    "all": FeatureSet("EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "RING_RESET"),
}
OLD_EXTRAS = {
    "plain": FeatureSet(),
    "event-idx": FeatureSet("EVENT_IDX"),
    "indirect": FeatureSet("INDIRECT_DESC"),
    "all": FeatureSet("EVENT_IDX", "INDIRECT_DESC"),
}
MODERN: list[tuple[Form, Interface]] = [("modern", "modern"), ("transitional", "modern")]
OLD: list[tuple[Form, Interface]] = [("transitional", "legacy"), ("legacy", "legacy")]
WORDS = {"msix": "MSI-X", "intx": "INTx"}


def run(world: World, kind: Kind, form: Form, interface: Interface, lines: Lines, wanted: FeatureSet) -> FeatureSet:
    """Open one device, drive it, and note that it ran."""
    spot = world.spots[kind, form]
    access = world.machine.pci(spot.number)
    try:
        # Nothing at all may be found in QEMU's own devices.
        registers = open_pci(access, interface=interface, interrupts=lines, strict=True)
        assert registers.legacy is (interface == "legacy")
        assert registers.interrupts.kind == lines
        agreed = drive(world, spot, registers, wanted)
    finally:
        access.close()
    way = form if form != "transitional" else f"transitional through its {interface} interface"
    record(device=kind, transport=f"pci {way}, {WORDS[lines]}", carrier="qtest", ring=ring(agreed), peer=world.peer)
    return agreed


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", RINGS)
@pytest.mark.parametrize("lines", WORDS)
@pytest.mark.parametrize(("form", "interface"), MODERN)
@pytest.mark.parametrize("kind", KINDS)
def test_modern(
    world: Callable[..., World], kind: Kind, form: Form, interface: Interface, lines: Lines, layout: str, extra: str
) -> None:
    wanted = RINGS[layout] | EXTRAS[extra]
    agreed = run(world("q35"), kind, form, interface, lines, wanted)
    assert wanted <= agreed, "QEMU offers all of these"
    assert ("RING_PACKED" in agreed) is (layout == "packed")


@pytest.mark.parametrize("extra", OLD_EXTRAS)
@pytest.mark.parametrize("lines", WORDS)
@pytest.mark.parametrize(("form", "interface"), OLD)
@pytest.mark.parametrize("kind", KINDS)
def test_legacy(
    world: Callable[..., World], kind: Kind, form: Form, interface: Interface, lines: Lines, extra: str
) -> None:
    agreed = run(world("q35"), kind, form, interface, lines, OLD_EXTRAS[extra])
    assert OLD_EXTRAS[extra] <= agreed
    assert "VERSION_1" not in agreed


@pytest.mark.parametrize("lines", WORDS)
@pytest.mark.parametrize(("form", "interface"), [*MODERN, *OLD])
@pytest.mark.parametrize("kind", KINDS)
def test_the_older_machine(
    world: Callable[..., World], kind: Kind, form: Form, interface: Interface, lines: Lines
) -> None:
    machine: Machine = "pc"
    wanted = EXTRAS["all"] | RINGS["packed"] if interface == "modern" else OLD_EXTRAS["all"]
    assert wanted <= run(world(machine), kind, form, interface, lines, wanted)


def test_what_the_capabilities_of_qemu_say(world: Callable[..., World]) -> None:
    here = world("q35")
    spot = here.spots["blk", "transitional"]
    registers = open_pci(here.machine.pci(spot.number), strict=True)
    assert isinstance(registers, PciRegisters)
    assert registers.function.transitional
    assert (registers.function.revision, registers.device_id()) == (0, 2)
    found = registers.capabilities
    assert [each.name for each in sorted(found.structures)] == [
        "COMMON_CFG",
        "NOTIFY_CFG",
        "ISR_CFG",
        "DEVICE_CFG",
        "PCI_CFG",
    ]
    assert found.ignored == []
    assert found.msix is not None
    assert found.msix.size == 3, "one for each of two queues and one for the configuration"

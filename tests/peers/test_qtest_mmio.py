"""Our drivers on QEMU's own devices over virtio-mmio: microvm's transports, version 2 and the legacy version 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.driver.rng import RngDriver
from virtio_test.errors import QueueViolation, StateError
from virtio_test.features import FeatureSet

from tests.combinations import record
from tests.peers.exercise import drive, ring
from tests.peers.machines import KINDS, Kind, World
from tests.peers.test_qtest_pci import EXTRAS, OLD_EXTRAS, RINGS

# QEMU 11.1 offers RING_RESET here and does not have it: see below.
WHOLE = {name: extra - FeatureSet("RING_RESET") for name, extra in EXTRAS.items() if name != "queue-reset"}


def run(world: World, kind: Kind, form: str, wanted: FeatureSet) -> FeatureSet:
    """Open one device, drive it, and note that it ran."""
    spot = world.spots[kind, form]
    access = world.machine.mmio(spot.number)
    try:
        registers = MmioRegisters(access, size=512)
        assert registers.legacy is (form == "legacy")
        agreed = drive(world, spot, registers, wanted)
    finally:
        access.close()
    record(device=kind, transport=f"mmio {form}", carrier="qtest", ring=ring(agreed), peer=world.peer)
    return agreed


@pytest.mark.parametrize("extra", WHOLE)
@pytest.mark.parametrize("layout", RINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_version_2(world: Callable[..., World], kind: Kind, layout: str, extra: str) -> None:
    wanted = RINGS[layout] | WHOLE[extra]
    assert wanted <= run(world("microvm", "modern"), kind, "modern", wanted)


@pytest.mark.parametrize("extra", OLD_EXTRAS)
@pytest.mark.parametrize("kind", KINDS)
def test_legacy_version(world: Callable[..., World], kind: Kind, extra: str) -> None:
    agreed = run(world("microvm", "legacy"), kind, "legacy", OLD_EXTRAS[extra])
    assert OLD_EXTRAS[extra] <= agreed
    assert "VERSION_1" not in agreed


@pytest.mark.parametrize("layout", RINGS)
def test_what_qemu_does_not_do(world: Callable[..., World], layout: str) -> None:
    """Two findings in QEMU 11.1's virtio-mmio: RING_RESET without QueueReset, and any high selector taken for 1."""
    here = world("microvm", "modern")
    spot = here.spots["rng", "modern"]
    access = here.machine.mmio(spot.number)
    registers = MmioRegisters(access, size=512)
    driver = RngDriver(registers, wanted=RINGS[layout] | FeatureSet("RING_RESET"))
    assert "RING_RESET" in driver.initialize()
    with pytest.raises(QueueViolation, match="QueueStaysReady"):
        driver.reset_queue(0)
    words = registers.device_features()
    assert words >> 64 & 0xFFFF_FFFF == words >> 96 == words >> 32 & 0xFFFF_FFFF, "2.2 has nothing from bit 64 on"
    driver.initialize()
    assert len(driver.read(16)) == 16
    driver.detach()
    access.close()


def test_a_transport_without_a_device(world: Callable[..., World]) -> None:
    access = world("microvm", "modern").machine.mmio(7)
    with pytest.raises(StateError, match="device id is 0"):
        MmioRegisters(access)


def test_microvm_has_no_pci_and_a_pc_no_mmio(world: Callable[..., World]) -> None:
    with pytest.raises(StateError, match="no PCI bus"):
        world("microvm", "modern").machine.pci(2)
    with pytest.raises(StateError, match="no virtio-mmio"):
        world("q35").machine.mmio(0)

"""One device and its driver over each register transport in this process, for what they all do alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from virtio_test._core import GuestMemory, Policy
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.carrier.pci import PciLoopback
from virtio_test.device import RING_FEATURES, Device
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.driver.pci import open_pci
from virtio_test.driver.registers import Registers
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.transport.bank import RegisterBank
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci

Transport = Loopback | VirtioMmio | VirtioPci


@dataclass
class Way:
    """A transport's two sides."""

    side: Transport
    registers: Registers

    @property
    def bank(self) -> RegisterBank:
        return self.side.bank

    def run(self) -> int:
        return self.bank.loop.run_pending()


def in_process(device: Device, **options: object) -> Way:
    side = Loopback(device, **options)  # type: ignore[arg-type]
    return Way(side, side)


def mmio(device: Device, **options: object) -> Way:
    side = VirtioMmio(device, **options)  # type: ignore[arg-type]
    return Way(side, MmioRegisters(MmioLoopback(side)))


def pci(device: Device, **options: object) -> Way:
    side = VirtioPci(device, behind_express_port=True, **options)  # type: ignore[arg-type]
    return Way(side, open_pci(PciLoopback(side), interrupts="msix"))


MAKERS: dict[str, Callable[..., Way]] = {"in process": in_process, "mmio": mmio, "pci": pci}
WAYS = pytest.mark.parametrize("way", MAKERS)
RINGS = pytest.mark.parametrize("ring", ["split", "packed"])


def reach(
    device: Device,
    way: str,
    *,
    more: FeatureSet | None = None,
    memory: GuestMemory | None = None,
    loop: OwnerLoop | None = None,
    policy: Policy = Policy.interop,
) -> Way:
    """`device` over that transport, offering `more` than its own features."""
    offered = device.features if more is None else device.features | more
    return MAKERS[way](device, offered=offered, memory=memory, loop=loop, policy=policy)


def features(ring: str) -> FeatureSet:
    return RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")

"""One process as a machine: a device, a transport, and the registers that a driver finds."""

from __future__ import annotations

from typing import Literal, TypeAlias

from virtio_test.device import Device
from virtio_test.driver.registers import Registers
from virtio_test.errors import InvalidArgument
from virtio_test.loop import OwnerLoop

__all__ = ["Flavour", "Interface", "Transport", "connect"]

Transport: TypeAlias = Literal["none", "pci", "mmio"]
Flavour: TypeAlias = Literal["generic", "transitional", "non-transitional"]
Interface: TypeAlias = Literal["auto", "modern", "legacy"]


def connect(
    device: Device,
    *,
    loop: OwnerLoop,
    transport: Transport = "none",
    flavour: Flavour | None = None,
    interface: Interface = "auto",
    intx: bool = False,
) -> Registers:
    """The registers of `device` behind a transport, in this process.

    Args:
        device: the device.
        loop: the owner loop of both ends.
        transport: ``none`` for no registers at all.
        flavour: of a PCI function; ``generic`` when None.
        interface: the one that the driver uses; through ``legacy``, MMIO is of version 1.
        intx: interrupts of a PCI function by its line instead of by messages.

    Raises:
        InvalidArgument: an option that the transport does not have, or a device without such an interface.
        PeerError: the registers are not those of a device.
    """
    if transport != "pci" and (flavour is not None or intx):
        raise InvalidArgument(f"a flavour and INTx are matters of PCI, not of the transport {transport!r}")
    if transport == "none":
        if interface == "legacy":
            raise InvalidArgument("without a transport there is no legacy interface: say pci or mmio")
        from virtio_test.carrier.loopback import Loopback

        return Loopback(device, loop=loop)
    if transport == "mmio":
        from virtio_test.carrier.mmio import MmioLoopback
        from virtio_test.driver.mmio import MmioRegisters
        from virtio_test.transport.mmio import VirtioMmio

        return MmioRegisters(MmioLoopback(VirtioMmio(device, version=1 if interface == "legacy" else 2, loop=loop)))
    from virtio_test.carrier.pci import PciLoopback
    from virtio_test.driver.pci import open_pci
    from virtio_test.transport.pci.function import VirtioPci

    function = VirtioPci(device, flavour=flavour or "generic", loop=loop)
    return open_pci(PciLoopback(function), interface=interface, interrupts="intx" if intx else "auto")

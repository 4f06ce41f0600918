"""PCI functions that only a declaration of one's own makes, served over vfio-user: ``--socket PATH --declare NAME``."""

from __future__ import annotations

import sys

from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.server import serve
from virtio_test.device import Device
from virtio_test.devices.console import ConsoleDevice, ConsolePort
from virtio_test.devices.test import TestDevice
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.capabilities import VendorData
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci

VENDOR = VendorData(0x1B36, b"everything")


def declaration(device: Device, name: str) -> Declaration:
    """One of the functions.

    Args:
        device: what is behind it.
        name: ``everything``: shared memory, vendor data, a notification page for each queue, a 32-bit BAR, another
            class; ``integrated``: an Express endpoint integrated into the root complex, without MSI-X;
            ``console``: that of `echo`, with nothing special.
    """
    if name == "integrated":
        return declare(device, flavour="non-transitional", express=True, vectors=0)
    if name == "console":
        return declare(device)
    return declare(
        device,
        flavour="non-transitional",
        vectors=5,
        multiplier=4096,
        wide=False,
        pci_class=0x0500,
        shared_memory={1: 8192, 7: 4096},
        vendor_data=(VENDOR,),
    )


def echo() -> ConsoleDevice:
    """A console with two ports: what port 0 gets is printed, and port 1 answers all with the same."""

    def answer(data: bytes) -> None:
        device.feed(data, port=1)

    ports = [
        ConsolePort(lambda data: print(data.decode().rstrip(), flush=True)),
        ConsolePort(answer, "echo", console=False),
    ]
    device = ConsoleDevice(ports=ports, size=(132, 43))
    return device


def main() -> None:
    path, name = (sys.argv[sys.argv.index(option) + 1] for option in ("--socket", "--declare"))
    device = echo() if name == "console" else TestDevice(console=lambda line: print(line, flush=True))
    function = VirtioPci(device, declaration=declaration(device, name), loop=OwnerLoop(), memory=GuestMemory())
    serve(function, path, ready=lambda _: print(f"virtio-test: serving {name}", file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()

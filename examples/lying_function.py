"""PCI functions that lie, and the driver that is lied to: each lie is one change of a good declaration.

Run it with:                                      python examples/lying_function.py
"""

import itertools

from virtio_test import PeerError, TestDevice, TestDriver
from virtio_test.carrier.pci import PciLoopback
from virtio_test.driver.pci import open_pci
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci

NUMBERS = itertools.count()
GOOD = declare(TestDevice(), flavour="non-transitional")
LIES = {
    "nothing": GOOD,
    "the notification structure is beyond its BAR": GOOD.change("notify", offset=0xFFFF_F000),
    "there is no common configuration": GOOD.without("common"),
    "the reset never ends": GOOD.replace(registers={"device_status": lambda real: real or 1}),
    "no features are ever good enough": GOOD.replace(registers={"device_status": lambda real: real & ~8}),
    "a queue of 40000 entries": GOOD.replace(registers={"queue_size": 40000}),
    "the configuration never stands still": GOOD.replace(registers={"config_generation": lambda _: next(NUMBERS)}),
}


def tried(declaration: Declaration) -> str:
    """What the driver says about such a function."""
    device = TestDevice(console=lambda _: None)
    function = VirtioPci(device, declaration=declaration)
    try:
        driver = TestDriver(open_pci(PciLoopback(function)), console=lambda _: None)
        driver.initialize()
        return f"works: {driver.request(10)}"
    except PeerError as error:
        return str(error)


def main() -> str:
    """Try every lie; print and return what was found."""
    text = "\n".join(f"{lie}:\n  {tried(declaration)}" for lie, declaration in LIES.items())
    print(text)
    return text


if __name__ == "__main__":
    main()

"""A driver in a page: it has a device add numbers, with many requests in flight and a feature of its own.

The device is at the end, so that this runs by itself; the same driver runs over any other transport.
Run it with:                                      python examples/sum_driver.py
"""

import struct
from collections.abc import Iterable

from virtio_test import BaseDevice, Driver, FeatureSet, Loopback, Registers

SUM_DEVICE_ID = 61  # given to nobody in VIRTIO 1.4
NAMES = {"SIGNED": 0}


class SumDriver(Driver):
    """Sends little endian numbers of 32 bits, gets their sum in 64."""

    def __init__(self, registers: Registers) -> None:
        ring = FeatureSet("VERSION_1", "RING_PACKED", "INDIRECT_DESC", "EVENT_IDX")
        super().__init__(registers, wanted=ring | FeatureSet("SIGNED", device=NAMES), indirect=True)

    def sums(self, lists: Iterable[list[int]]) -> list[int]:
        """The sum of each list; all requests are in flight at once."""
        code = "i" if "SIGNED" in self.features else "I"
        requests = [
            self.submit(0, [struct.pack(f"<{len(numbers)}{code}", *numbers)], [8], publish=False) for numbers in lists
        ]
        self.flush(0)
        return [int.from_bytes(each.wait(), "little", signed=code == "i") for each in requests]


def add(request: bytes) -> bytes:
    """The device's side."""
    return sum(number for (number,) in struct.iter_unpack("<i", request)).to_bytes(8, "little", signed=True)


def main() -> str:
    """Add a few lists; returns what it prints."""
    device = BaseDevice(SUM_DEVICE_ID, handlers={0: add}, features=FeatureSet("SIGNED", device=NAMES))
    driver = SumDriver(Loopback(device))
    driver.initialize()
    text = f"{driver.sums([[1, 2, 3], [-5, 5], [2**31 - 1] * 4])} over {driver.features}"
    print(text)
    driver.detach()
    return text


if __name__ == "__main__":
    main()

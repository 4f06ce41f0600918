"""A disk in a page: an image in memory that counts how often each sector is written.

In this process, with a driver of our own:        python examples/blk_device.py
For a real guest, as a vhost-user back-end:       python examples/blk_device.py disk.sock
"""

import sys

from virtio_test import Loopback
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.image import RamImage
from virtio_test.driver.blk import BlkDriver

SECTORS = 2048


class WatchedImage(RamImage):
    """An image of one's own has seven methods; a known one needs only what is to be different."""

    def __init__(self, sectors: int) -> None:
        super().__init__(sectors * 512)
        self.writes = [0] * sectors

    def write(self, data: memoryview, offset: int) -> None:
        """An `OSError` here would be an IOERR for the driver: a bad sector."""
        for sector in range(offset // 512, (offset + len(data)) // 512):
            self.writes[sector] += 1
        super().write(data, offset)


def main(arguments: list[str]) -> str:
    """Serve on the socket that is named, or use the disk in this process; returns what it prints."""
    image = WatchedImage(SECTORS)
    device = BlkDevice(image, serial="in a page", num_queues=2)
    if arguments:
        from virtio_test.transport.vhost_user.backend import serve

        serve(device, arguments[0])
        return ""

    driver = BlkDriver(Loopback(device))
    driver.initialize()
    driver.write(0, b"hello".ljust(1024, b"\0"))
    flying = [driver.submit_write(1, bytes(512), queue=number % 2) for number in range(8)]
    for request in flying:
        request.wait()
    driver.flush_cache()
    busiest = max(range(SECTORS), key=lambda sector: image.writes[sector])
    text = (
        f"{driver.identify()}: {driver.read(0, 1)[:5].decode()}; "
        f"sector {busiest} was written {image.writes[busiest]} times, {sum(map(bool, image.writes))} were at all"
    )
    print(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])

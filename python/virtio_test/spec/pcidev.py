"""PCI over virtio, as user-mode Linux speaks it (Linux, include/uapi/linux/virtio_pcidev.h): constants only.

Not part of VIRTIO. A device with two queues: the driver sends commands on the first, the device interrupts with the
buffers of the second. Each message is a header and data; the header's numbers are in the byte order of the processor.
"""

import struct
from enum import IntEnum
from typing import Final

UML_PCI_DEVICE_ID: Final = 1234
"""The virtio id that user-mode Linux is usually configured for; none is assigned."""

COMMAND_QUEUE: Final = 0
INTERRUPT_QUEUE: Final = 1

HEADER: Final = struct.Struct("=BBHIQ")
"""op, bar, reserved, size in bytes, address; the data follows."""


class Op(IntEnum):
    """What a message is. Those up to `MMIO_MEMSET` are commands, the others interrupts."""

    CFG_READ = 1
    CFG_WRITE = 2
    MMIO_READ = 3
    MMIO_WRITE = 4
    MMIO_MEMSET = 5
    INT = 6
    MSI = 7
    PME = 8

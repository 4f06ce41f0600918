"""What virtio over PCI builds on: offsets and bits of the PCI configuration space, constants only.

From the PCI Local Bus specification 3.0 (chapters 6.1, 6.2, 6.8); VIRTIO 1.4, 4.1.1 asks for them.
"""

from types import MappingProxyType
from typing import Final

CONFIG_SIZE: Final = 256
"""Bytes of conventional configuration space; PCI Express has 4096."""

HEADER: Final = MappingProxyType(
    {
        "vendor_id": (0x00, 2),
        "device_id": (0x02, 2),
        "command": (0x04, 2),
        "status": (0x06, 2),
        "revision_id": (0x08, 1),
        "header_type": (0x0E, 1),
        "subsystem_vendor_id": (0x2C, 2),
        "subsystem_id": (0x2E, 2),
        "capabilities_pointer": (0x34, 1),
        "interrupt_line": (0x3C, 1),
        "interrupt_pin": (0x3D, 1),
    }
)
"""The fields of a type 0 header that a driver uses: name to (offset, size in bytes)."""

HEADER_SIZE: Final = 0x40
BAR0: Final = 0x10
BAR_COUNT: Final = 6

COMMAND_IO: Final = 0x0001
COMMAND_MEMORY: Final = 0x0002
COMMAND_MASTER: Final = 0x0004
COMMAND_INTX_DISABLE: Final = 0x0400
STATUS_INTERRUPT: Final = 0x0008
STATUS_CAPABILITIES: Final = 0x0010

BAR_IO: Final = 0x1
BAR_TYPE: Final = 0x6
BAR_TYPE_32: Final = 0x0
BAR_TYPE_64: Final = 0x4
BAR_PREFETCHABLE: Final = 0x8

CAP_ID_MSIX: Final = 0x11
MSIX_CAP_SIZE: Final = 12
MSIX_CONTROL: Final = 2
MSIX_TABLE: Final = 4
MSIX_PBA: Final = 8
MSIX_SIZE_MASK: Final = 0x07FF
MSIX_MASK_ALL: Final = 0x4000
MSIX_ENABLE: Final = 0x8000
MSIX_ENTRY_SIZE: Final = 16
MSIX_ENTRY_MASKED: Final = 0x1

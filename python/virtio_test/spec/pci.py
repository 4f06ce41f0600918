"""Register layouts of virtio over PCI (VIRTIO 1.4, 4.1.4): offsets and sizes in bytes, constants only."""

from enum import IntEnum
from types import MappingProxyType
from typing import Final, NamedTuple


class Register(NamedTuple):
    """Place of a register in its structure: byte offset, size in bytes, whether the driver may write it."""

    offset: int
    size: int
    driver_writable: bool


class CapType(IntEnum):
    """Values of `cfg_type` in a virtio PCI capability (4.1.4); every other value is reserved."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5
    SHARED_MEMORY_CFG = 8
    VENDOR_CFG = 9


CAP_VENDOR: Final = 0x09
"""`cap_vndr`: a vendor-specific PCI capability."""

CAP: Final = MappingProxyType(
    {
        "cap_vndr": Register(0, 1, False),
        "cap_next": Register(1, 1, False),
        "cap_len": Register(2, 1, False),
        "cfg_type": Register(3, 1, False),
        "bar": Register(4, 1, False),
        "id": Register(5, 1, False),
        "offset": Register(8, 4, False),
        "length": Register(12, 4, False),
    }
)
"""struct virtio_pci_cap. In the PCI_CFG capability `bar`, `offset` and `length` are writable (4.1.4.9)."""

CAP_SIZE: Final = 16
CAP_NOTIFY_MULTIPLIER: Final = Register(16, 4, False)
CAP_PCI_CFG_DATA: Final = Register(16, 4, True)
CAP64_OFFSET_HI: Final = Register(16, 4, False)
CAP64_LENGTH_HI: Final = Register(20, 4, False)
CAP_NOTIFY_SIZE: Final = 20
CAP_PCI_CFG_SIZE: Final = 20
CAP64_SIZE: Final = 24
BARS: Final = range(6)
"""Legal values of `bar`; every other is reserved."""

COMMON: Final = MappingProxyType(
    {
        "device_feature_select": Register(0x00, 4, True),
        "device_feature": Register(0x04, 4, False),
        "driver_feature_select": Register(0x08, 4, True),
        "driver_feature": Register(0x0C, 4, True),
        "config_msix_vector": Register(0x10, 2, True),
        "num_queues": Register(0x12, 2, False),
        "device_status": Register(0x14, 1, True),
        "config_generation": Register(0x15, 1, False),
        "queue_select": Register(0x16, 2, True),
        "queue_size": Register(0x18, 2, True),
        "queue_msix_vector": Register(0x1A, 2, True),
        "queue_enable": Register(0x1C, 2, True),
        "queue_notify_off": Register(0x1E, 2, False),
        "queue_desc": Register(0x20, 8, True),
        "queue_driver": Register(0x28, 8, True),
        "queue_device": Register(0x30, 8, True),
        "queue_notif_config_data": Register(0x38, 2, False),
        "queue_reset": Register(0x3A, 2, True),
        "admin_queue_index": Register(0x3C, 2, False),
        "admin_queue_num": Register(0x3E, 2, False),
    }
)
"""struct virtio_pci_common_cfg (4.1.4.3), in the order of the structure."""

COMMON_SIZE: Final = 0x40
NO_VECTOR: Final = 0xFFFF
MSIX_MAX_VECTORS: Final = 0x800
ISR_QUEUE: Final = 0x01
ISR_CONFIG: Final = 0x02

LEGACY: Final = MappingProxyType(
    {
        "device_features": Register(0x00, 4, False),
        "driver_features": Register(0x04, 4, True),
        "queue_address": Register(0x08, 4, True),
        "queue_size": Register(0x0C, 2, False),
        "queue_select": Register(0x0E, 2, True),
        "queue_notify": Register(0x10, 2, True),
        "device_status": Register(0x12, 1, True),
        "isr_status": Register(0x13, 1, False),
        "config_msix_vector": Register(0x14, 2, True),
        "queue_msix_vector": Register(0x16, 2, True),
    }
)
"""The legacy interface in the I/O BAR 0 (4.1.4.10); the two vectors are there while MSI-X is enabled."""

LEGACY_CONFIG: Final = 0x14
"""Where the device configuration begins without MSI-X."""

LEGACY_CONFIG_MSIX: Final = 0x18
LEGACY_QUEUE_ALIGN: Final = 4096
"""Bytes: the unit of `queue_address` and the alignment of the used ring (4.1.5.1.3.1)."""

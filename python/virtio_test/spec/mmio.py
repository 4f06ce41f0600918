"""Register layouts of virtio over MMIO (VIRTIO 1.4, 4.2.2 and 4.2.4): byte offsets, every register 32 bits wide."""

from types import MappingProxyType
from typing import Final, Literal, NamedTuple


class Register(NamedTuple):
    """Place of a register: byte offset, and the directions that the specification gives it."""

    offset: int
    access: Literal["R", "W", "RW"]


REGISTERS: Final = MappingProxyType(
    {
        "MagicValue": Register(0x000, "R"),
        "Version": Register(0x004, "R"),
        "DeviceID": Register(0x008, "R"),
        "VendorID": Register(0x00C, "R"),
        "DeviceFeatures": Register(0x010, "R"),
        "DeviceFeaturesSel": Register(0x014, "W"),
        "DriverFeatures": Register(0x020, "W"),
        "DriverFeaturesSel": Register(0x024, "W"),
        "QueueSel": Register(0x030, "W"),
        "QueueSizeMax": Register(0x034, "R"),
        "QueueSize": Register(0x038, "W"),
        "QueueReady": Register(0x044, "RW"),
        "QueueNotify": Register(0x050, "W"),
        "InterruptStatus": Register(0x060, "R"),
        "InterruptACK": Register(0x064, "W"),
        "Status": Register(0x070, "RW"),
        "QueueDescLow": Register(0x080, "W"),
        "QueueDescHigh": Register(0x084, "W"),
        "QueueDriverLow": Register(0x090, "W"),
        "QueueDriverHigh": Register(0x094, "W"),
        "QueueDeviceLow": Register(0x0A0, "W"),
        "QueueDeviceHigh": Register(0x0A4, "W"),
        "SHMSel": Register(0x0AC, "W"),
        "SHMLenLow": Register(0x0B0, "R"),
        "SHMLenHigh": Register(0x0B4, "R"),
        "SHMBaseLow": Register(0x0B8, "R"),
        "SHMBaseHigh": Register(0x0BC, "R"),
        "QueueReset": Register(0x0C0, "RW"),
        "ConfigGeneration": Register(0x0FC, "R"),
    }
)
"""Control registers in the order of the table; the configuration space follows at `CONFIG`."""

LEGACY_REGISTERS: Final = MappingProxyType(
    {
        "MagicValue": Register(0x000, "R"),
        "Version": Register(0x004, "R"),
        "DeviceID": Register(0x008, "R"),
        "VendorID": Register(0x00C, "R"),
        "HostFeatures": Register(0x010, "R"),
        "HostFeaturesSel": Register(0x014, "W"),
        "GuestFeatures": Register(0x020, "W"),
        "GuestFeaturesSel": Register(0x024, "W"),
        "GuestPageSize": Register(0x028, "W"),
        "QueueSel": Register(0x030, "W"),
        "QueueSizeMax": Register(0x034, "R"),
        "QueueSize": Register(0x038, "W"),
        "QueueAlign": Register(0x03C, "W"),
        "QueuePFN": Register(0x040, "RW"),
        "QueueNotify": Register(0x050, "W"),
        "InterruptStatus": Register(0x060, "R"),
        "InterruptACK": Register(0x064, "W"),
        "Status": Register(0x070, "RW"),
    }
)
"""Control registers of the legacy interface (4.2.4), in the order of its table; the same `CONFIG` follows."""

CONFIG: Final = 0x100
MAGIC: Final = 0x74726976
"""``virt`` in little endian."""

VERSION: Final = 2
VERSION_LEGACY: Final = 1
INTERRUPT_QUEUE: Final = 0x01
INTERRUPT_CONFIG: Final = 0x02
INTERRUPT_DEFINED: Final = INTERRUPT_QUEUE | INTERRUPT_CONFIG
"""Bits of InterruptStatus that mean something; a driver ignores the others and acknowledges none of them."""

NO_SHARED_MEMORY: Final = 0xFFFF_FFFF_FFFF_FFFF
"""Length and base of a shared memory region that does not exist."""

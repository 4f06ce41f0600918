"""Device ids (VIRTIO 1.4, chapter 5) and the PCI ids made from them (4.1.2).

The device that this project began with took id 45, which today's specification gives to the SPI controller,
and PCI device id 0x1013, which lies in the transitional range without being listed there. Both are therefore
*defaults* of the test device, never facts about the number.
"""

from enum import IntEnum
from types import MappingProxyType
from typing import Final


class DeviceId(IntEnum):
    """The virtio device ids of VIRTIO 1.4; 0 is reserved as invalid, 14, 15 and 37 are not given away."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    IOMEM = 6
    RPMSG = 7
    SCSI = 8
    P9 = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    RTC = 17
    INPUT = 18
    SOCKET = 19
    CRYPTO = 20
    SIGNAL_DISTRIBUTION = 21
    PSTORE = 22
    IOMMU = 23
    MEMORY = 24
    SOUND = 25
    FILE_SYSTEM = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SECURE_MODULE = 33
    I2C = 34
    WATCHDOG = 35
    CAN = 36
    PARAMETER_SERVER = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49


DEVICE_NAMES: Final = MappingProxyType({int(each): each.name.lower().replace("_", "-") for each in DeviceId})
"""Device id to a short name for people (``2`` to ``"block"``)."""

DEVICE_IDS: Final = MappingProxyType({name: number for number, name in DEVICE_NAMES.items()})
"""The way back: short name to device id."""

INVALID_DEVICE_ID: Final = 0
"""Reserved: "no device here" (4.2.2.2 tells a driver to ignore it in silence)."""

TEST_DEVICE_ID: Final = 45
"""Default id of the test device: the original's choice."""

PCI_VENDOR_ID: Final = 0x1AF4
PCI_TEST_DEVICE_ID: Final = 0x1013
"""Default PCI device id of the transitional test device: the original's choice."""

PCI_MODERN_DEVICE_ID_BASE: Final = 0x1040
"""A modern PCI device id is this plus the virtio device id (4.1.2.1)."""

PCI_MODERN_DEVICE_IDS: Final = range(0x1040, 0x1080)
PCI_TRANSITIONAL_DEVICE_IDS: Final = range(0x1000, 0x1040)

PCI_TRANSITIONAL_IDS: Final = MappingProxyType(
    {
        DeviceId.NET: 0x1000,
        DeviceId.BLOCK: 0x1001,
        DeviceId.BALLOON: 0x1002,
        DeviceId.CONSOLE: 0x1003,
        DeviceId.SCSI: 0x1004,
        DeviceId.ENTROPY: 0x1005,
        DeviceId.P9: 0x1009,
    }
)
"""The transitional PCI device ids that the specification lists (4.1.2.1)."""

PCI_MODERN_MIN_REVISION: Final = 1
PCI_MODERN_MIN_SUBSYSTEM_ID: Final = 0x40
PCI_TRANSITIONAL_REVISION: Final = 0

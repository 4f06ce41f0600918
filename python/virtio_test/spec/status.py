"""The device status bits (VIRTIO 1.4, 2.1)."""

from enum import IntFlag
from typing import Final


class Status(IntFlag):
    """One bit per completed step of the initialization, and three that say that something stopped."""

    ACKNOWLEDGE = 0x01
    DRIVER = 0x02
    DRIVER_OK = 0x04
    FEATURES_OK = 0x08
    SUSPEND = 0x10
    DEVICE_NEEDS_RESET = 0x40
    FAILED = 0x80


STATUS_DEFINED: Final = 0xDF
"""Every bit that has a meaning in 1.4."""

STATUS_UNDEFINED: Final = 0x20
"""The one bit of the register that has none."""

INIT_SEQUENCE: Final = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)
"""The bits in the order in which 3.1.1 has the driver set them, after the reset."""

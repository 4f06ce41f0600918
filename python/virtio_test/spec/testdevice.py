"""The interface of the test device: what driver and device agree on (`guest/module/virtio_test.h` says it in C)."""

from struct import Struct
from types import MappingProxyType
from typing import Final, Literal

FEATURE_NAMES: Final = MappingProxyType({"CAN_PRINT": 0})
"""Feature bits of the class. CAN_PRINT: the device answers requests."""

QUEUE_SIZE: Final = 128
"""Size of the one queue, number 0."""

CONFIG_FIELDS: Final[tuple[tuple[str, str] | tuple[str, str, Literal["ro", "rw"]], ...]] = (
    ("num_pages", "le32"),
    ("actual", "le32", "rw"),
    ("event", "le32", "rw"),
)
"""`num_pages` is the device's wish, `actual` the driver's answer to it, `event` the driver's own."""

REQUEST: Final = Struct("<4I32s")
"""type, arg1, arg2, arg3, and a text that ends at its first NUL."""

RESPONSE: Final = Struct("<3I")
"""ret, arg1, arg2."""

COUNTER: Final = Struct("<I")
"""The timer variant's answer to a configuration change."""

TEXT: Final = b"hello back end!"
"""The text of every request of the original."""

"""The console device (VIRTIO 1.4, 5.3): feature bits, configuration space, queues, control messages."""

from enum import IntEnum
from struct import Struct
from types import MappingProxyType
from typing import Final, Literal

FEATURE_NAMES: Final = MappingProxyType({"SIZE": 0, "MULTIPORT": 1, "EMERG_WRITE": 2})
"""Feature bits of the class (5.3.3). None of them requires another."""

CONFIG_FIELDS: Final[tuple[tuple[str, str] | tuple[str, str, Literal["ro", "rw"]], ...]] = (
    ("cols", "le16"),
    ("rows", "le16"),
    ("max_nr_ports", "le32"),
    ("emerg_wr", "le32", "rw"),
)
"""`struct virtio_console_config` (5.3.4): SIZE, SIZE, MULTIPORT and EMERG_WRITE say whether they are valid."""

RECEIVE_QUEUE: Final = 0
TRANSMIT_QUEUE: Final = 1
CONTROL_RECEIVE_QUEUE: Final = 2
CONTROL_TRANSMIT_QUEUE: Final = 3
"""The queues of port 0 and, with MULTIPORT, the control queues; port n > 0 has 2n + 2 and 2n + 3 (5.3.2)."""

MAX_PORTS: Final = 32766
"""Ports whose queues have a number that 16 bits can select."""


class ControlEvent(IntEnum):
    """What a control message says (5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


CONTROL: Final = Struct("<IHH")
"""id (the port), event, value; a RESIZE or PORT_NAME message has more behind it."""

RESIZE: Final = Struct("<HH")
"""cols, rows: what follows a RESIZE message."""

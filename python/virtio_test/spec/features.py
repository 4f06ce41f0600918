"""The device-independent feature bits (VIRTIO 1.4, chapter 6) and how the bit numbers are shared out (2.2).

The text of 2.2 gives 41 and 42 to the device type, while chapter 6 defines VIRTIO_F_ADMIN_VQ as bit 41. We
follow chapter 6: 41 is a transport feature.

`requires` names what must be accepted together with a feature (2.2.1). Chapter 6 states no such rule in words;
the one below follows from 4.1.4.10: without VERSION_1 a device is used through the legacy interface, which
reaches bits 0 to 31 only, so every bit above 32 presupposes VERSION_1.
"""

from types import MappingProxyType
from typing import Final, NamedTuple

FEATURE_BITS: Final = 128
"""Bits that 2.2 shares out; 128 and above are reserved."""

DEVICE_TYPE_RANGES: Final = (range(24), range(42, 43), range(50, 128))
"""Bits whose meaning depends on the device type."""

QUEUE_RANGES: Final = (range(24, 42), range(43, 44))
"""Bits for the queue and the negotiation; those without a row in `FEATURES` are not described by 1.4."""

RESERVED_RANGE: Final = range(44, 50)
"""Bits kept for later versions of the specification (so are 128 and above)."""


class Feature(NamedTuple):
    """One feature bit.

    Attributes:
        name: name without ``VIRTIO_F_``.
        bit: bit number.
        meaning: one line.
        clause: where VIRTIO 1.4 describes it.
        requires: names of the features that must be accepted with it.
        transports: transports that may offer it, empty when all may.
        legacy: only the legacy interface gives it a meaning (6.3); nobody negotiates it beside VERSION_1.
    """

    name: str
    bit: int
    meaning: str
    clause: str
    requires: tuple[str, ...] = ()
    transports: tuple[str, ...] = ()
    legacy: bool = False


_V1: Final = ("VERSION_1",)

FEATURES: Final = (
    Feature("NOTIFY_ON_EMPTY", 24, "legacy: notify when the ring runs empty, suppressed or not", "6.3", legacy=True),
    Feature("ANY_LAYOUT", 27, "legacy: the device takes any descriptor layout", "6.3", legacy=True),
    Feature("INDIRECT_DESC", 28, "a descriptor may refer to a table of descriptors", "2.7.5.3"),
    Feature("EVENT_IDX", 29, "notifications are suppressed by ring position", "2.7.7"),
    Feature("VERSION_1", 32, "complies with the specification, not with the legacy drafts", "6"),
    Feature("ACCESS_PLATFORM", 33, "the platform translates or limits the device's memory accesses", "6", _V1),
    Feature("RING_PACKED", 34, "virtqueues may be packed", "2.8", _V1),
    Feature("IN_ORDER", 35, "buffers are used in the order in which they were made available", "2.7.9", _V1),
    Feature("ORDER_PLATFORM", 36, "memory is ordered as the platform describes it", "6", _V1),
    Feature("SR_IOV", 37, "single root I/O virtualization", "6", _V1, ("pci",)),
    Feature("NOTIFICATION_DATA", 38, "driver notifications carry the ring position", "2.9", _V1),
    Feature("NOTIF_CONFIG_DATA", 39, "driver notifications carry a value of the device's choice", "2.9", _V1),
    Feature("RING_RESET", 40, "one virtqueue can be reset alone", "2.6.1", _V1),
    Feature("ADMIN_VQ", 41, "the device has administration virtqueues", "6", _V1, ("pci",)),
    Feature("SUSPEND", 43, "the driver can suspend the device", "3.4", _V1),
)

FEATURE_BY_NAME: Final = MappingProxyType({each.name: each for each in FEATURES})
FEATURE_BY_BIT: Final = MappingProxyType({each.bit: each for each in FEATURES})

"""The reference model: both virtqueue formats, both ends of each, written from VIRTIO 1.4 and from nothing else.

Theory
------
The model is slow, plain and legal. It keeps no cache and takes no short cut: a driver end writes descriptors as
the specification lists them, a device end walks them one by one and asserts every rule that it meets. It is the
judge of the Rust core, so it shares no code with it; this folder is also the only place in Python that computes
where a field of a ring lies (`virtio_test._core.RingLayout` is compared with it).

Both ends work on anything that has `read(address, length)` and `write(address, data)`: a `FlatMemory` of
bytearrays, or the core's `GuestMemory`.
"""

from tests.property.model.common import (
    Element,
    FlatMemory,
    Memory,
    Plan,
    Segment,
    gather,
    passed,
    scatter,
)
from tests.property.model.packed import PackedDevice, PackedDriver, PackedRing
from tests.property.model.split import SplitDevice, SplitDriver, SplitRing

__all__ = [
    "Element",
    "FlatMemory",
    "Memory",
    "PackedDevice",
    "PackedDriver",
    "PackedRing",
    "Plan",
    "Segment",
    "SplitDevice",
    "SplitDriver",
    "SplitRing",
    "gather",
    "passed",
    "scatter",
]

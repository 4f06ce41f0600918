"""The payloads of vfio-user messages: one class each, packed and parsed by its declared layout.

All numbers are in the byte order of the machine, without padding that is not declared. What may follow the fixed
fields is bytes to the end of the message (`Tailed`). `parse` raises `ValueError` for a length that cannot be; the
codec turns that into a `MessageError`.

Source: QEMU, docs/interop/vfio-user.rst, "Commands".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

from virtio_test.transport.vhost_user.payloads import Empty, Payload

__all__ = [
    "MAX_DATA",
    "MAX_WRITES",
    "DeviceInfo",
    "DmaAccess",
    "DmaData",
    "DmaMap",
    "DmaUnmap",
    "DmaWritten",
    "Empty",
    "Feature",
    "IrqInfo",
    "MigrationData",
    "Payload",
    "RegionAccess",
    "RegionData",
    "RegionInfo",
    "RegionIoFds",
    "SetIrqs",
    "Tailed",
    "Version",
    "WriteCount",
    "WriteMulti",
    "WriteOne",
]

MAX_DATA: Final = 1 << 20
"""Bytes of data in one message: the protocol's default of max_data_xfer_size, and what we name as ours."""
MAX_WRITES: Final = 1024
"""Writes in one REGION_WRITE_MULTI; QEMU sends 200 at most."""
_MAX_TEXT: Final = 16384
_MAX_VECTORS: Final = 2048


@dataclass(frozen=True)
class Tailed(Payload):
    """Fixed fields, then up to `MOST` bytes: the last field, which is called `data`."""

    MOST: ClassVar[int] = 0

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """Least and largest size in bytes."""
        return cls.fixed().size, cls.fixed().size + cls.MOST

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """See `Payload.parse`."""
        least, largest = cls.sizes()
        if not least <= len(data) <= largest:
            raise ValueError(f"{len(data)} bytes of payload where {least} to {largest} are expected")
        values: tuple[Any, ...] = (*cls.fixed().unpack_from(data), data[least:])
        return cls(*values)

    def pack(self) -> bytes:
        """The bytes of this payload."""
        values = [getattr(self, field.name) for field in fields(self)]
        return self.fixed().pack(*values[:-1]) + values[-1]

    @classmethod
    def describe(cls) -> str:
        """See `Payload.describe`."""
        return f"{super().describe()}, data 0 to {cls.MOST} bytes"


@dataclass(frozen=True)
class Version(Tailed):
    """A protocol version and, as JSON with a final NUL, capabilities."""

    CODES: ClassVar[str] = "HH"
    MOST: ClassVar[int] = _MAX_TEXT
    major: int
    minor: int
    data: bytes = b""


@dataclass(frozen=True)
class DmaMap(Payload):
    """A range of the client's memory; flags: bit 0 readable, bit 1 writeable."""

    CODES: ClassVar[str] = "IIQQQ"
    argsz: int
    flags: int
    offset: int
    address: int
    size: int


@dataclass(frozen=True)
class DmaUnmap(Tailed):
    """A range that is no longer the device's; flags: bit 0 get dirty bitmap (with its description), bit 1 all."""

    CODES: ClassVar[str] = "IIQQ"
    MOST: ClassVar[int] = 16
    argsz: int
    flags: int
    address: int
    size: int
    data: bytes = b""


@dataclass(frozen=True)
class DeviceInfo(Payload):
    """What the device is; flags: bit 0 can be reset, bit 1 is PCI. In a request only `argsz` counts."""

    CODES: ClassVar[str] = "IIII"
    SLACK: ClassVar[int] = 8  # the kernel's structure has grown by cap_offset
    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@dataclass(frozen=True)
class RegionInfo(Tailed):
    """One region; flags: bit 0 read, 1 write, 2 mmap, 3 capabilities, which follow."""

    CODES: ClassVar[str] = "IIIIQQ"
    MOST: ClassVar[int] = 4096
    argsz: int
    flags: int
    index: int
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class RegionIoFds(Tailed):
    """The fds for parts of a region, 40 bytes each."""

    CODES: ClassVar[str] = "IIII"
    MOST: ClassVar[int] = 4096
    argsz: int
    flags: int
    index: int
    count: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class IrqInfo(Payload):
    """One type of interrupt; flags: bit 0 eventfd, 1 maskable, 2 automasked, 3 not resizable."""

    CODES: ClassVar[str] = "IIII"
    argsz: int
    flags: int
    index: int
    count: int = 0


@dataclass(frozen=True)
class SetIrqs(Tailed):
    """What to do with interrupts `start` to `start + count`; flags: bits 0 to 2 the data, bits 3 to 5 the action."""

    CODES: ClassVar[str] = "IIIII"
    MOST: ClassVar[int] = 4 * _MAX_VECTORS
    argsz: int
    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""


@dataclass(frozen=True)
class RegionAccess(Payload):
    """`count` bytes at `offset` of a region."""

    CODES: ClassVar[str] = "QII"
    offset: int
    region: int
    count: int


@dataclass(frozen=True)
class RegionData(Tailed):
    """The same, and the bytes."""

    CODES: ClassVar[str] = "QII"
    MOST: ClassVar[int] = MAX_DATA
    offset: int
    region: int
    count: int
    data: bytes = b""


@dataclass(frozen=True)
class DmaAccess(Payload):
    """`count` bytes of the client's memory."""

    CODES: ClassVar[str] = "QQ"
    address: int
    count: int


@dataclass(frozen=True)
class DmaData(Tailed):
    """The same, and the bytes."""

    CODES: ClassVar[str] = "QQ"
    MOST: ClassVar[int] = MAX_DATA
    address: int
    count: int
    data: bytes = b""


@dataclass(frozen=True)
class DmaWritten(Payload):
    """What DMA_WRITE is answered with: the count has 4 bytes here, and some send it as 8."""

    CODES: ClassVar[str] = "QI"
    SLACK: ClassVar[int] = 4
    address: int
    count: int


@dataclass(frozen=True)
class WriteOne:
    """One write of a REGION_WRITE_MULTI: `count` bytes of the 8 in `data`."""

    offset: int
    region: int
    count: int
    data: bytes


@dataclass(frozen=True)
class WriteMulti(Payload):
    """Several writes of at most 8 bytes."""

    CODES: ClassVar[str] = "Q"
    ENTRY: ClassVar[struct.Struct] = struct.Struct("=QII8s")
    writes: tuple[WriteOne, ...] = ()

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """Least and largest size in bytes."""
        return 8, 8 + MAX_WRITES * cls.ENTRY.size

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """See `Payload.parse`."""
        if len(data) < 8:
            raise ValueError(f"{len(data)} bytes of payload where 8 or more are expected")
        (count,) = cls.fixed().unpack_from(data)
        if count > MAX_WRITES or len(data) != 8 + count * cls.ENTRY.size:
            raise ValueError(f"{len(data)} bytes of payload for {count} writes")
        return cls(tuple(WriteOne(*entry) for entry in cls.ENTRY.iter_unpack(data[8:])))

    def pack(self) -> bytes:
        """The bytes of this payload."""
        rows = [self.ENTRY.pack(one.offset, one.region, one.count, one.data) for one in self.writes]
        return self.fixed().pack(len(rows)) + b"".join(rows)

    @classmethod
    def describe(cls) -> str:
        """See `Payload.describe`."""
        return "wr_cnt u64, then for each write: offset u64, region u32, count u32, data 8 bytes"


@dataclass(frozen=True)
class WriteCount(Payload):
    """How many writes of a REGION_WRITE_MULTI were done."""

    CODES: ClassVar[str] = "Q"
    count: int


@dataclass(frozen=True)
class Feature(Tailed):
    """A device feature (bits 0 to 15 of the flags) to get, set or probe (bits 16 to 18)."""

    CODES: ClassVar[str] = "II"
    MOST: ClassVar[int] = 4096
    argsz: int
    flags: int
    data: bytes = b""


@dataclass(frozen=True)
class MigrationData(Tailed):
    """Bytes of a device's migration."""

    CODES: ClassVar[str] = "II"
    MOST: ClassVar[int] = MAX_DATA
    argsz: int
    size: int
    data: bytes = b""

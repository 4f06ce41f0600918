"""The payloads of vhost-user messages: one class each, packed and parsed by its declared layout.

Theory
------
All numbers are in the byte order of the machine, without padding that is not declared. A class declares the
`struct` codes of its fixed fields; what may follow them (regions, configuration bytes) is the business of the
three classes that have such a tail. `parse` takes exactly what `sizes` allows and raises `ValueError` for the
rest: the codec turns that into a `MessageError` that names the message.

Source: QEMU, docs/interop/vhost-user.rst, "Message Specification".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import ClassVar, Self

__all__ = [
    "MAX_TABLE_REGIONS",
    "U64",
    "Area",
    "Config",
    "CryptoSession",
    "DeviceState",
    "Empty",
    "Inflight",
    "Iotlb",
    "Log",
    "MemoryRegion",
    "MemoryTable",
    "Payload",
    "SharedMemoryConfig",
    "SharedMemoryMap",
    "SharedObject",
    "SingleRegion",
    "VringAddress",
    "VringState",
]

MAX_TABLE_REGIONS = 8
"""Regions that one memory table can hold; more need CONFIGURE_MEM_SLOTS."""


@dataclass(frozen=True)
class Payload:
    """A payload of fixed size: fields in the order of `CODES`; `SLACK` more bytes are padding that some peers send."""

    CODES: ClassVar[str] = ""
    SLACK: ClassVar[int] = 0

    @classmethod
    def fixed(cls) -> struct.Struct:
        """The layout of the declared fields."""
        return struct.Struct("=" + cls.CODES)

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """Least and largest size in bytes."""
        return cls.fixed().size, cls.fixed().size + cls.SLACK

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse `data`, whose length `sizes` allows.

        Raises:
            ValueError: the length does not fit; the text says what was expected.
        """
        least, largest = cls.sizes()
        if not least <= len(data) <= largest:
            expected = f"{least}" if least == largest else f"{least} to {largest}"
            raise ValueError(f"{len(data)} bytes of payload where {expected} are expected")
        return cls(*cls.fixed().unpack_from(data))

    def pack(self) -> bytes:
        """The bytes of this payload."""
        return self.fixed().pack(*(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def describe(cls) -> str:
        """Fields with their widths in bits, in order, for documentation."""
        codes = [code for code in cls.CODES if code.isalpha() and code != "x"]
        widths = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "q": "i64", "s": "bytes"}
        pairs = zip([field.name for field in fields(cls)], codes, strict=False)
        return ", ".join(f"{name} {widths[code]}" for name, code in pairs) or "nothing"


@dataclass(frozen=True)
class Empty(Payload):
    """No payload at all."""


@dataclass(frozen=True)
class U64(Payload):
    """One number; in the messages about kick, call and err fds: bits 0 to 7 the queue, bit 8 "no fd"."""

    CODES: ClassVar[str] = "Q"
    value: int


@dataclass(frozen=True)
class VringState(Payload):
    """A queue and a number: its size, its base, or whether it is enabled."""

    CODES: ClassVar[str] = "II"
    index: int
    num: int = 0


@dataclass(frozen=True)
class VringAddress(Payload):
    """Where the areas of a queue lie, as addresses in the front-end's own address space."""

    CODES: ClassVar[str] = "IIQQQQ"
    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0


@dataclass(frozen=True)
class MemoryRegion(Payload):
    """`size` bytes at guest address `guest` and front-end address `user`, from `offset` of the fd that comes along."""

    CODES: ClassVar[str] = "QQQQ"
    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True)
class SingleRegion(Payload):
    """One memory region, after 8 bytes of padding."""

    CODES: ClassVar[str] = "8xQQQQ"
    guest: int
    size: int
    user: int
    offset: int = 0

    @property
    def region(self) -> MemoryRegion:
        """The region itself."""
        return MemoryRegion(self.guest, self.size, self.user, self.offset)


@dataclass(frozen=True)
class MemoryTable(Payload):
    """The whole memory table. Peers may send room for more regions than they count (UML always sends two)."""

    CODES: ClassVar[str] = "I4x"
    regions: tuple[MemoryRegion, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """From an empty table to one with every region."""
        return 8, 8 + MAX_TABLE_REGIONS * 32

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the count and as many regions. Raises `ValueError` when they do not fit the length."""
        least, largest = cls.sizes()
        if not least <= len(data) <= largest or (len(data) - 8) % 32:
            raise ValueError(f"{len(data)} bytes of payload where 8 and 32 for each region are expected")
        (count,) = cls.fixed().unpack_from(data)
        if count > (len(data) - 8) // 32:
            raise ValueError(f"{count} regions are counted, and there are {len(data)} bytes of payload")
        return cls(tuple(MemoryRegion.parse(data[8 + 32 * at : 40 + 32 * at]) for at in range(count)))

    def pack(self) -> bytes:
        """The count and the regions that are there."""
        return self.fixed().pack(len(self.regions)) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def describe(cls) -> str:
        """Fields, in order."""
        return f"count u32, padding u32, up to {MAX_TABLE_REGIONS} x ({MemoryRegion.describe()})"


@dataclass(frozen=True)
class Log(Payload):
    """Size and offset of the dirty log in the fd that comes along."""

    CODES: ClassVar[str] = "QQ"
    size: int
    offset: int


@dataclass(frozen=True)
class Iotlb(Payload):
    """One entry of the IOTLB: type 1 miss, 2 update, 3 invalidate, 4 access failure."""

    CODES: ClassVar[str] = "QQQBB6x"
    iova: int
    size: int
    user: int
    permissions: int
    type: int


@dataclass(frozen=True)
class Config(Payload):
    """`size` bytes of configuration space from `offset`; a payload of nothing at all is an error reply."""

    CODES: ClassVar[str] = "III"
    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """From the bare header to the largest message."""
        return 12, 4096

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the header and as many bytes as it says. Raises `ValueError` when they are not there."""
        least, largest = cls.sizes()
        if not least <= len(data) <= largest:
            raise ValueError(f"{len(data)} bytes of payload where {least} to {largest} are expected")
        offset, size, flags = cls.fixed().unpack_from(data)
        if len(data) != least + size:
            raise ValueError(f"{size} bytes of configuration are announced, and {len(data) - least} came")
        return cls(offset, size, flags, data[least:])

    def pack(self) -> bytes:
        """The header and the bytes."""
        return self.fixed().pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def describe(cls) -> str:
        """Fields, in order."""
        return "offset u32, size u32, flags u32, data (size bytes)"


@dataclass(frozen=True)
class CryptoSession(Payload):
    """What a crypto back-end needs for a session; its inside is of no concern to the transport."""

    data: bytes

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """Anything that fits in a message."""
        return 0, 4096

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Take the bytes as they are. Raises `ValueError` when they are too many."""
        if len(data) > cls.sizes()[1]:
            raise ValueError(f"{len(data)} bytes of payload where at most {cls.sizes()[1]} are expected")
        return cls(data)

    def pack(self) -> bytes:
        """The bytes as they are."""
        return self.data

    @classmethod
    def describe(cls) -> str:
        """Fields, in order."""
        return "bytes"


@dataclass(frozen=True)
class Area(Payload):
    """A queue's host notifier: index and flags, size, and offset in the fd that comes along."""

    CODES: ClassVar[str] = "QQQ"
    value: int
    size: int
    offset: int


@dataclass(frozen=True)
class Inflight(Payload):
    """The shared buffer that records what is in flight.

    Peers send the padding of their C structure behind it, and libvhost-user and DPDK take nothing shorter.
    """

    CODES: ClassVar[str] = "QQHH"
    SLACK: ClassVar[int] = 4
    size: int
    offset: int
    queues: int
    queue_size: int

    def pack(self) -> bytes:
        """The fields and the padding."""
        return super().pack() + bytes(self.SLACK)


@dataclass(frozen=True)
class SharedObject(Payload):
    """The UUID of a shared object: 16 bytes."""

    CODES: ClassVar[str] = "16s"
    uuid: bytes


@dataclass(frozen=True)
class DeviceState(Payload):
    """Transfer of the device state: direction 0 save, 1 load; phase 0 stopped."""

    CODES: ClassVar[str] = "II"
    direction: int
    phase: int


@dataclass(frozen=True)
class SharedMemoryMap(Payload):
    """Map or unmap a part of a shared memory region."""

    CODES: ClassVar[str] = "B7xQQQQ"
    shmid: int
    fd_offset: int
    region_offset: int
    length: int
    flags: int


@dataclass(frozen=True)
class SharedMemoryConfig(Payload):
    """The sizes of the shared memory regions, by their id."""

    CODES: ClassVar[str] = "I4x"
    memory_sizes: tuple[int, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        """A count and 256 sizes."""
        return 8 + 256 * 8, 8 + 256 * 8

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse all 256 sizes. Raises `ValueError` when the length does not fit."""
        if len(data) != cls.sizes()[0]:
            raise ValueError(f"{len(data)} bytes of payload where {cls.sizes()[0]} are expected")
        return cls(struct.unpack_from("=256Q", data, 8))

    def pack(self) -> bytes:
        """The number of sizes that are not 0, and all 256 of them."""
        padded = self.memory_sizes + (0,) * (256 - len(self.memory_sizes))
        return self.fixed().pack(sum(1 for size in padded if size)) + struct.pack("=256Q", *padded)

    @classmethod
    def describe(cls) -> str:
        """Fields, in order."""
        return "count u32, padding u32, 256 x size u64"

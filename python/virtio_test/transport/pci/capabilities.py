"""PCI capabilities as data: what a function declares, byte for byte.

Theory
------
A capability is an id, a pointer to the next one, and a body. Each class below knows its body and which of its bits
software may write; `configspace` chains them. Nothing is checked here: a capability that lies is a declaration
like any other. `capability.replace(length=2)` is the usual way to make one.

Sources: VIRTIO 1.4, 4.1.4; PCI Local Bus 3.0, 6.7 and 6.8; PCI Power Management 1.2, 3.2; PCI Express Base 3.0, 7.8.
Registers that a function of our kind may hardwire are hardwired.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from virtio_test.spec.pci import CAP64_SIZE, CAP_NOTIFY_SIZE, CAP_PCI_CFG_SIZE, CAP_SIZE, CAP_VENDOR, CapType

__all__ = [
    "AF_CONTROL",
    "EXPRESS_DEVICE_CONTROL",
    "MSIX_CONTROL",
    "POWER_CONTROL",
    "AdvancedFeatures",
    "Capability",
    "Express",
    "ExtendedCapability",
    "Msix",
    "Notify",
    "PciCfg",
    "Power",
    "Raw",
    "SharedMemory",
    "VendorData",
    "Virtio",
]

_Self = TypeVar("_Self", bound="Capability")

MSIX_CONTROL: Final = 2
"""Offset of message control in the MSI-X capability."""
POWER_CONTROL: Final = 4
"""Offset of PMCSR in the power management capability."""
EXPRESS_DEVICE_CONTROL: Final = 8
"""Offset of device control in the PCI Express capability."""
AF_CONTROL: Final = 4
"""Offset of the control byte in the advanced features capability."""

_HEADER: Final = 2


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What all capabilities have.

    Attributes:
        at: offset in configuration space; the next free multiple of 4 when None.
        next: the pointer to the next capability; the true one when None.
    """

    at: int | None = None
    next: int | None = None

    def replace(self: _Self, **changes: Any) -> _Self:
        """The same capability with other values."""
        return replace(self, **changes)

    @property
    def cap_id(self) -> int:
        """The capability id."""
        return 0

    def body(self) -> bytes:
        """What follows the id and the pointer."""
        return b""

    def writable(self) -> bytes:
        """A mask over `body`: bits that software may write. Shorter is zeroes."""
        return b""

    def cleared(self) -> bytes:
        """A mask over `body`: bits that software clears by writing 1."""
        return b""


@dataclass(frozen=True)
class Raw(Capability):
    """Any capability, as bytes.

    Attributes:
        id: the capability id.
        data: the body.
        mask: bits of it that can be written.
    """

    id: int
    data: bytes = b""
    mask: bytes = b""

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return self.id

    def body(self) -> bytes:
        """See `Capability.body`."""
        return self.data

    def writable(self) -> bytes:
        """See `Capability.writable`."""
        return self.mask


@dataclass(frozen=True)
class Virtio(Capability):
    """``struct virtio_pci_cap`` (4.1.4).

    Attributes:
        cfg_type: which structure it is.
        bar: where it is.
        offset: bytes from the start of the BAR.
        length: bytes.
        id: tells several of one type apart.
        cap_len: bytes of the capability; what it really has when None.
        extra: bytes behind the structure.
    """

    cfg_type: int
    bar: int = 0
    offset: int = 0
    length: int = 0
    id: int = 0
    cap_len: int | None = None
    extra: bytes = b""

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return CAP_VENDOR

    def tail(self) -> bytes:
        """The fields of the type's own."""
        return b""

    def body(self) -> bytes:
        """See `Capability.body`."""
        tail = self.tail() + self.extra
        size = CAP_SIZE + len(tail) if self.cap_len is None else self.cap_len
        low = (self.offset & 0xFFFF_FFFF, self.length & 0xFFFF_FFFF)
        return struct.pack("<BBBBxxII", size, self.cfg_type, self.bar, self.id, *low) + tail


@dataclass(frozen=True)
class Notify(Virtio):
    """``struct virtio_pci_notify_cap`` (4.1.4.4).

    Attributes:
        multiplier: `notify_off_multiplier`.
    """

    cfg_type: int = int(CapType.NOTIFY_CFG)
    multiplier: int = 4

    def tail(self) -> bytes:
        """See `Virtio.tail`."""
        return struct.pack("<I", self.multiplier)


@dataclass(frozen=True)
class PciCfg(Virtio):
    """``struct virtio_pci_cfg_cap`` (4.1.4.9): `bar`, `offset`, `length` and the data are writable."""

    cfg_type: int = int(CapType.PCI_CFG)

    def tail(self) -> bytes:
        """See `Virtio.tail`."""
        return bytes(CAP_PCI_CFG_SIZE - CAP_SIZE)

    def writable(self) -> bytes:
        """See `Capability.writable`."""
        return b"\0\0\xff\0\0\0" + b"\xff" * 12


@dataclass(frozen=True)
class SharedMemory(Virtio):
    """``struct virtio_pci_cap64`` of a shared memory region (4.1.4.7); offset and length have 64 bits."""

    cfg_type: int = int(CapType.SHARED_MEMORY_CFG)

    def tail(self) -> bytes:
        """See `Virtio.tail`."""
        return struct.pack("<II", self.offset >> 32 & 0xFFFF_FFFF, self.length >> 32 & 0xFFFF_FFFF)


@dataclass(frozen=True)
class VendorData(Capability):
    """``struct virtio_pci_vndr_data`` (4.1.4.8), padded to a multiple of 4 bytes.

    Attributes:
        vendor_id: whose format it is; not 0x1af4.
        data: what that vendor defines.
        cap_len: bytes of the capability; what it really has when None.
    """

    vendor_id: int
    data: bytes = b""
    cap_len: int | None = None

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return CAP_VENDOR

    def body(self) -> bytes:
        """See `Capability.body`."""
        size = (6 + len(self.data) + 3) & ~3
        data = self.data.ljust(size - 6, b"\0")
        shown = size if self.cap_len is None else self.cap_len
        return struct.pack("<BBH", shown, CapType.VENDOR_CFG, self.vendor_id) + data


@dataclass(frozen=True)
class Msix(Capability):
    """MSI-X (PCI 3.0, 6.8.2).

    Attributes:
        vectors: entries of the table, 1 to 2048.
        table_bar: BAR of the table.
        table: its offset, a multiple of 8.
        pba_bar: BAR of the pending bits.
        pba: their offset, a multiple of 8.
    """

    vectors: int
    table_bar: int = 1
    table: int = 0
    pba_bar: int = 1
    pba: int = 0x800

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return 0x11

    def body(self) -> bytes:
        """See `Capability.body`."""
        where = (self.table & ~7 | self.table_bar & 7, self.pba & ~7 | self.pba_bar & 7)
        return struct.pack("<HII", self.vectors - 1 & 0x7FF, *where)

    def writable(self) -> bytes:
        """See `Capability.writable`: enable and function mask."""
        return b"\0\xc0"


@dataclass(frozen=True)
class Power(Capability):
    """Power management: D0 and D3hot, no PME (PCI PM 1.2).

    Attributes:
        no_soft_reset: whether the function keeps its state over D3hot; else it is reset on the way to D0.
    """

    no_soft_reset: bool = True

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return 0x01

    def body(self) -> bytes:
        """See `Capability.body`."""
        return struct.pack("<HHBB", 0x0003, 0x0008 if self.no_soft_reset else 0, 0, 0)

    def writable(self) -> bytes:
        """See `Capability.writable`: the power state."""
        return b"\0\0\x03"


@dataclass(frozen=True)
class AdvancedFeatures(Capability):
    """Advanced features of a conventional function: a reset of the function (PCI ECN "Advanced Capabilities")."""

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return 0x13

    def body(self) -> bytes:
        """See `Capability.body`: transactions pending, and FLR."""
        return struct.pack("<BBBB", 6, 0x03, 0, 0)

    def writable(self) -> bytes:
        """See `Capability.writable`: the function acts on the bit and shows 0."""
        return b"\0\0\x01"


@dataclass(frozen=True)
class Express(Capability):
    """PCI Express, version 2: 128-byte payloads, 2.5 GT/s, one lane, no power management of the link.

    Attributes:
        port_type: 0 endpoint, 1 legacy endpoint, 9 endpoint integrated into the root complex, which has no link.
        flr: whether the function can be reset alone.
    """

    port_type: int = 0
    flr: bool = True

    @property
    def cap_id(self) -> int:
        """See `Capability.cap_id`."""
        return 0x10

    @property
    def _link(self) -> bool:
        return self.port_type != 9

    def body(self) -> bytes:
        """See `Capability.body`."""
        device = 0x8000 | (0x1000_0000 if self.flr else 0)
        link = (0x0040_0011, 0, 0x0011) if self._link else (0, 0, 0)
        first = struct.pack("<HIHHIHH", 0x0002 | self.port_type << 4, device, 0x2810, 0, *link)
        second = struct.pack("<IHH", 0x0000_0010, 0, 0)
        return first + bytes(16) + second + struct.pack("<IHH", 0x2 if self._link else 0, 0, 0) + bytes(8)

    def writable(self) -> bytes:
        """See `Capability.writable`: error reporting, relaxed ordering, no snoop, read size, FLR; ASPM, RCB, clock."""
        link = b"\xcb\0" if self._link else b"\0\0"
        start = b"\0" * 6 + (b"\x1f\xf8" if self.flr else b"\x1f\x78") + b"\0" * 6 + link
        return start + b"\0" * (0x26 - len(start)) + b"\x10\0"

    def cleared(self) -> bytes:
        """See `Capability.cleared`: the errors in device status."""
        return b"\0" * 8 + b"\x0f"


@dataclass(frozen=True)
class ExtendedCapability:
    """One capability of the extended configuration space, from 0x100 on (PCI Express 3.0, 7.9.3).

    Attributes:
        id: 16 bits.
        version: 4 bits.
        data: what follows the header.
        at: offset; the next free multiple of 4 when None, the first of all at 0x100.
        next: offset of the next one; the true one when None.
    """

    id: int
    version: int = 1
    data: bytes = b""
    at: int | None = None
    next: int | None = None


assert CAP_NOTIFY_SIZE == CAP_SIZE + 4
assert CAP64_SIZE == CAP_SIZE + 8

"""The configuration space of one PCI function: bytes, and for each bit what a write does to it.

Theory
------
All of PCI's register rules come down to two masks beside the bytes: bits that take what is written, and bits that
a written 1 clears; every other bit stays. BARs are no exception: the bits below a BAR's size are not writable, so
all ones read back as its size. What has an effect beyond the bytes (reset, power, MSI-X, the window of 4.1.4.9) the
function looks for after a write; nothing here acts.

`power_on` restores the bytes of the declaration. The raw patches of a declaration come last, over everything.
Sources: PCI Local Bus 3.0, 6.1 to 6.7; PCI Express Base 3.0, 7.5 and 7.9.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

from virtio_test.errors import InvalidArgument

from .capabilities import Capability
from .declaration import Declaration
from .interface import Bar

__all__ = ["ConfigBytes"]

_COMMAND: Final = 0x04
_STATUS: Final = 0x06
_BARS: Final = 0x10
_CAPABILITIES: Final = 0x34
_FIRST_CAPABILITY: Final = 0x40
_FIRST_EXTENDED: Final = 0x100
_STATUS_CLEARED: Final = 0xF900
_INTERRUPT_STATUS: Final = 0x08

IO: Final = 0x1
MEMORY: Final = 0x2
MASTER: Final = 0x4
INTX_DISABLE: Final = 0x400
_COMMAND_WRITABLE: Final = MASTER | INTX_DISABLE | 0x140


class ConfigBytes:
    """The configuration space that a declaration describes.

    Raises:
        InvalidArgument: BARs that overlap or have an impossible size, more capabilities than there is room for, or
            a patch outside of the space.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.size = 4096 if declaration.extended_space else 256
        self._first = bytearray(self.size)
        self._writable = bytearray(self.size)
        self._cleared = bytearray(self.size)
        self.bars = {bar.index: bar for bar in declaration.bars}
        self.capabilities: dict[str, int] = {}
        """Name → offset."""
        self._header(declaration)
        for bar in declaration.bars:
            self._bar(bar, declaration)
        self._chain(declaration)
        self._extend(declaration)
        for offset, data in declaration.patches.items():
            self._room(offset, len(data), "a patch")
            self._first[offset : offset + len(data)] = data
        self.data = bytearray(self._first)

    def power_on(self) -> None:
        """Everything as declared."""
        self.data[:] = self._first

    # --- accesses -------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Bytes as they are; what lies outside of the space reads as ones."""
        data = bytes(self.data[offset : offset + length])
        return data + b"\xff" * (length - len(data))

    def write(self, offset: int, data: bytes) -> None:
        """A write of software; what lies outside of the space is ignored."""
        for at, value in enumerate(data[: max(0, self.size - offset)], offset):
            take = self._writable[at]
            self.data[at] = self.data[at] & ~take & ~(value & self._cleared[at]) | value & take

    def impossible(self, data: bytes) -> int | None:
        """The first offset at which `data` has what software could not have written over what was declared."""
        for at, (value, first) in enumerate(zip(data, self._first, strict=True)):
            own = _INTERRUPT_STATUS if at == _STATUS else 0
            if (value ^ first) & ~(self._writable[at] | own):
                return at
        return None

    def word(self, offset: int) -> int:
        """16 bits at `offset`."""
        return int.from_bytes(self.data[offset : offset + 2], "little")

    def clear(self, offset: int, bits: int) -> None:
        """Bits of one byte that software sets and the function clears."""
        self.data[offset] &= ~bits & 0xFF

    @property
    def command(self) -> int:
        """The command register."""
        return self.word(_COMMAND)

    def set_interrupt_status(self, *, pending: bool) -> None:
        """The interrupt status bit of the status register."""
        kept = self.data[_STATUS] & ~_INTERRUPT_STATUS
        self.data[_STATUS] = kept | (_INTERRUPT_STATUS if pending else 0)

    def base(self, bar: Bar) -> int:
        """The bus address that software has programmed into a BAR."""
        at = _BARS + 4 * bar.index
        wide = bar.kind == "memory64"
        value = int.from_bytes(self.data[at : at + (8 if wide else 4)], "little")
        return value & ~(0x3 if bar.kind == "io" else 0xF)

    def dword(self, offset: int) -> int:
        """32 bits at `offset`."""
        return int.from_bytes(self.data[offset : offset + 4], "little")

    # --- how it is made -------------------------------------------------------------------------------------

    def _header(self, declaration: Declaration) -> None:
        ids = declaration.ids
        command = _COMMAND_WRITABLE
        for bar in declaration.bars:
            command |= IO if bar.kind == "io" else MEMORY
        self._put(0x00, struct.pack("<HH", ids.vendor, ids.device))
        self._put(_COMMAND, b"\0\0", struct.pack("<H", command))
        self._put(0x08, struct.pack("<I", ids.class_code << 8 & 0xFFFF_FFFF | ids.revision))
        # Cache line size, and the latency timer, which PCI Express has at 0.
        self._put(0x0C, b"\0\0", b"\xff\0" if declaration.extended_space else b"\xff\xff")
        self._put(0x2C, struct.pack("<HH", ids.subsystem_vendor, ids.subsystem))
        self._put(0x3C, bytes((0, declaration.pin)), b"\xff")
        self._cleared[_STATUS : _STATUS + 2] = struct.pack("<H", _STATUS_CLEARED)

    def _bar(self, bar: Bar, declaration: Declaration) -> None:
        wide = bar.kind == "memory64"
        smallest = 4 if bar.kind == "io" else 16
        largest = 1 << 63 if wide else 256 if bar.kind == "io" else 1 << 31
        if not smallest <= bar.size <= largest or bar.size & (bar.size - 1):
            raise InvalidArgument(
                f"BAR {bar.index} has {bar.size} bytes: a power of two from {smallest} on is possible"
            )
        taken = {each.index + 1 for each in declaration.bars if each.kind == "memory64"}
        same = [each for each in declaration.bars if each.index == bar.index]
        if not 0 <= bar.index + wide <= 5 or bar.index < 0 or bar.index in taken or len(same) > 1:
            raise InvalidArgument(f"BAR {bar.index} ({bar.kind}) does not fit: there are six, and some are taken")
        kind = 0x1 if bar.kind == "io" else (0x4 if wide else 0) | (0x8 if bar.prefetchable else 0)
        width = 8 if wide else 4
        mask = -bar.size & ((1 << 8 * width) - 1)
        self._put(_BARS + 4 * bar.index, kind.to_bytes(width, "little"), mask.to_bytes(width, "little"))

    def _chain(self, declaration: Declaration) -> None:
        placed: list[tuple[int, Capability]] = []
        chosen = [each for each in declaration.capabilities.values() if each.at is not None]
        taken = [(each.at or 0, 2 + len(each.body())) for each in chosen]
        free = _FIRST_CAPABILITY
        for name, capability in declaration.capabilities.items():
            body = capability.body()
            if capability.at is None:
                at = _gap(free, 2 + len(body), taken)
                free = at + 2 + len(body) + 3 & ~3
            else:
                at = capability.at
            # The pointers of the list have 8 bits.
            self._room(at, 2 + len(body), f"the capability {name}", limit=_FIRST_EXTENDED)
            self._put(at, bytes((capability.cap_id & 0xFF, 0)) + body)
            self._writable[at + 2 : at + 2 + len(capability.writable())] = capability.writable()
            self._cleared[at + 2 : at + 2 + len(capability.cleared())] = capability.cleared()
            placed.append((at, capability))
            self.capabilities[name] = at
        for (at, capability), (after, _) in pairwise([*placed, (0, Capability())]):
            self._first[at + 1] = (after if capability.next is None else capability.next) & 0xFF
        if placed:
            self._first[_CAPABILITIES] = placed[0][0] & 0xFF
            self._first[_STATUS] |= 0x10

    def _extend(self, declaration: Declaration) -> None:
        placed: list[int] = []
        free = _FIRST_EXTENDED
        for each in declaration.extended:
            at = free if each.at is None else each.at
            self._room(at, 4 + len(each.data), f"the extended capability {each.id:#x}")
            self._put(at + 4, each.data)
            free = max(free, at + 4 + len(each.data) + 3 & ~3)
            placed.append(at)
        for each, (at, after) in zip(declaration.extended, pairwise([*placed, 0]), strict=True):
            pointer = after if each.next is None else each.next
            header = each.id & 0xFFFF | (each.version & 0xF) << 16 | (pointer & 0xFFF) << 20
            self._put(at, header.to_bytes(4, "little"))

    def _put(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        self._first[offset : offset + len(data)] = data
        self._writable[offset : offset + len(writable)] = writable

    def _room(self, offset: int, length: int, what: str, *, limit: int | None = None) -> None:
        room = self.size if limit is None else limit
        if offset < 0 or offset + length > room:
            raise InvalidArgument(f"{what} at {offset:#x} with {length} bytes does not fit into {room}")


def _gap(free: int, size: int, taken: list[tuple[int, int]]) -> int:
    """The first multiple of 4 from `free` on with `size` bytes that nobody has taken."""
    for start, length in sorted(taken):
        if free < start + length and start < free + size:
            free = start + length + 3 & ~3
    return free

"""`MsixTable`: the vectors of a function, programmed with the messages that the bus knows again.

The capability's words are the device's, so the table is used only where it lies in a memory BAR that is large enough
for it, and an entry only once it reads back as it was written.
"""

from __future__ import annotations

from typing import Final

from virtio_test.errors import StateError, StatusViolation
from virtio_test.spec import pcibus

from .capabilities import MsixCapability
from .probe import PciFunction

__all__ = ["MsixTable", "judge_msix"]

_CLAUSE: Final = "4.1.5.1.2.1"


def judge_msix(function: PciFunction, capability: MsixCapability) -> StatusViolation | None:
    """What is wrong with where table and pending bits are said to lie; None when they can be used."""
    pba_bytes = (capability.size + 63) // 64 * 8
    for what, index, offset, length in (
        ("table", capability.table_bar, capability.table_offset, capability.size * pcibus.MSIX_ENTRY_SIZE),
        ("pending bits", capability.pba_bar, capability.pba_offset, pba_bytes),
    ):
        bar = function.bars.get(index)
        if bar is None or bar.io or offset + length > bar.size:
            there = "is not there" if bar is None else f"has {bar.size:#x} bytes of {'I/O' if bar.io else 'memory'}"
            text = f"the MSI-X {what}: {length} bytes at {offset:#x} of BAR {index}, which {there}"
            return StatusViolation("BadMsixTable", _CLAUSE, text)
    return None


class MsixTable:
    """The MSI-X table of a function whose BARs are decoded.

    Args:
        function: the function.
        capability: a capability in which `judge_msix` finds nothing.

    Attributes:
        size: vectors that can be used: those of the table that the bus has a message for.
    """

    def __init__(self, function: PciFunction, capability: MsixCapability) -> None:
        self._function = function
        self._capability = capability
        self._programmed: set[int] = set()
        self.size = capability.size

    def __repr__(self) -> str:
        return f"<MsixTable of {self.size} vectors, programmed {sorted(self._programmed)}>"

    def switch(self, *, on: bool) -> None:
        """Messages instead of the line, or the line."""
        offset = self._capability.position + pcibus.MSIX_CONTROL
        access = self._function.access
        kept = access.read_config(offset, 2) & ~(pcibus.MSIX_ENABLE | pcibus.MSIX_MASK_ALL) & 0xFFFF
        access.write_config(offset, 2, kept | (pcibus.MSIX_ENABLE if on else 0))

    def program(self, vector: int) -> bool:
        """Give a vector its message, once; False, when the bus has none for it.

        Raises:
            StatusViolation: `MsixTableNotWritable` (4.1.5.1.2.1): the entry does not read back.
        """
        if vector in self._programmed:
            return True
        if not 0 <= vector < self.size:
            return False
        try:
            address, data = self._function.access.message(vector)
        except StateError:
            self.size = vector
            return False
        place = self._capability.table_offset + vector * pcibus.MSIX_ENTRY_SIZE
        # Masked until it is whole: a message of half an entry would go anywhere.
        words = (address & 0xFFFF_FFFF, address >> 32, data)
        self._write(place + 12, pcibus.MSIX_ENTRY_MASKED)
        for number, word in enumerate(words):
            self._write(place + 4 * number, word)
        self._write(place + 12, 0)
        back = tuple(
            self._function.access.read_bar(self._capability.table_bar, place + 4 * number, 4) for number in range(4)
        )
        if back[:3] != words or back[3] & pcibus.MSIX_ENTRY_MASKED:
            text = f"entry {vector} of the MSI-X table reads {[hex(each) for each in back]} after it was written"
            raise StatusViolation("MsixTableNotWritable", _CLAUSE, text)
        self._programmed.add(vector)
        return True

    def _write(self, offset: int, word: int) -> None:
        self._function.access.write_bar(self._capability.table_bar, offset, 4, word)

"""`PciFunction`: one PCI function before anybody knows whether it is a usable virtio device.

Theory
------
Everything here was written by the device, so nothing is believed: identification is compared with the
specification's ranges, a BAR counts only when its size bits are those of a BAR, and an address counts only once it
reads back. Decoding is off while BARs are sized, as PCI asks, and comes on in `enable` when those in use have
addresses. BARs that nobody uses are left alone: one that no bus has room for harms nobody.

What is wrong and can be lived with is kept in `Findings`; with ``strict`` it raises as everything else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtio_test.driver.access import PciAccess
from virtio_test.errors import StateError, StatusViolation
from virtio_test.spec import ids, pcibus

__all__ = ["BarInfo", "Findings", "PciFunction"]

_ALL: Final = 0xFFFF_FFFF
_TABLE_IDS: Final = {pci: int(virtio) for virtio, pci in ids.PCI_TRANSITIONAL_IDS.items()}


class Findings(list[StatusViolation]):
    """What a device does against the rules and a driver can live with, oldest first.

    Args:
        strict: raise at the first one instead.
    """

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    def note(self, violation: StatusViolation) -> None:
        """Keep `violation`, or raise it."""
        if self.strict:
            raise violation
        self.append(violation)


@dataclass(frozen=True, slots=True)
class BarInfo:
    """One base address register as it was sized.

    Attributes:
        index: 0 to 5.
        size: bytes, a power of two.
        io: I/O space, not memory.
        wide: 64 bits of address; it takes the next register as well.
    """

    index: int
    size: int
    io: bool = False
    wide: bool = False


class PciFunction:
    """A function with the ids of virtio: who it is, its BARs, its command register.

    Args:
        access: the bus.
        findings: takes what can be lived with.

    Attributes:
        virtio_id: the virtio device id.
        bars: the BARs that are there, by index.

    Raises:
        StateError: there is no function.
        StatusViolation: `NotVirtio` (4.1.2.2), `BadHeader` (4.1.1).
    """

    def __init__(self, access: PciAccess, findings: Findings) -> None:
        self.access = access
        self.findings = findings
        self.vendor_id = self.read("vendor_id")
        if self.vendor_id == 0xFFFF:
            raise StateError("no PCI function answers here")
        self.device_id = self.read("device_id")
        if self.vendor_id != ids.PCI_VENDOR_ID or not 0x1000 <= self.device_id < 0x1080:
            text = f"{self.vendor_id:04x}:{self.device_id:04x} is no virtio device; those are 1af4:1000 to 1af4:107f"
            raise StatusViolation("NotVirtio", "4.1.2.2", text)
        header = self.read("header_type") & 0x7F
        if header:
            raise StatusViolation("BadHeader", "4.1.1", f"header type {header}, an endpoint has type 0")
        self.revision = self.read("revision_id")
        self.has_pin = 1 <= self.read("interrupt_pin") <= 4
        self.virtio_id = self._identify()
        self._decode(0)
        self.bars = self._size_bars()
        self._addresses: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<PciFunction {self.vendor_id:04x}:{self.device_id:04x}, virtio device {self.virtio_id}>"

    @property
    def transitional(self) -> bool:
        """Whether its ids are those of a transitional (or legacy) device (4.1.2.3)."""
        return self.device_id in ids.PCI_TRANSITIONAL_DEVICE_IDS

    def read(self, name: str) -> int:
        """A field of the header."""
        offset, size = pcibus.HEADER[name]
        return self.access.read_config(offset, size)

    def _identify(self) -> int:
        if not self.transitional:
            return self.device_id - ids.PCI_MODERN_DEVICE_ID_BASE
        told = self.read("subsystem_id")
        listed = _TABLE_IDS.get(self.device_id)
        if listed is not None and told != listed:
            text = f"PCI device id {self.device_id:#x} is virtio device {listed}, the subsystem id says {told}"
            self.findings.note(StatusViolation("SubsystemMismatch", "4.1.2.3", text))
        return told if listed is None else listed

    # --- BARs -----------------------------------------------------------------------------------------------

    def _size_bars(self) -> dict[int, BarInfo]:
        found: dict[int, BarInfo] = {}
        index = 0
        while index < pcibus.BAR_COUNT:
            low = self._size_register(index)
            wide = not low & pcibus.BAR_IO and low & pcibus.BAR_TYPE == pcibus.BAR_TYPE_64
            high = self._size_register(index + 1) if wide and index + 1 < pcibus.BAR_COUNT else 0
            if low:
                problem = None if wide and index + 1 == pcibus.BAR_COUNT else _bar_of(index, low, high)
                if problem is None:
                    text = f"BAR {index} sizes to {low:#010x}, {high:#010x}, which is no BAR"
                    self.findings.note(StatusViolation("BadBar", "4.1.1", text))
                else:
                    found[index] = problem
            index += 2 if wide else 1
        return found

    def _size_register(self, index: int) -> int:
        offset = pcibus.BAR0 + 4 * index
        before = self.access.read_config(offset, 4)
        self.access.write_config(offset, 4, _ALL)
        sized = self.access.read_config(offset, 4)
        self.access.write_config(offset, 4, before)
        return sized & _ALL

    def place(self, index: int) -> BarInfo:
        """Give a BAR an address, once.

        Raises:
            StatusViolation: `BarNotWritable` (4.1.1): the address does not read back.
            StateError: the bus has no room, or there is no such BAR.
        """
        bar = self.bars.get(index)
        if bar is None:
            raise StateError(f"the function has no BAR {index}; it has {sorted(self.bars)}")
        if index not in self._addresses:
            address = self.access.place_bar(index, bar.size, io=bar.io)
            for part in range(2 if bar.wide else 1):
                offset = pcibus.BAR0 + 4 * (index + part)
                word = address >> 32 * part & _ALL
                self.access.write_config(offset, 4, word)
                flags = 0 if part else 0x3 if bar.io else 0xF
                if (back := self.access.read_config(offset, 4)) & ~flags != word:
                    text = f"BAR {index} was placed at {address:#x} and its register {offset:#x} shows {back:#x}"
                    raise StatusViolation("BarNotWritable", "4.1.1", text)
            self._addresses[index] = address
        return bar

    # --- the command register -------------------------------------------------------------------------------

    def enable(self, *, line: bool) -> None:
        """Decode the BARs that were placed, let the function reach memory, and its interrupt line be used or not."""
        bits = pcibus.COMMAND_MASTER | (0 if line else pcibus.COMMAND_INTX_DISABLE)
        for index in self._addresses:
            bits |= pcibus.COMMAND_IO if self.bars[index].io else pcibus.COMMAND_MEMORY
        self._decode(bits)

    def _decode(self, bits: int) -> None:
        offset, size = pcibus.HEADER["command"]
        ours = pcibus.COMMAND_IO | pcibus.COMMAND_MEMORY | pcibus.COMMAND_MASTER | pcibus.COMMAND_INTX_DISABLE
        self.access.write_config(offset, size, self.access.read_config(offset, size) & 0xFFFF & ~ours | bits)


def _bar_of(index: int, low: int, high: int) -> BarInfo | None:
    """The BAR whose registers read `low` and `high` after all ones were written; None when no BAR reads so."""
    io = bool(low & pcibus.BAR_IO)
    kind = low & pcibus.BAR_TYPE
    if io:
        bits = low & ~0x3
        if not bits >> 16:
            # A PC has 16 bits of I/O addresses, and a BAR need not have more.
            bits |= 0xFFFF_0000
        width = 32
    elif kind == pcibus.BAR_TYPE_64:
        bits, width = low & ~0xF | high << 32, 64
    elif kind == pcibus.BAR_TYPE_32:
        bits, width = low & ~0xF, 32
    else:
        return None
    # The lowest bits are no address, so that no size is below 4 or 16 bytes.
    size = bits & -bits
    if bits != (1 << width) - size:
        return None
    return BarInfo(index, size, io, width == 64)

"""`QtestPci`: a PCI function of a QEMU machine, reached as a PC's processor does (`PciAccess`).

The first 256 bytes of configuration space go through the ports 0xcf8 and 0xcfc; beyond them there is nothing
on this way. BARs lie where no RAM is: from 0xc0000000 in memory, from 0xc000 in I/O space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.loop import OwnerLoop
from virtio_test.spec import pcibus

from .protocol import Qtest

if TYPE_CHECKING:
    from .machine import QtestMachine

__all__ = ["PciBus", "QtestPci"]

_ADDRESS_PORT: Final = 0xCF8
_DATA_PORT: Final = 0xCFC
_ENABLE: Final = 1 << 31
_MEMORY: Final = range(0xC000_0000, 0xFE00_0000)
_PORTS: Final = range(0xC000, 0x1_0000)
_PIIX3: Final = 1 << 3
_PIIX3_ROUTES: Final = 0x60
_PIIX3_INPUTS: Final = (10, 11, 10, 11)
_WORD: Final = 0xFFFF_FFFF


class PciBus:
    """The root bus of a PC: its configuration mechanism, its address space, and where its lines lead.

    Args:
        qtest: the machine's test protocol.
        machine: ``q35`` or ``pc``; the latter leads its lines nowhere until told.
    """

    def __init__(self, qtest: Qtest, machine: str) -> None:
        self.qtest = qtest
        self._next = {False: _MEMORY.start, True: _PORTS.start}
        if machine == "pc":
            for pirq, number in enumerate(_PIIX3_INPUTS):
                self.write_config(_PIIX3, _PIIX3_ROUTES + pirq, 1, number)

    def read_config(self, devfn: int, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of a function's configuration space."""
        self.qtest.write_port(_ADDRESS_PORT, 4, _ENABLE | devfn << 8 | offset & 0xFC)
        return self.qtest.read_port(_DATA_PORT + (offset & 3), size)

    def write_config(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of it."""
        self.qtest.write_port(_ADDRESS_PORT, 4, _ENABLE | devfn << 8 | offset & 0xFC)
        self.qtest.write_port(_DATA_PORT + (offset & 3), size, value)

    def allocate(self, size: int, *, io: bool) -> int:
        """An address for a BAR, a multiple of its size.

        Raises:
            StateError: no room.
        """
        room = _PORTS if io else _MEMORY
        # Not less than a page of memory each: what shares one is told apart more slowly.
        step = size if io else max(size, 4096)
        address = (self._next[io] + step - 1) & -step
        if address + step > room.stop:
            raise StateError(f"the machine has no room for a BAR of {size:#x} bytes of {'I/O' if io else 'memory'}")
        self._next[io] = address + step
        return address


class QtestPci:
    """One function; `QtestMachine.pci` makes it.

    Args:
        machine: the machine.
        bus: its root bus.
        slot: device number, 0 to 31.
        function: function number, 0 to 7.

    Raises:
        InvalidArgument: a number out of range.
    """

    def __init__(self, machine: QtestMachine, bus: PciBus, slot: int, function: int) -> None:
        if not 0 <= slot < 32 or not 0 <= function < 8:
            raise InvalidArgument(f"slot {slot} function {function}: a bus has slots 0 to 31 with functions 0 to 7")
        self._machine = machine
        self._bus = bus
        self._devfn = slot << 3 | function
        self._places: dict[int, tuple[int, int, bool]] = {}
        self._vectors: dict[int, int] = {}
        self._on_message: Callable[[int], object] | None = None

    def __repr__(self) -> str:
        return f"<QtestPci {self._devfn >> 3:02x}.{self._devfn & 7}, BARs {sorted(self._places)}>"

    @property
    def loop(self) -> OwnerLoop:
        """See `PciAccess.loop`."""
        return self._machine.loop

    @property
    def memory(self) -> GuestMemory:
        """See `PciAccess.memory`."""
        return self._machine.memory

    def read_config(self, offset: int, size: int) -> int:
        """See `PciAccess.read_config`; all ones from 256 on."""
        if offset >= pcibus.CONFIG_SIZE:
            return (1 << 8 * size) - 1
        return self._bus.read_config(self._devfn, offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_config`; without effect from 256 on."""
        if offset < pcibus.CONFIG_SIZE:
            self._bus.write_config(self._devfn, offset, size, value)

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        """See `PciAccess.place_bar`; the same place again for the same BAR."""
        known = self._places.get(bar)
        if known is None or known[1:] != (size, io):
            known = (self._bus.allocate(size, io=io), size, io)
            self._places[bar] = known
        return known[0]

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """See `PciAccess.read_bar`."""
        address, io = self._place(bar, offset, size)
        if not io:
            return self._bus.qtest.read_memory(address, size)
        if size < 8:
            return self._bus.qtest.read_port(address, size)
        return self._bus.qtest.read_port(address, 4) | self._bus.qtest.read_port(address + 4, 4) << 32

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_bar`."""
        address, io = self._place(bar, offset, size)
        if not io:
            self._bus.qtest.write_memory(address, size, value)
        elif size < 8:
            self._bus.qtest.write_port(address, size, value)
        else:
            self._bus.qtest.write_port(address, 4, value & _WORD)
            self._bus.qtest.write_port(address + 4, 4, value >> 32)

    def _place(self, bar: int, offset: int, size: int) -> tuple[int, bool]:
        place = self._places.get(bar)
        if place is None:
            raise StateError(f"BAR {bar} has no address; placed are {sorted(self._places)}")
        address, length, io = place
        if offset < 0 or offset + size > length:
            raise InvalidArgument(f"{size} bytes at {offset:#x} of BAR {bar}, which has {length:#x} bytes")
        return address + offset, io

    def message(self, vector: int) -> tuple[int, int]:
        """See `PciAccess.message`: a word of RAM, and 1."""
        if vector not in self._vectors:
            self._vectors[vector] = self._machine.take_word(lambda: self._arrived(vector))
        return self._vectors[vector], 1

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        """See `PciAccess.listen`."""
        self._on_message = message
        self._machine.watch_line(self, self._asserts, line)

    def close(self) -> None:
        """Nobody listens any more, and its messages go nowhere; reset the device before."""
        self._on_message = None
        self._machine.leave_line(self)
        for address in self._vectors.values():
            self._machine.drop_word(address)
        self._vectors.clear()

    def _arrived(self, vector: int) -> None:
        if self._on_message is not None:
            self._on_message(vector)

    def _asserts(self) -> bool:
        """Whether it is this function that holds the line: several share one."""
        offset, size = pcibus.HEADER["status"]
        return bool(self.read_config(offset, size) & pcibus.STATUS_INTERRUPT)

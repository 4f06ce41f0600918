"""`PciLoopback`: a PCI bus with one function on it, in this process.

Theory
------
What a processor does to a PCI function goes through addresses: a BAR answers where software has put it, and nowhere
else. So an access "to BAR 4" is one to the bus address that `place_bar` gave, and it arrives if BAR 4 is really
programmed to that address (or at whatever other BAR is). An address that nobody claims reads as ones.

Messages and the line are turns of the owner loop. The line is a level: its handler is called again as long as it
stays asserted, up to `STORM` turns in a row. After that the line is switched off until it was released once, as
an operating system does with an interrupt that nobody cares for: a loop that turns for ever helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pci import MSIX_MAX_VECTORS
from virtio_test.transport.pci.interface import PciEndpoint

__all__ = ["STORM", "PciLoopback"]

STORM: Final = 1000
"""Turns in a row that an interrupt line may stay asserted for."""

_CONFIG_SIZE: Final = 4096
_BARS: Final = 0x10
_WINDOWS: Final = {"memory": (0xC000_0000, 0xFEC0_0000), "io": (0x1000, 0x1_0000), "high": (1 << 36, 1 << 48)}
_MESSAGE: Final = 0xFEE0_0000


class PciLoopback:
    """The bus, as `driver.access.PciAccess`.

    Args:
        endpoint: the function.

    Attributes:
        endpoint: the function.
        strays: messages whose address and data nobody has given out.
        storms: how often the line was switched off.
    """

    def __init__(self, endpoint: PciEndpoint) -> None:
        self.endpoint = endpoint
        self.strays = 0
        self.storms = 0
        self._free = {name: low for name, (low, _) in _WINDOWS.items()}
        self._placed: dict[int, tuple[int, int, bool]] = {}
        self._message: Callable[[int], object] = lambda _: None
        self._line: Callable[[], object] | None = None
        self._asserted = False
        self._turns = 0
        endpoint.connect(_Sink(sent=self._sent, level=self._level))

    def __repr__(self) -> str:
        return f"PciLoopback({self.endpoint!r})"

    @property
    def loop(self) -> OwnerLoop:
        """See `PciAccess.loop`."""
        return self.endpoint.loop

    @property
    def memory(self) -> GuestMemory:
        """See `PciAccess.memory`."""
        return self.endpoint.memory

    # --- accesses -------------------------------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """See `PciAccess.read_config`.

        Raises:
            InvalidArgument: no access that a processor can make.
        """
        _check_config(offset, size)
        if offset >= self.endpoint.config_size:
            return (1 << 8 * size) - 1
        return int.from_bytes(self.endpoint.read_config(offset, size), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_config`.

        Raises:
            InvalidArgument: no access that a processor can make, or a value that does not fit into it.
        """
        _check_config(offset, size)
        data = _bytes(value, size)
        if offset < self.endpoint.config_size:
            self.endpoint.write_config(offset, data)

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        """See `PciAccess.place_bar`; memory lies below 4 GiB as long as there is room.

        Raises:
            InvalidArgument: a size that is no power of two, or no such BAR.
            StateError: the bus has no room.
        """
        if not 0 <= bar <= 5 or size < 4 or size & (size - 1):
            raise InvalidArgument(f"BAR {bar} of {size} bytes: BARs 0 to 5 are there, with powers of two from 4 on")
        if bar in self._placed and self._placed[bar][1:] == (size, io):
            return self._placed[bar][0]
        for name in ("io",) if io else ("memory", "high"):
            address = (self._free[name] + size - 1) & -size
            if address + size <= _WINDOWS[name][1]:
                self._free[name] = address + size
                self._placed[bar] = (address, size, io)
                return address
        raise StateError(f"no room for BAR {bar} with {size} bytes of {'I/O' if io else 'memory'} space")

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """See `PciAccess.read_bar`.

        Raises:
            StateError: the BAR was not placed.
            InvalidArgument: no access that a processor can make.
        """
        found = self._decode(bar, offset, size)
        return (1 << 8 * size) - 1 if found is None else int.from_bytes(self.endpoint.read_bar(*found, size), "little")

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_bar`.

        Raises:
            StateError: the BAR was not placed.
            InvalidArgument: no access that a processor can make, or a value that does not fit into it.
        """
        data = _bytes(value, size)
        found = self._decode(bar, offset, size)
        if found is not None:
            self.endpoint.write_bar(*found, data)

    def _decode(self, bar: int, offset: int, size: int) -> tuple[int, int] | None:
        """BAR and offset that the bus address of an access really leads to."""
        placed = self._placed.get(bar)
        if placed is None:
            raise StateError(f"BAR {bar} was not placed: place_bar() gives it an address")
        if size not in (1, 2, 4, 8) or not 0 <= offset <= placed[1] - size:
            raise InvalidArgument(f"an access of {size} bytes at {offset:#x} of a BAR with {placed[1]}")
        address = placed[0] + offset
        for each in self.endpoint.bars:
            base = self._base(each.index, wide=each.kind == "memory64", io=each.kind == "io")
            if (each.kind == "io") == placed[2] and base <= address and address + size <= base + each.size:
                return each.index, address - base
        return None

    def _base(self, bar: int, *, wide: bool, io: bool) -> int:
        data = self.endpoint.read_config(_BARS + 4 * bar, 8 if wide else 4)
        return int.from_bytes(data, "little") & ~(0x3 if io else 0xF)

    # --- interrupts -----------------------------------------------------------------------------------------

    def message(self, vector: int) -> tuple[int, int]:
        """See `PciAccess.message`.

        Raises:
            StateError: there is no message for that vector.
        """
        if not 0 <= vector < MSIX_MAX_VECTORS:
            raise StateError(f"no message for vector {vector}: there are {MSIX_MAX_VECTORS}")
        return _MESSAGE, vector

    def _sent(self, address: int, data: int) -> None:
        if address == _MESSAGE and data < MSIX_MAX_VECTORS:
            self.loop.pend((self, "message", data), lambda: self._message(data))
        else:
            self.strays += 1

    def _level(self, *, asserted: bool) -> None:
        self._asserted = asserted
        if asserted:
            self.loop.pend((self, "line"), self._line_turn)
        else:
            self._turns = 0

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        """See `PciAccess.listen`."""
        self._message = message
        self._line = line
        self._turns = 0
        if self._asserted:
            self.loop.pend((self, "line"), self._line_turn)

    def _line_turn(self) -> bool:
        if not self._asserted or self._line is None:
            return False
        if self._turns >= STORM:
            self.storms += 1
            return False
        self._turns += 1
        self._line()
        return self._asserted


class _Sink:
    """The bus as the function sees it; apart, because a bus too has a `message`, which means something else."""

    def __init__(self, *, sent: Callable[[int, int], object], level: Callable[..., object]) -> None:
        self._sent = sent
        self._level = level

    def message(self, vector: int, address: int, data: int) -> None:  # noqa: ARG002 - the bus goes by the address
        """See `InterruptSink.message`."""
        self._sent(address, data)

    def line(self, asserted: bool) -> None:  # noqa: FBT001 - `InterruptSink.line` has it so
        """See `InterruptSink.line`."""
        self._level(asserted=asserted)


def _check_config(offset: int, size: int) -> None:
    if size not in (1, 2, 4) or offset % size or not 0 <= offset < _CONFIG_SIZE:
        raise InvalidArgument(f"configuration access of {size} bytes at {offset:#x}: 1, 2 or 4, aligned, below 4096")


def _bytes(value: int, size: int) -> bytes:
    if size not in (1, 2, 4, 8) or not 0 <= value < 1 << 8 * size:
        raise InvalidArgument(f"{value:#x} does not fit into an access of {size} bytes")
    return value.to_bytes(size, "little")

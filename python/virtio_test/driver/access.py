"""How a driver reaches a device's registers: one PCI function, or one page of memory-mapped registers.

Theory
------
Between a driver of a register transport and the device lies a bus: a function call, a socket, QEMU's qtest. A
*carrier* implements one of these two protocols, and `driver.pci` and `driver.mmio` run over it. The bus only
carries: it knows no virtio. All values are little-endian numbers, as the processor of a PCI machine sees them.

Nothing that comes from the device side is trusted here or above: a read gives whatever the device answers (all
ones, where nobody does).

Interrupts come as calls in the owner loop, as turns of their own, never from inside one of the methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from virtio_test._core import GuestMemory
from virtio_test.loop import OwnerLoop

__all__ = ["MmioAccess", "PciAccess"]


@runtime_checkable
class PciAccess(Protocol):
    """One PCI function, as the processor behind its bus reaches it."""

    @property
    def loop(self) -> OwnerLoop:
        """The loop that interrupts arrive in."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory, which the function reaches as a bus master."""
        ...

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of the configuration space (0 to 4095) at a multiple of their size."""
        ...

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of the configuration space."""
        ...

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        """Choose a bus address for a BAR of `size` bytes, aligned to it, and remember it.

        The driver layer has sized the BAR and writes the address into the BAR's register.

        Raises:
            StateError: the bus has no room for it.
        """
        ...

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes at `offset` of a BAR that was placed."""
        ...

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes at `offset` of a BAR that was placed."""
        ...

    def message(self, vector: int) -> tuple[int, int]:
        """(address, data) that the driver programs into the MSI-X table for `vector`, so that the bus knows it again.

        Raises:
            StateError: the bus has no message for that vector.
        """
        ...

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        """From now on: `message(vector)` per MSI-X message, `line()` while the interrupt line is asserted.

        `line` is called again, in later turns, for as long as the line stays asserted.
        """
        ...


@runtime_checkable
class MmioAccess(Protocol):
    """One page of memory-mapped registers and its interrupt line."""

    @property
    def loop(self) -> OwnerLoop:
        """The loop that interrupts arrive in."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory, which the device reaches."""
        ...

    def read(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes at `offset` of the page."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes at `offset` of the page."""
        ...

    def listen(self, *, line: Callable[[], object]) -> None:
        """From now on: `line()` while the interrupt line is asserted, again in later turns while it stays so."""
        ...

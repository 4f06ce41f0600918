"""`PciEndpoint` and `InterruptSink`: the two protocols between a PCI function and whatever carries it.

Theory
------
A carrier (vfio-user, UML's PCI, a function call) moves configuration and BAR accesses to the function, in the
owner loop, and takes its interrupts. It knows nothing about virtio, and the function knows nothing about sockets.

An access that the function does not define never raises: the function decides what it gives (all ones, or 0)
and whether it was a broken rule, which it notes in its own `violations`. Only *our own* mistakes raise
(`InvalidArgument`: a BAR that is not there, a negative offset), so a carrier checks the range that the other
side asked for against `bars` and `config_size` before it calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from virtio_test._core import GuestMemory
from virtio_test.loop import OwnerLoop

__all__ = ["Bar", "InterruptSink", "PciEndpoint"]


@dataclass(frozen=True, order=True, slots=True)
class Bar:
    """One base address register.

    Attributes:
        index: 0 to 5; a 64-bit BAR takes the next one as well.
        size: bytes, a power of two; at least 16 for memory, 4 for I/O.
        kind: address space and width.
        prefetchable: the attribute bit of a memory BAR.
    """

    index: int
    size: int
    kind: Literal["memory32", "memory64", "io"] = "memory32"
    prefetchable: bool = False


@runtime_checkable
class InterruptSink(Protocol):
    """Where a function's interrupts go."""

    def message(self, vector: int, address: int, data: int) -> None:
        """An MSI-X message of an enabled and unmasked vector: the table's address and data go with it."""
        ...

    def line(self, asserted: bool) -> None:  # noqa: FBT001 - a level has no better name
        """The level of INTA# has changed."""
        ...


@runtime_checkable
class PciEndpoint(Protocol):
    """One PCI function, as its bus sees it. All calls are made in the owner loop."""

    @property
    def loop(self) -> OwnerLoop:
        """The owner loop of the device behind it."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """The guest memory that the device reaches; a carrier adds and removes its regions."""
        ...

    @property
    def bars(self) -> Sequence[Bar]:
        """The base address registers that are there."""
        ...

    @property
    def config_size(self) -> int:
        """Bytes of configuration space: 256, or 4096 with PCI Express."""
        ...

    @property
    def vectors(self) -> int:
        """Entries of the MSI-X table; 0 without MSI-X."""
        ...

    @property
    def has_line(self) -> bool:
        """Whether the function has an interrupt pin."""
        ...

    @property
    def external_table(self) -> bool:
        """Whether the other side keeps the MSI-X table and masks (vfio): every vector then counts as unmasked.

        The function then still follows the enable bit and serves its table as memory.
        """
        ...

    @external_table.setter
    def external_table(self, external: bool) -> None: ...

    def connect(self, sink: InterruptSink | None) -> None:
        """Interrupts go to `sink` from now on; nowhere when None."""
        ...

    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes of configuration space; any length and alignment inside it."""
        ...

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to configuration space: writable bits change, the others stay."""
        ...

    def read_bar(self, bar: int, offset: int, length: int) -> bytes:
        """One read of `length` bytes in one access."""
        ...

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """One write in one access."""
        ...

    def is_notification(self, bar: int, offset: int, length: int) -> bool:
        """Whether a write there only marks a queue, so that it may be made at any moment, even from inside a queue."""
        ...

    def hold(self) -> None:
        """The memory table is about to change: queues are not worked on until `release`. Nests not."""
        ...

    def release(self) -> None:
        """The memory table is whole again: queues that were kicked meanwhile are worked on."""
        ...

    def reset(self) -> None:
        """A reset of the whole function (bus reset, FLR): configuration space, table and device as at power-on."""
        ...

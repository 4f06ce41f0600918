"""What happens to a ring, as data: each act is a small tuple that a case holds and that JSON carries by its name.

Those of the first group change memory and nothing else, so they may stand before the end in question is built; the
others are calls of one of the two ends. Fields are those of `RingLayout`. A field that begins with ``table.`` is one
of the indirect tables, which are seen as one long descriptor table that begins where the case puts them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "Act",
    "Add",
    "Buffer",
    "Copy",
    "Fill",
    "Look",
    "Map",
    "Pop",
    "Publish",
    "Push",
    "Put",
    "Race",
    "Span",
    "Take",
]
__all__ += ["ACTS", "Change", "Unmap", "Use", "Write"]

Span = tuple[int, int]
"""(guest address, length in bytes)."""


class Buffer(NamedTuple):
    """One legal buffer: its device-readable and its device-writable parts, in order, each with one descriptor.

    `indirect` puts the descriptors into an indirect table. `data` stands in the readable parts.
    """

    readable: tuple[Span, ...] = ()
    writable: tuple[Span, ...] = ()
    indirect: bool = False
    data: bytes = b""

    @property
    def segments(self) -> tuple[tuple[int, int, bool], ...]:
        """(address, length, device-writable), as `Chain.segments` has them."""
        if len(self.readable) + len(self.writable) == 1:
            # Most are so, and a case asks for those of all its buffers.
            ((at, n),) = self.readable or self.writable
            return ((at, n, not self.readable),)
        return tuple([(at, n, False) for at, n in self.readable] + [(at, n, True) for at, n in self.writable])


class Put(NamedTuple):
    """Write `value` to one field, where there are several to number `place`."""

    field: str
    value: int
    place: int = 0


class Fill(NamedTuple):
    """Write `value`, `value + step`, and so on, to the first `number` places of a field."""

    field: str
    value: int
    step: int
    number: int


class Write(NamedTuple):
    """Write bytes to guest memory."""

    address: int
    data: bytes


class Copy(NamedTuple):
    """Copy bytes inside guest memory."""

    destination: int
    source: int
    length: int


class Map(NamedTuple):
    """Add a region of zeros."""

    address: int
    size: int
    writable: bool = True


class Unmap(NamedTuple):
    """Take exactly that region away."""

    address: int
    size: int


class Race(NamedTuple):
    """Write `value` to a field just before access `number` (from now on) of queues and chains to memory."""

    number: int
    field: str
    value: int
    place: int = 0


class Look(NamedTuple):
    """The end looks whether there is something for it (`has_work`, `has_used`)."""


class Pop(NamedTuple):
    """The device end takes up to `limit` chains."""

    limit: int = 1


class Push(NamedTuple):
    """The device end completes the popped chain `which` (from 0 on) with `written` bytes."""

    which: int
    written: int = 0


class Add(NamedTuple):
    """The driver end adds a buffer; not shown to the device before the next `Publish`."""

    buffer: Buffer


class Publish(NamedTuple):
    """The driver end shows what was added."""


class Take(NamedTuple):
    """The driver end takes up to `limit` used buffers."""

    limit: int = 32768


class Use(NamedTuple):
    """A device that does what is right takes all there is and completes buffer `which` (from 0 on)."""

    which: int
    written: int = 0


Change = Put | Fill | Write | Copy | Map | Unmap
Act = Change | Race | Look | Pop | Push | Add | Publish | Take | Use

ACTS: Final[dict[str, type[Act]]] = {
    kind.__name__.lower(): kind
    for kind in (Put, Fill, Write, Copy, Map, Unmap, Race, Look, Pop, Push, Add, Publish, Take, Use)
}
"""Name in JSON to act."""

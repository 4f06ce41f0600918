"""A legal ring in the making, with one chain of it in view: where its descriptors lie, and how to spoil them.

A `DriverQueue` gives out descriptors and ids in order as long as nothing comes back, so the place of each is known
before the ring is made. The tests hold this to what really happens: each case names the segments of every chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from .acts import Act, Buffer, Change, Put
from .case import AVAIL, DATA, RAM, TABLES, USED, OpenCase, Outcome, RingCase, Segments, closed
from .draw import Draw

__all__ = ["INDIRECT", "NEXT", "WRITE", "Draft", "direct", "single"]

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
INDIRECT_DESC: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
IN_ORDER: Final = 1 << 35

READ_A: Final = DATA
READ_B: Final = DATA + 0x800
TAKES: Final = DATA + 0x1000
OTHERS: Final = DATA + 0x2000
"""Where the parts of the chain in view lie, and those of all others."""
ENTRIES: Final = 16
_BYTES: Final = bytes(range(128))
_NEIGHBOURS: Final = ((0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (2, 0), (2, 0), (1, 1), (2, 1))
"""Chains before the one in view, and behind it."""


def direct(draw: Draw, *, indirect: bool = False) -> Buffer:
    """Two device-readable parts and a device-writable one."""
    first, second = draw.vary(1, 64, 16), draw.vary(1, 64, 8)
    readable = ((READ_A, first), (READ_B, second))
    return Buffer(readable, ((TAKES, draw.vary(1, 256, 32)),), indirect, _BYTES[: first + second])


def single(draw: Draw) -> Buffer:
    """One device-writable part."""
    return Buffer((), ((TAKES, draw.vary(1, 256, 32)),))


class Draft:
    """A queue, buffers before and behind the one in view, and what is changed so far.

    Args:
        draw: where the scene comes from: size, start, features and neighbours.
        buffer: the one in view; None for a ring with nothing in it.
        packed: the format.
        size: descriptors; drawn when None.
        start: drawn when None.
        features: without RING_PACKED; INDIRECT_DESC, and what is drawn, when None.
        alone: without neighbours, so that the whole ring is its own.
    """

    def __init__(
        self,
        draw: Draw,
        buffer: Buffer | Sequence[Buffer] | None,
        *,
        packed: bool,
        size: int | None = None,
        start: int | None = None,
        features: int | None = None,
        alone: bool = False,
    ) -> None:
        self.packed = packed
        self.size = size or draw.some((8, 8, 9, 13, 63) if packed else (8, 8, 16, 64))
        self.start = self._any_start(draw) if start is None else start
        self.features = INDIRECT_DESC | draw.some((0, EVENT_IDX, IN_ORDER)) if features is None else features
        view = (buffer,) if isinstance(buffer, Buffer) else tuple(buffer or ())
        before, behind = (0, 0) if alone or not view else draw.some(_NEIGHBOURS)
        self.buffers = view
        if before or behind:
            others = [self._other(draw, number) for number in range(before + behind)]
            self.buffers = (*others[:before], *view, *others[before:])
        self.before, self.count = before, len(view)
        self.view: Buffer = view[0] if view else Buffer()
        self.writes: list[Change] = []
        self.later: list[Act] = []
        self.more: dict[str, Any] = {}
        self._instead: dict[int, Segments] = {}
        """Number of a chain to what must be handed out of it instead of its buffer."""

    def _any_start(self, draw: Draw) -> int:
        if not self.packed:
            return draw.some((0, 0, 1, 0x7FFF, 0x8000, 0xFFF8, 0xFFFE, 0xFFFF))
        return draw.some((0, self.size - 1, self.size // 2)) | draw.some((1, 1, 0)) << 15

    @staticmethod
    def _other(draw: Draw, number: int) -> Buffer:
        span = (OTHERS + 0x100 * number, draw.vary(1, 128, 16))
        return Buffer((), (span,)) if draw.some((True, False)) else Buffer((span,))

    # ---------------------------------------------------------------------------------------------------------- places

    @property
    def head(self) -> int:
        """Descriptors before the chain in view; a split ring's head index."""
        return self.before

    def place(self, index: int) -> int:
        """Where descriptor `index` of the chain in view lies in the ring."""
        if not self.packed:
            return self.before + index
        return ((self.start & 0x7FFF) + self.before + index) % self.size

    def slot(self, number: int = 0) -> int:
        """Entry of the avail ring that shows chain `number`, counted from the one in view."""
        return (self.start + self.before + number) % self.size

    def entry(self, index: int) -> int:
        """Where entry `index` of the table of the chain in view lies in the long table."""
        return self.head * ENTRIES + index

    @property
    def table_at(self) -> int:
        """Address of the table of the chain in view."""
        return TABLES + 16 * ENTRIES * self.head

    def lap(self, index: int) -> int:
        """AVAIL or USED: how descriptor `index` of the chain in view is shown as available (packed)."""
        slot = (self.start & 0x7FFF) + self.before + index
        wrap = (self.start >> 15) ^ (slot // self.size & 1)
        return AVAIL if wrap else USED

    def flags(self, index: int) -> int:
        """The flags that the driver gave to descriptor `index` of the chain in view."""
        shown = self.lap(index) if self.packed else 0
        if self.view.indirect:
            return shown | INDIRECT
        segments = self.view.segments
        return shown | NEXT * (index + 1 < len(segments)) | WRITE * (index < len(segments) and segments[index][2])

    # --------------------------------------------------------------------------------------------------------- changes

    def put(self, field: str, value: int, index: int = 0) -> None:
        """Any field of the ring."""
        self.writes.append(Put(field, value, index))

    def desc(self, index: int, **fields: int) -> None:
        """Fields of descriptor `index` of the chain in view: addr, len, flags, next, id."""
        for name, value in fields.items():
            self.put(f"desc.{name}", value, self.place(index))

    def flip(self, index: int, *, add: int = 0, take: int = 0) -> None:
        """Flags of descriptor `index` of the chain in view, with some more and some fewer."""
        self.desc(index, flags=self.flags(index) & ~take | add)

    def cell(self, index: int, **fields: int) -> None:
        """Fields of entry `index` of the table of the chain in view."""
        for name, value in fields.items():
            self.put(f"table.{name}", value, self.entry(index))

    def segments(self, *segments: tuple[int, int, bool], number: int = 0) -> None:
        """What the chain in view is now, in the eyes of whoever accepts it."""
        self._instead[self.before + number] = segments

    def region(self, address: int, size: int, *, writable: bool = True) -> None:
        """One more region."""
        self.more["regions"] = (*self.more.get("regions", RAM), (address, size, writable))

    # --------------------------------------------------------------------------------------------------------- outcomes

    def handed(self, count: int | None = None) -> tuple[Segments, ...]:
        """What must be handed out when the first `count` chains are accepted, or all: most cases end before that."""
        instead = self._instead
        return tuple([instead.get(number, each.segments) for number, each in enumerate(self.buffers[:count])])

    def accepted(self, title: str) -> RingCase:
        """Every chain is handed out."""
        whole = Outcome(len(self.buffers), segments=self.handed())
        return self.case(title, whole, whole)

    def broken(self, title: str, rule: str, *, after: int = 0) -> RingCase:
        """The rule is found broken after those before the one in view, and `after` more."""
        found = self._found(rule, after)
        return self.case(title, found, found)

    def only_strict(self, title: str, rule: str, *, after: int = 0) -> RingCase:
        """Interop accepts it."""
        return self.case(title, Outcome(len(self.buffers), segments=self.handed()), self._found(rule, after))

    def nothing(self, title: str, *, handed: int = 0) -> RingCase:
        """Only those before the one in view, and `handed` more, are there at all; no rule is broken."""
        count = self.before + handed
        found = Outcome(count, segments=self.handed(count))
        return self.case(title, found, found)

    def _found(self, rule: str, after: int) -> Outcome:
        count = self.before + after
        return Outcome(count, rule, segments=self.handed(count))

    def case(self, title: str, interop: Outcome, strict: Outcome) -> RingCase:
        """The case, as it stands now."""
        case = OpenCase(
            title=title,
            packed=self.packed,
            size=self.size,
            features=self.features,
            start=self.start,
            buffers=self.buffers,
            writes=tuple(self.writes),
            later=tuple(self.later),
            interop=interop,
            strict=strict,
        )
        for name, value in self.more.items():
            setattr(case, name, value)
        return closed(case)

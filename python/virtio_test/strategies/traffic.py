"""Legal traffic: memory maps, queues, requests cut into descriptors in any way, and completions in any order.

Everything lies on the canonical map, with borders between regions and holes among the data. Nothing here is at a
place that a driver would not choose, so whatever an end finds broken in such a case is a mistake of that end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from .acts import Act, Add, Buffer, Pop, Publish, Push, Span, Take, Use
from .case import DATA, PAGE, RAM, TABLES, Outcome, RingCase
from .draw import Draw

__all__ = ["PACKED_SIZES", "SPLIT_SIZES", "any_features", "any_map", "any_size", "any_start", "legal_case", "partition"]

SPLIT_SIZES: Final = (8, 1, 2, 4, 16, 256)
PACKED_SIZES: Final = (8, 1, 2, 3, 4, 5, 7, 16, 255, 256, 257)
SPLIT_STARTS: Final = (0, 1, 0x7FFF, 0x8000, *range(0xFFF0, 0x10000))
INDIRECT_DESC: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
IN_ORDER: Final = 1 << 35
_PAGES: Final = range(DATA, 0x10000, PAGE)
_PARTS: Final = 6
_PATTERN: Final = bytes(number * number >> 3 & 0xFF for number in range(1024))

Request = tuple[bytes, int]
"""What the device is to read, and how many bytes it may answer."""
Regions = tuple[tuple[int, int, bool], ...]


def any_size(draw: Draw, *, packed: bool, least: int = 1) -> int:
    """A size that the format allows."""
    sizes = PACKED_SIZES if packed else SPLIT_SIZES
    return draw.some([size for size in sizes if size >= least] if least > 1 else sizes)


def any_start(draw: Draw, *, packed: bool, size: int) -> int:
    """Where both indices stand: near every border that they cross."""
    if not packed:
        return draw.some(SPLIT_STARTS)
    return draw.some((0, size - 1, size // 2)) | draw.some((1, 0)) << 15


def any_features(draw: Draw) -> int:
    """INDIRECT_DESC, EVENT_IDX and IN_ORDER, each or not."""
    return draw.some((INDIRECT_DESC, 0)) | draw.some((0, EVENT_IDX)) | draw.some((0, IN_ORDER))


def any_map(draw: Draw) -> tuple[Regions, list[Span]]:
    """Regions with borders and holes among the data pages, and the stretches of data that are whole."""
    if draw.some((True, False)):
        return RAM, [(DATA, 0x10000 - DATA)]
    regions: list[Span] = []
    islands: list[Span] = []
    for at in _PAGES:
        kind = draw.some(("same", "same", "border", "hole"))
        if kind == "hole" and (islands or at != _PAGES[-1]):
            continue
        here = islands[-1] if islands else (0, 0)
        if sum(here) != at:
            islands.append((at, PAGE))
            regions.append((at, PAGE))
            continue
        islands[-1] = (here[0], here[1] + PAGE)
        first, size = regions[-1]
        if kind == "border":
            regions.append((at, PAGE))
        else:
            regions[-1] = (first, size + PAGE)
    return ((0, DATA, True), *((at, size, True) for at, size in regions)), islands


def partition(draw: Draw, length: int, most: int) -> list[int]:
    """`length` as the sum of up to `most` lengths, none of them 0."""
    parts: list[int] = []
    while length and len(parts) + 1 < most and draw.some((False, True, True)):
        parts.append(draw.vary(1, length, length))
        length -= parts[-1]
    return [*parts, length] if length else parts


class _Space:
    """Gives out the islands, in order and never twice; the last bytes before each border are used, so it is crossed."""

    def __init__(self, islands: Sequence[Span]) -> None:
        self._islands = list(islands)
        self._at = self._islands[0][0]

    def room(self) -> int:
        """Bytes that a buffer may still ask for at once."""
        first, size = self._islands[0]
        return max([first + size - self._at, *(size for _, size in self._islands[1:])])

    def take(self, length: int) -> int:
        first, size = self._islands[0]
        while self._at + length > first + size:
            del self._islands[0]
            first, size = self._islands[0]
            self._at = first
        self._at += length
        return self._at - length


class _Traffic:
    """A queue in legal use: buffers go out, come back in any order, and others take their descriptors."""

    def __init__(self, draw: Draw, case: RingCase, islands: Sequence[Span]) -> None:
        self.draw, self.case = draw, case
        self.space = _Space(islands)
        self.free = case.size
        self.buffers: list[Buffer] = []
        self.first: list[Buffer] = []
        self.later: list[Act] = []
        self.waiting: list[int] = []
        self.fresh = 0
        self.slots: list[int] = []
        self.done: list[tuple[int, int]] = []
        self.early: dict[int, int] = {}

    def buffer(self, data: bytes, room: int) -> Buffer | None:
        """The request cut into parts; None when it does not fit into what is left of memory."""
        draw, case = self.draw, self.case
        if not data and not room:
            room = 1
        if len(data) + room > self.space.room():
            return None
        # No chain is longer than the queue, wherever its descriptors lie (2.7.5.3.1).
        tables = bool(case.features & INDIRECT_DESC)
        longest = min(case.size, case.entries, _PARTS)
        indirect = tables and draw.some((False, True))
        most = longest if indirect else min(self.free, _PARTS)
        if most < bool(data) + bool(room):
            indirect, most = tables, longest if tables else 0
        if most < bool(data) + bool(room):
            return None
        lengths = partition(draw, len(data), most - bool(room))
        answers = partition(draw, room, most - len(lengths))
        readable = tuple((self.space.take(length), length) for length in lengths)
        return Buffer(readable, tuple((self.space.take(length), length) for length in answers), indirect, data)

    def add(self, buffer: Buffer) -> None:
        slots = 1 if buffer.indirect else len(buffer.segments)
        self.free -= slots
        self.slots.append(slots)
        self.waiting.append(len(self.buffers))
        self.buffers.append(buffer)
        if self.later:
            self.later.append(Add(buffer))
        else:
            self.first.append(buffer)
        self.fresh += 1

    def show(self) -> None:
        """What was added is shown, and the device end takes it."""
        if not self.fresh:
            return
        self.later.append(Publish())
        if self.case.end == "device":
            self.later.append(Pop(self.fresh))
        self.fresh = 0

    def finish(self, *, whole: bool = False) -> None:
        """Some of those that wait, or all, are completed in any order, and the driver takes what comes back."""
        draw = self.draw
        self.show()
        count = len(self.waiting) if whole else draw.vary(0, len(self.waiting), len(self.waiting))
        for _ in range(count):
            number = self.waiting.pop(draw.vary(0, len(self.waiting) - 1, 0))
            room = sum(length for _, length in self.buffers[number].writable)
            written = draw.vary(0, room, room)
            self.later.append((Push if self.case.end == "device" else Use)(number, written))
            self._completed(number, written)
        self.later.append(Take())

    def _completed(self, number: int, written: int) -> None:
        """With IN_ORDER what is finished early is kept back until its turn comes (6.2)."""
        self.early[number] = written
        while self.early:
            ready = len(self.done) if self.case.features & IN_ORDER else next(iter(self.early))
            if ready not in self.early:
                return
            self.done.append((ready, self.early.pop(ready)))
            self.free += self.slots[ready]


def legal_case(
    draw: Draw,
    *,
    end: Literal["device", "driver"] = "device",
    packed: bool | None = None,
    features: int | None = None,
    requests: Iterable[Request] | None = None,
) -> RingCase:
    """Traffic on any queue in any map; `requests` are drawn when None, and those that find no room are left out.

    With `requests` the queue has room for 8 descriptors at least.
    """
    packed = draw.choice((False, True)) if packed is None else packed
    size = any_size(draw, packed=packed, least=1 if requests is None else 8)
    regions, islands = any_map(draw)
    case = RingCase(
        title="legal",
        end=end,
        packed=packed,
        size=size,
        features=any_features(draw) if features is None else features,
        start=any_start(draw, packed=packed, size=size),
        regions=regions,
        entries=min(16, (DATA - TABLES) // (16 * size)),
    )
    traffic = _Traffic(draw, case, islands)
    for data, room in _requests(draw) if requests is None else requests:
        if not traffic.free or draw.some((False, False, False, True)):
            traffic.finish(whole=not traffic.free)
        buffer = traffic.buffer(data, room)
        if buffer is None:
            traffic.finish(whole=True)
            buffer = traffic.buffer(data, room)
        if buffer is not None:
            traffic.add(buffer)
    traffic.finish()
    used = tuple(traffic.done)
    if end == "driver":
        found = Outcome(len(used), used=used)
    else:
        found = Outcome(len(traffic.buffers), segments=tuple(each.segments for each in traffic.buffers))
    return case.but(buffers=tuple(traffic.first), later=tuple(traffic.later), interop=found, strict=found)


def _requests(draw: Draw) -> Iterable[Request]:
    for number in range(draw.vary(1, 12, 4)):
        length, at = draw.some((16, 0, 1, draw.vary(1, 600, 64))), 31 * number
        yield _PATTERN[at : at + length], draw.some((8, 0, draw.vary(1, 600, 64)))

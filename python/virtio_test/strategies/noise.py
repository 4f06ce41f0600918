"""Chaos: a legal ring, and any fields of it set to anything, between any calls. Nothing is known of what comes of it.

What must hold all the same: nothing is read or written outside, no more is handed out than the ring has room for, a
rule is found broken once at most, and then there is silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final, Literal

from virtio_test._core import RingLayout

from .acts import Act, Change, Look, Pop, Publish, Push, Put, Take, Use, Write
from .case import AVAIL, DATA, EDGE, HOLE, RING, TABLES, USED, RingCase
from .draft import INDIRECT, NEXT, WRITE
from .draw import Draw
from .traffic import EVENT_IDX, IN_ORDER, INDIRECT_DESC, legal_case

__all__ = ["chaos_case"]

_PLACES: Final = (0, RING, RING + 0x80, DATA, EDGE - 4, HOLE - 16, HOLE, TABLES, 1 << 32, 2**64 - 8, 2**64 - 1)
_FLAGS: Final = (NEXT, WRITE, NEXT | WRITE, INDIRECT, 0)
_LAPS: Final = (AVAIL, USED, AVAIL | USED)
_SMALL: Final = tuple(range(10))
_LENGTHS: Final = (0, 1, 15, 16, 32, 48, 128, 4096, 16 * 1025, 1 << 31, 2**32 - 1)
LIKELY: Final[Mapping[str, Sequence[int]]] = {
    "addr": _PLACES,
    "len": _LENGTHS,
    "flags": (*_FLAGS, *(flags | lap for flags in _FLAGS for lap in _LAPS)),
    "next": _SMALL,
    "id": _SMALL,
    "idx": _SMALL,
    "ring": _SMALL,
}
"""What is nearly right, by the last word of the field: it gets further than noise."""

_DEVICES: Final = {
    False: ("used.idx", "used.ring.id", "used.ring.len", "used.flags", "avail_event"),
    True: ("desc.id", "desc.len", "desc.flags", "device_event.off_wrap", "device_event.flags"),
}
"""What the device owns, and so what an evil one writes."""


def chaos_case(draw: Draw, *, end: Literal["device", "driver"] = "device", packed: bool | None = None) -> RingCase:
    """A small legal ring that is spoiled in several places, several times."""
    packed = draw.choice((False, True)) if packed is None else packed
    features = draw.some((INDIRECT_DESC, 0)) | draw.some((0, EVENT_IDX, IN_ORDER))
    requests = [(bytes(draw.some((8, 1, 0))), draw.some((8, 16, 0))) for _ in range(draw.vary(1, 4, 2))]
    case = legal_case(draw, end=end, packed=packed, features=features, requests=requests)
    case = case.but(title="chaos", later=(), interop=None, strict=None)
    later: list[Act] = []
    free = list(range(case.size))
    for _ in range(draw.vary(1, 4, 2)):
        later += _scribbles(draw, case)
        for _ in range(draw.vary(0, 4, 1)):
            later.append(_call(draw, case, free))
    first: tuple[Change, ...] = tuple(_scribbles(draw, case)) if end == "device" else ()
    return case.but(writes=first, later=tuple(later))


def _call(draw: Draw, case: RingCase, free: list[int]) -> Act:
    """Any call of the judged end, or one of its peer; each chain is completed once at most."""
    kind = draw.some((Pop, Look, Push, Publish))
    if kind is Push and free:
        which = free.pop(draw.vary(0, min(len(free), 4) - 1, 0))
        return Push(which, 0) if case.end == "device" else Use(which, draw.some((0, 1, 8)))
    if kind is Pop:
        return Pop(draw.vary(1, 4, 1)) if case.end == "device" else Take(draw.vary(1, 4, 1))
    return Look() if kind is Look else Publish()


@cache
def _fields(size: int, packed: bool) -> dict[str, tuple[int, int, tuple[int, ...]]]:  # noqa: FBT001 (a key of the cache)
    """Field to (bytes, places, what is nearly right there); those of tables too."""
    found: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for name, (_, width, _, count) in RingLayout(size, packed=packed).fields().items():
        likely = tuple(value for value in LIKELY.get(name.rpartition(".")[2], ()) if value < 1 << 8 * width)
        found[name] = width, min(count, 9), likely
        if name in ("desc.addr", "desc.len", "desc.flags", "desc.next"):
            found[f"table.{name[5:]}"] = width, 9, likely
    return found


def _scribbles(draw: Draw, case: RingCase) -> list[Change]:
    fields = _fields(case.size, case.packed)
    names = _DEVICES[case.packed] if case.end == "driver" and draw.some((True, True, False)) else tuple(fields)
    found: list[Change] = []
    for _ in range(draw.vary(1, 8, 2)):
        name = draw.choice(names)
        width, places, likely = fields[name]
        known = likely and draw.some((True, True, False))
        value = draw.some(likely) if known else draw.vary(0, (1 << 8 * width) - 1, 0)
        if known and name.endswith(".idx"):
            value = value + case.start & 0xFFFF
        found.append(Put(name, value, draw.vary(0, places - 1, 0)))
    if not draw.vary(0, 15, 1):
        noise = bytes(draw.vary(0, 255, 0) for _ in range(draw.vary(1, 32, 8)))
        found.append(Write(RING + draw.vary(0, 0x200, 0), noise))
    return found

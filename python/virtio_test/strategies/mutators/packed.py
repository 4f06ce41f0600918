"""Section 2.5 of the catalogue: what only the packed ring has."""

from __future__ import annotations

from typing import Literal

from virtio_test.strategies.acts import Buffer, Look, Pop, Push, Put, Take, Use
from virtio_test.strategies.case import AVAIL, USED, Outcome, RingCase
from virtio_test.strategies.draft import NEXT, READ_A, TAKES, WRITE, Draft, direct, single
from virtio_test.strategies.draw import Draw

from .registry import row
from .split import overwritten, readers, singles


def one(draw: Draw) -> Draft:
    """One writable descriptor, with nothing behind it."""
    return Draft(draw, single(draw), packed=True, alone=True)


@row("P01")
def fresh(draw: Draw) -> RingCase:
    return Draft(draw, None, packed=True).nothing("nothing there")


@row("P02")
def neither_nor(draw: Draw) -> RingCase:
    draft = one(draw)
    flags = draw.choice((0, AVAIL | USED))
    draft.desc(0, flags=flags | WRITE)
    return draft.nothing(f"flags {flags:#x}")


@row("P03")
def lap_before(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=True, start=draw.choice((0x8000, 0)), alone=True)
    draft.desc(0, flags=draft.lap(0) ^ (AVAIL | USED) | WRITE)
    return draft.nothing("the lap before")


@row("P04")
def partly_available(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=True)
    index, both = draw.choice((1, 2)), draw.choice((0, AVAIL | USED))
    draft.flip(index, take=AVAIL | USED, add=both)
    return draft.broken(f"{index} of them is not available", "ChainNotAvail")


@row("P05")
def endless(draw: Draw) -> RingCase:
    size = draw.choice((8, 1))
    draft = Draft(draw, readers(size), packed=True, size=size, alone=True)
    draft.flip(size - 1, add=NEXT)
    return draft.broken(f"NEXT in all {size}", "ChainTooLong")


@row("P06")
def any_id(draw: Draw) -> RingCase:
    draft = one(draw)
    identity = draw.choice((draft.size, 0x7FFF, 0xFFFF, draw.integer(0, 0xFFFF)))
    draft.desc(0, id=identity)
    return draft.accepted(f"id {identity:#x}")


@row("P07")
def id_twice(draw: Draw) -> RingCase:
    draft = Draft(draw, singles(2), packed=True, alone=True)
    draft.desc(1, id=0)
    return draft.only_strict("one id twice", "IdInFlight", after=1)


@row("P09")
def across_the_end(draw: Draw) -> RingCase:
    wrap = draw.choice((0, 1)) << 15
    shape = draw.choice(("three", "whole"))
    buffer = direct(draw) if shape == "three" else readers(8)
    start = (6 if shape == "three" else 7) | wrap
    return Draft(draw, buffer, packed=True, size=8, start=start, alone=True).accepted(f"{shape}, from {start:#x}")


@row("P11")
def odd_sizes(draw: Draw) -> RingCase:
    return _full(draw, draw.choice((2, 3, 5, 7, 255, 257)))


@row("P12")
def size_one(draw: Draw) -> RingCase:
    return _full(draw, 1)


def _full(draw: Draw, size: int) -> RingCase:
    start = draw.choice((0, size - 1)) | draw.choice((0, 1)) << 15
    draft = Draft(draw, singles(size), packed=True, size=size, start=start, alone=True)
    return draft.accepted(f"full, size {size}, from {start:#x}")


@row("P24")
def next_lap(draw: Draw) -> RingCase:
    """The driver goes on into the next lap while everything of this one is in flight."""
    draft = Draft(draw, singles(8), packed=True, size=8, alone=True)
    turned = draft.lap(0) ^ (AVAIL | USED)
    draft.later += [Pop(8), Put("desc.flags", turned | WRITE, draft.place(0))]
    return draft.broken("a slot of the next lap", "TooManyInFlight", after=8)


@row("P24")
def replay(draw: Draw) -> RingCase:
    draft = one(draw)
    draft.later += [Pop(), Put("desc.flags", draft.flags(0), draft.place(0))]
    return draft.accepted("the slot before again")


@row("P26")
def unavailable_after_a_look(draw: Draw) -> RingCase:
    draft = one(draw)
    draft.later += [Look(), Put("desc.flags", WRITE | draw.choice((0, AVAIL | USED)), draft.place(0))]
    return draft.nothing("unavailable after a look")


@row("P19")
def reserved_flags(draw: Draw) -> RingCase:
    """Bits that the device has to ignore; they do not come back in the used descriptor either."""
    draft = Draft(draw, direct(draw), packed=True)
    for index in range(3):
        draft.flip(index, add=draw.choice((0x7F78, 0x0008)))
    return draft.accepted("reserved flags")


@row("P25")
def changed_after_the_pop(draw: Draw) -> RingCase:
    return overwritten(Draft(draw, direct(draw), packed=True), draw)


@row("P22")
def reserved_event_flags(draw: Draw) -> RingCase:
    draft = one(draw)
    draft.put("driver_event.flags", draw.choice((3, 0xFFFF, 0xFFFC, draw.integer(3, 0xFFFF))))
    return _told(draft)


@row("P23")
def event_beyond_the_ring(draw: Draw) -> RingCase:
    draft = one(draw)
    draft.put("driver_event.off_wrap", draw.choice((draft.size, 0x7FFF, 0xFFFF, draw.integer(draft.size, 0x7FFF))))
    draft.put("driver_event.flags", 2)
    return _told(draft)


def _told(draft: Draft) -> RingCase:
    """Completed all the same; whether the driver is told is no matter of the ring."""
    draft.later += [Pop(), Push(0)]
    return draft.accepted("event structure that makes no sense")


def _in_any_order(draw: Draw, *, end: Literal["device", "driver"]) -> RingCase:
    """Chains of three, two and one slots over the end of the ring, used in any order."""
    start = 4 | draw.choice((0, 1)) << 15
    parts = [
        Buffer(tuple((READ_A + 64 * n, 4) for n in range(count)), ((TAKES + 64 * count, 9),)) for count in (2, 1, 0)
    ]
    draft = Draft(draw, parts, packed=True, size=7, start=start, features=0, alone=True)
    order = draw.choice(((0, 1, 2), (1, 2, 0), (2, 1, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1)))
    draft.more["end"] = end
    title = f"used in order {order}, from {start:#x}"
    if end == "device":
        draft.later += [Pop(3), *(Push(which, which) for which in order), Take()]
        return draft.accepted(title)
    used = tuple((which, which + 1) for which in order)
    draft.later += [Use(which, written) for which, written in used]
    found = Outcome(3, used=used)
    return draft.case(title, found, found)


@row("P20")
def skipped_slots(draw: Draw) -> RingCase:
    return _in_any_order(draw, end=draw.choice(("device", "driver")))


@row("P21")
def out_of_order(draw: Draw) -> RingCase:
    return _in_any_order(draw, end=draw.choice(("device", "driver")))

"""Queues that cannot be (2.1 A13, 2.2 C11, 2.5 P13 and P32): refused when they are built, with nothing changed."""

from __future__ import annotations

from virtio_test.strategies.case import HOLE, Outcome, RingCase
from virtio_test.strategies.draft import Draft, single
from virtio_test.strategies.draw import Draw

from .registry import row

ROM = 0x20000


@row("A13")
def area_unmapped(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=draw.choice((False, True)))
    area = draw.choice(("desc", "driver", "device"))
    # The event areas of a packed ring are too small to be cut in two.
    cut = HOLE - 16 if area == "desc" or not draft.packed else HOLE
    address = draw.choice((0x9000_0000, 2**64 - 16, cut))
    draft.more["areas"] = {area: address}
    return _refused(draft, f"{area} at {address:#x}", "RingUnmapped")


@row("A13")
def area_read_only(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=draw.choice((False, True)))
    draft.region(ROM, 0x1000, writable=False)
    area = draw.choice(("device", "desc") if draft.packed else ("device",))
    draft.more["areas"] = {area: ROM}
    return _refused(draft, f"{area} read-only", "RingUnmapped")


@row("A13")
def area_read_only_to_the_driver(draw: Draw) -> RingCase:
    draft = Draft(draw, None, packed=draw.choice((False, True)))
    draft.region(ROM, 0x1000, writable=False)
    area = draw.choice(("desc", "driver"))
    draft.more |= {"areas": {area: ROM}, "end": "driver"}
    return _refused(draft, f"{area} read-only", "RingUnmapped")


@row("C11")
def area_misaligned(draw: Draw) -> RingCase:
    end = draw.choice(("device", "driver"))
    draft = Draft(draw, single(draw) if end == "device" else None, packed=draw.choice((False, True)), alone=True)
    layout = draft.case("", Outcome(0), Outcome(0)).layout()
    limits = {"desc": 15, "driver": 3 if draft.packed else 1, "device": 3}
    area = draw.choice(("desc", "driver", "device"))
    by = draw.integer(1, limits[area])
    draft.more |= {"areas": {area: getattr(layout, area) + by}, "end": end}
    return _refused(draft, f"{end}: {area} {by} beside", "RingMisaligned")


def _refused(draft: Draft, title: str, rule: str) -> RingCase:
    return draft.case(title, *[Outcome(0, rule, built=False)] * 2)


@row("P13")
def impossible_size(draw: Draw) -> RingCase:
    end = draw.choice(("device", "driver"))
    draft = Draft(draw, single(draw) if end == "device" else None, packed=draw.choice((False, True)), alone=True)
    found = ((0, "QueueSizeZero"), (32769 if draft.packed else 65536, "QueueSizeTooBig"))
    more = ((65535, "QueueSizeTooBig"),) if draft.packed else ((3, "QueueSizeNotPowerOfTwo"),)
    size, rule = draw.choice((*found, *more))
    draft.more |= {"areas": {"size": size}, "end": end}
    return _refused(draft, f"{end}: size {size}", rule)


@row("P32")
def impossible_state(draw: Draw) -> RingCase:
    end = draw.choice(("device", "driver"))
    draft = Draft(
        draw, single(draw) if end == "device" else None, packed=draw.choice((False, True)), size=8, alone=True
    )
    packed = ((8, 0), (0, 8), (0x8008, 0x8000), (0x8000, 0x8008), (0xFFFF, 0x8000), (0x7FFF, 0x7FFF))
    state = draw.choice(packed if draft.packed else ((9, 0), (0, 1), (0x8000, 0)))
    draft.more |= {"state": state, "end": end}
    return _refused(draft, f"{end}: state {state[0]:#x} {state[1]:#x}", "StateOutOfRange")

"""Section 2.3 of the catalogue: addresses and lengths, in both formats."""

from __future__ import annotations

from virtio_test.strategies.case import EDGE, HOLE, PAGE, RAM, RingCase
from virtio_test.strategies.draft import READ_A, WRITE, Draft, direct, single
from virtio_test.strategies.draw import Draw

from .registry import row
from .split import readers
from .tables import either

FAR = HOLE + 2 * PAGE
"""A page behind the hole."""
ROM = 0x20000
BIG = 1 << 32
QUARTER = 256 << 20
MANY = 200


def three(draw: Draw) -> Draft:
    """Two readable descriptors and a writable one, in either format."""
    return Draft(draw, direct(draw), packed=either(draw))


def point(draft: Draft, index: int, address: int, length: int | None = None) -> None:
    """Where descriptor `index` points now."""
    old = draft.view.segments
    length = old[index][1] if length is None else length
    draft.desc(index, addr=address, len=length)
    draft.segments(*old[:index], (address, length, old[index][2]), *old[index + 1 :])


# -------------------------------------------------------------------------------------------------------------- lengths


@row("B01")
def empty_split(draw: Draw) -> RingCase:
    return _empty(draw, packed=False)


@row("P30")
def empty_packed(draw: Draw) -> RingCase:
    return _empty(draw, packed=True)


def _empty(draw: Draw, *, packed: bool) -> RingCase:
    """Where no byte is described, no address is used."""
    draft = Draft(draw, direct(draw), packed=packed)
    which = draw.choice(((0,), (1,), (2,), (0, 1, 2), (0, 2)))
    for index in which:
        draft.desc(index, len=0)
        if len(which) == 1 and draw.choice((False, True)):
            draft.desc(index, addr=HOLE)
    kept = draft.view.segments
    draft.segments(*(each for index, each in enumerate(kept) if index not in which))
    return draft.only_strict(f"0 bytes in {which}", "ZeroLength")


@row("B02")
def empty_whole(draw: Draw) -> RingCase:
    return _empty_one(draw, "all of 0 bytes")


@row("C10")
def empty_alone(draw: Draw) -> RingCase:
    return _empty_one(draw, "one of 0 bytes")


def _empty_one(draw: Draw, title: str) -> RingCase:
    draft = Draft(draw, single(draw), packed=either(draw))
    draft.desc(0, len=0)
    draft.segments()
    return draft.only_strict(title, "ZeroLength")


@row("B09")
def four_gibibytes(draw: Draw) -> RingCase:
    draft = Draft(draw, readers(16), packed=either(draw), size=16, alone=True)
    draft.region(BIG, QUARTER + PAGE)
    more = draw.choice((0, 1))
    for index in range(16):
        draft.desc(index, addr=BIG, len=QUARTER + more * (index == 9))
    draft.segments(*[(BIG, QUARTER, False)] * 16)
    if more:
        return draft.broken("2^32 bytes and one", "ChainTooBig")
    return draft.accepted("2^32 bytes")


@row("B10")
def longest(draw: Draw) -> RingCase:
    draft = Draft(draw, draw.choice((single(draw), readers(1))), packed=either(draw))
    draft.desc(0, len=0xFFFF_FFFF)
    return draft.broken("2^32-1 bytes", "UnmappedAddress")


# ------------------------------------------------------------------------------------------------------------ addresses


@row("B03")
def unmapped(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 2))
    address = draw.choice((HOLE, 0x9000_0000, 1 << 52, draw.integer(HOLE, 2**64 - 0x1000)))
    draft.desc(index, addr=address)
    return draft.broken(f"{address:#x} in {index}", "UnmappedAddress")


@row("B04")
def wraps(draw: Draw) -> RingCase:
    """Memory ends below 2^64, so a buffer that ends exactly there has left it as well."""
    draft, index = three(draw), draw.choice((0, 2))
    back, length = draw.choice(((1, 16), (8, 16), (16, 16), (8, 0x8000_0000), (draw.integer(1, 4096), 4096)))
    draft.desc(index, addr=2**64 - back, len=length)
    return draft.broken(f"{length} bytes at 2^64-{back} in {index}", "AddressWraps")


@row("B04")
def wraps_whole(draw: Draw) -> RingCase:
    draft = Draft(draw, draw.choice((single(draw), readers(1))), packed=either(draw))
    draft.desc(0, addr=2**64 - 8, len=0xFFFF_FFFF)
    return draft.broken("2^32-1 bytes at the top", "AddressWraps")


@row("B05")
def to_the_end(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 1, 2))
    length = draw.choice((1, 32, draw.integer(1, PAGE)))
    point(draft, index, HOLE - length, length)
    return draft.accepted(f"{length} bytes to the end in {index}")


@row("B06")
def beyond_the_end(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 1, 2))
    back, more = draw.choice((1, 32, draw.integer(1, PAGE))), draw.choice((1, draw.integer(1, PAGE)))
    draft.desc(index, addr=HOLE - back, len=back + more)
    return draft.broken(f"{more} beyond the end in {index}", "UnmappedAddress")


@row("B08")
def over_a_hole(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 2))
    draft.region(FAR, PAGE)
    draft.desc(index, addr=HOLE - 16, len=2 * PAGE + 32)
    return draft.broken(f"over a hole in {index}", "UnmappedAddress")


@row("B08")
def over_a_border(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 2))
    before = draw.integer(1, 15)
    point(draft, index, EDGE - before, 16)
    return draft.accepted(f"{before} before a border in {index}")


_CUT_UP = (*RAM, *((BIG + PAGE * page, PAGE, True) for page in range(MANY)))


@row("B11")
def over_many_regions(draw: Draw) -> RingCase:
    draft = three(draw)
    draft.more["regions"] = _CUT_UP
    point(draft, 2, BIG + 1, MANY * PAGE - 2)
    return draft.accepted(f"over {MANY} regions")


@row("B13")
def one_place_for_both(draw: Draw) -> RingCase:
    draft = three(draw)
    point(draft, 2, READ_A)
    return draft.accepted("R and W at one place")


@row("B14")
def a_bar(draw: Draw) -> RingCase:
    """A device's BAR is not memory: nothing but RAM is read or written."""
    draft, index = three(draw), draw.choice((0, 2))
    draft.desc(index, addr=0xFEB0_0000)
    return draft.broken(f"a BAR in {index}", "UnmappedAddress")


@row("B15")
def rom(draw: Draw) -> RingCase:
    """Read from it, or write to it; all in it, or the last bytes of a buffer that begins in RAM."""
    draft, index, before = three(draw), draw.choice((1, 2)), draw.choice((0, 4))
    draft.region(ROM - PAGE, PAGE)
    draft.region(ROM, PAGE, writable=False)
    point(draft, index, ROM - before, 8)
    title = f"{'W' if index == 2 else 'R'} {before} bytes before ROM"
    return draft.broken(title, "ReadOnlyAddress") if index == 2 else draft.accepted(title)


@row("B17")
def address_zero(draw: Draw) -> RingCase:
    draft, index = three(draw), draw.choice((0, 2))
    point(draft, index, 0)
    return draft.accepted(f"0 in {index}")


# ---------------------------------------------------------------------------------------------------------------- order


@row("C07")
def order_split(draw: Draw) -> RingCase:
    return _order(draw, packed=False)


@row("P29")
def order_packed(draw: Draw) -> RingCase:
    return _order(draw, packed=True)


def _order(draw: Draw, *, packed: bool) -> RingCase:
    """A device-readable descriptor behind a device-writable one, unless the policy lets it pass."""
    draft = Draft(draw, direct(draw), packed=packed)
    name, wanted = draw.choice(
        (("W R W", (True, False, True)), ("R W R", (False, True, False)), ("W R R", (True, False, False)))
    )
    for index, writable in enumerate(wanted):
        draft.flip(index, add=WRITE * writable, take=WRITE * (not writable))
    if not draw.choice((False, True)):
        return draft.broken(name, "OutOfOrder")
    draft.more["switches"] = {"mixed_order": True}
    told = zip(draft.view.segments, wanted, strict=True)
    draft.segments(*((address, length, writable) for (address, length, _), writable in told))
    return draft.accepted(f"{name} allowed")


@row("B12")
def over_the_ring(draw: Draw) -> RingCase:
    """Where the buffer is the ring itself: taken like any other, as long as nobody writes to it."""
    draft = three(draw)
    layout = draft.accepted("").layout()
    area = draw.choice(("desc", "driver", "device"))
    point(draft, draw.choice((0, 2)), getattr(layout, area))
    return draft.accepted(f"over the {area} area")

"""Section 2.4 of the catalogue, and what 2.5 has of it: indirect tables, in both formats where both have it."""

from __future__ import annotations

from virtio_test.strategies.acts import Buffer, Copy, Fill, Put
from virtio_test.strategies.case import EDGE, HOLE, PAGE, TABLES, Outcome, RingCase
from virtio_test.strategies.draft import INDIRECT, NEXT, READ_A, TAKES, WRITE, Draft, direct
from virtio_test.strategies.draw import Draw

from .registry import row
from .split import overwritten

MUCH = 0x40000
"""A region for tables that are longer than any queue."""


def tabled(draw: Draw, *, packed: bool, features: int | None = None) -> Draft:
    """Three entries in an indirect table."""
    return Draft(draw, direct(draw, indirect=True), packed=packed, features=features)


def either(draw: Draw) -> bool:
    """Both formats have the row."""
    return draw.choice((False, True))


@row("I01")
def not_negotiated(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=either(draw), features=draw.some((0, 1 << 29)))
    draft.flip(0, add=INDIRECT, take=NEXT)
    draft.desc(0, addr=TABLES, len=48)
    return draft.broken("not negotiated", "IndirectNotNegotiated")


@row("I02")
def with_next(draw: Draw) -> RingCase:
    return _with_next(draw, packed=False)


@row("P15")
def with_next_packed(draw: Draw) -> RingCase:
    return _with_next(draw, packed=True)


@row("P18")
def with_next_cve(draw: Draw) -> RingCase:
    """The ring of CVE-2026-16457: whoever loops while there is work must come to an end."""
    return _with_next(draw, packed=True)


def _with_next(draw: Draw, *, packed: bool) -> RingCase:
    draft = tabled(draw, packed=packed)
    draft.flip(0, add=NEXT)
    return draft.broken("INDIRECT and NEXT", "IndirectAndNext")


@row("P15")
def after_direct(draw: Draw) -> RingCase:
    """The last one has no NEXT; what is wrong is only that others come before it."""
    draft = Draft(draw, direct(draw), packed=True)
    index = draw.choice((1, 2))
    draft.desc(index, addr=TABLES, len=16)
    draft.flip(index, add=INDIRECT)
    return draft.broken(f"INDIRECT in {index}", "IndirectAfterDirect")


@row("I03")
def nested(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=False)
    index, flags = draw.choice(((0, INDIRECT | NEXT), (1, INDIRECT | NEXT), (2, INDIRECT)))
    draft.cell(index, flags=flags)
    return draft.broken(f"INDIRECT in entry {index}", "NestedIndirect")


@row("I05")
def two_tables(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=False)
    draft.desc(0, addr=TABLES, len=32, flags=INDIRECT | NEXT)
    draft.desc(1, addr=TABLES, len=32, flags=INDIRECT)
    return draft.broken("two INDIRECT in a chain", "IndirectAndNext")


@row("I06")
def empty(draw: Draw) -> RingCase:
    return _length(draw, (0,), packed=False)


@row("P16")
def empty_packed(draw: Draw) -> RingCase:
    return _length(draw, (0,), packed=True)


@row("I07")
def no_multiple(draw: Draw) -> RingCase:
    return _length(draw, (1, 15, 17, 31, 56, 16 * draw.integer(0, 3) + draw.integer(1, 15)), packed=either(draw))


def _length(draw: Draw, lengths: tuple[int, ...], *, packed: bool) -> RingCase:
    draft = tabled(draw, packed=packed)
    length = draw.choice(lengths)
    draft.desc(0, len=length)
    return draft.broken(f"{length} bytes", "IndirectBadLen")


@row("I07")
def remainder_allowed(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=either(draw))
    draft.more["switches"] = {"indirect_remainder": True}
    length = draw.choice((49, 56, 63, 1, 15))
    draft.desc(0, len=length)
    if length < 16:
        return draft.broken(f"{length} bytes allowed", "IndirectBadLen")
    return draft.accepted(f"{length} bytes allowed")


def _long(draw: Draw, counts: tuple[int, ...]) -> tuple[Draft, int]:
    """A table of that many bytes of one; its room is a region of its own."""
    draft = Draft(draw, direct(draw), packed=either(draw), size=8, alone=True)
    count = draw.choice(counts)
    draft.region(MUCH, 5 * PAGE)
    draft.more["tables"] = MUCH
    draft.desc(0, addr=MUCH, len=16 * count)
    draft.flip(0, add=INDIRECT, take=NEXT)
    if draft.packed:
        # What lies behind is no part of the chain any more, and each would be one of its own.
        for index in (1, 2):
            draft.desc(index, flags=0)
        draft.desc(0, id=0)
    draft.writes += [Fill("table.addr", READ_A, 0, count), Fill("table.len", 1, 0, count)]
    if not draft.packed:
        draft.writes += [Fill("table.flags", NEXT, 0, count - 1), Fill("table.next", 1, 1, count - 1)]
    draft.segments(*[(READ_A, 1, False)] * count)
    return draft, count


@row("I08")
def as_long_as_the_queue(draw: Draw) -> RingCase:
    draft, count = _long(draw, (8, 1))
    return draft.accepted(f"{count} entries")


@row("I08")
def longer_than_the_queue(draw: Draw) -> RingCase:
    draft, count = _long(draw, (9, 1024))
    return draft.only_strict(f"{count} entries", "IndirectTooLong")


@row("I08")
def longer_than_any(draw: Draw) -> RingCase:
    draft, count = _long(draw, (1025,))
    return draft.broken(f"{count} entries", "IndirectTooLong")


@row("I08")
def as_long_as_allowed(draw: Draw) -> RingCase:
    draft, count = _long(draw, (1025, 1026))
    draft.more["switches"] = {"max_indirect": 1025, "indirect_beyond_queue": True}
    if count > 1025:
        return draft.broken(f"{count} entries, 1025 allowed", "IndirectTooLong")
    return draft.accepted(f"{count} entries allowed")


@row("I08")
def endless(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=either(draw))
    count = draw.choice((65535, 65536, 0x0FFF_FFFF, draw.integer(1025, 0x0FFF_FFFF)))
    draft.desc(0, len=16 * count)
    return draft.broken(f"{count} entries", "IndirectTooLong")


@row("I10")
def unaligned(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=either(draw))
    place = draw.choice((0xA801, 0xA808, 0xA80F, EDGE - 20, 0xA800 + draw.integer(1, 15)))
    draft.later.append(Copy(place, draft.table_at, 48))
    draft.later.append(Put("desc.addr", place, draft.place(0)))
    return draft.accepted(f"table at {place:#x}")


@row("I11")
def unmapped(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=either(draw))
    name, address = draw.choice((("unmapped", HOLE), ("partly unmapped", HOLE - 40), ("wraps", 2**64 - 16)))
    draft.desc(0, addr=address)
    return draft.broken(f"table {name}", "IndirectUnmapped")


@row("I12")
def link_out_of_the_table(draw: Draw) -> RingCase:
    """5 is a descriptor of the ring, but none of this table."""
    draft = tabled(draw, packed=False)
    link = draw.choice((3, 5, 0xFFFF, draw.integer(3, 0xFFFF)))
    draft.cell(draw.choice((0, 1)), next=link)
    return draft.broken(f"next {link:#x}", "NextOutOfRange")


@row("I13")
def table_loop(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=False)
    index, link = draw.choice(((1, 0), (1, 1), (0, 0), (2, 0), (2, 2)))
    draft.cell(index, next=link, flags=NEXT)
    return draft.broken(f"loop from {index} to {link}", "ChainTooLong")


@row("P14")
def reserved_in_a_packed_table(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=True)
    for index, (_, _, writable) in enumerate(draft.view.segments):
        draft.cell(index, flags=0xFFFF & ~(WRITE | INDIRECT) | WRITE * writable, id=0xABCD)
    return draft.accepted("reserved bits in a table")


@row("P14")
def nested_in_a_packed_table(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=True)
    index = draw.choice((0, 1, 2))
    draft.cell(index, flags=INDIRECT | WRITE * draft.view.segments[index][2])
    return draft.only_strict(f"INDIRECT in entry {index}", "NestedIndirect")


@row("I15")
def entries_behind_the_last(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=False)
    draft.cell(0, flags=0)
    draft.segments(draft.view.segments[0])
    return draft.accepted("entries behind the last")


@row("I16")
def write_on_indirect(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=either(draw))
    draft.flip(0, add=WRITE)
    return draft.accepted("WRITE on INDIRECT")


@row("I17")
def table_in_its_own_buffer(draw: Draw) -> RingCase:
    draft = Draft(draw, Buffer(((TABLES, 16),), ((TABLES, 16),), indirect=True), packed=either(draw))
    return draft.accepted("table in its own buffer")


@row("I17")
def table_in_the_ring(draw: Draw) -> RingCase:
    """The last entry of the table, copied over a descriptor that is not used, is the table."""
    draft = Draft(draw, direct(draw, indirect=True), packed=either(draw), size=8, alone=True)
    layout = draft.case("", Outcome(0), Outcome(0)).layout()
    place = layout.at("desc.addr", draft.place(4))
    # Only address, length and WRITE count in what becomes a descriptor of the ring that nobody has made available.
    draft.later.append(Copy(place, draft.table_at + 32, 16))
    draft.later += [Put("desc.addr", place, draft.place(0)), Put("desc.len", 16, draft.place(0))]
    draft.segments(draft.view.segments[2])
    return draft.accepted("table in the ring")


@row("I18")
def indirect_in_the_last_descriptor(draw: Draw) -> RingCase:
    buffer = Buffer((), ((TAKES, draw.vary(1, 64, 32)),), indirect=True)
    draft = Draft(draw, buffer, packed=False, size=8, alone=True)
    draft.put("desc.addr", draft.table_at, 7)
    draft.put("desc.len", 16, 7)
    draft.put("desc.flags", INDIRECT, 7)
    draft.put("avail.ring", 7, draft.slot())
    return draft.accepted("INDIRECT in the last one")


@row("I21")
def packed_table_in_a_split_ring(draw: Draw) -> RingCase:
    draft = tabled(draw, packed=False)
    for index in range(3):
        draft.cell(index, flags=1, next=0x80)
    return draft.broken("a packed table", "NextOutOfRange")


@row("I19")
def changed_after_the_pop(draw: Draw) -> RingCase:
    return overwritten(tabled(draw, packed=either(draw)), draw)

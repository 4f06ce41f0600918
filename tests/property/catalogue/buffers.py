"""Sections 2.3 (addresses, lengths) and 2.4 (indirect tables) of the catalogue, for both formats where both have it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.property.bench import BIG, EDGE, HOLE, INDIRECT, NEXT, PAGE, READ_A, READ_B, ROM, TABLE, WRITE, Bench, W
from tests.property.catalogue.defect import (
    Defect,
    Step,
    Where,
    accepted,
    broken,
    buffer,
    entry,
    every,
    flag,
    nothing,
    only_strict,
    put,
    segments,
)

LEGAL = [(READ_A, 16, False), (READ_B, 8, False), (WRITE, 32, True)]
"""What `Bench.direct` and `Bench.tabled` describe."""
QUARTER = 256 << 20


def lengths(where: Where) -> Iterator[Defect]:
    row, zero = "P30" if where.packed else "B01", only_strict("ZeroLength")
    for index in range(3):
        kept = segments(*LEGAL[:index], *LEGAL[index + 1 :])
        yield Defect(row, f"0 bytes in {index}", Bench.direct, put("desc.len", 0, index), zero, where, kept)
    nowhere = buffer(1, HOLE, 0)
    # Where no byte is described, no address is used.
    yield Defect(row, "0 bytes nowhere", Bench.direct, nowhere, zero, where, segments(LEGAL[0], LEGAL[2]))
    empty = every(*(put("desc.len", 0, index) for index in range(3)))
    yield Defect(row, "0 bytes in all", Bench.direct, empty, zero, where, segments())
    yield Defect("C10", "one of 0 bytes", Bench.single, put("desc.len", 0), zero, where, segments())

    sized = Where(packed=where.packed, size=16)
    quarters = every(add_big, *(buffer(index, BIG, QUARTER) for index in range(16)))
    yield Defect("B09", "2^32 bytes", Bench.readers, quarters, accepted(), sized)
    more = every(quarters, put("desc.len", QUARTER + 1, 9))
    yield Defect("B09", "2^32 bytes and one", Bench.readers, more, broken("ChainTooBig"), sized)


def add_big(bench: Bench) -> None:
    bench.memory.add_region(BIG, QUARTER + PAGE)


def addresses(where: Where) -> Iterator[Defect]:
    shape, unmapped, wraps = Bench.direct, broken("UnmappedAddress"), broken("AddressWraps")
    for index in (0, 2):
        for address in (HOLE, 0x9000_0000, 1 << 52):
            yield Defect("B03", f"{address:#x} in {index}", shape, put("desc.addr", address, index), unmapped, where)
        # A device's BAR is not memory: nothing but RAM is read or written.
        yield Defect("B14", f"a BAR in {index}", shape, put("desc.addr", 0xFEB0_0000, index), unmapped, where)
        # Memory ends below 2^64, so a buffer that ends exactly there has left it as well.
        for address in (2**64 - 1, 2**64 - 8, 2**64 - 16):
            yield Defect("B04", f"{address:#x} in {index}", shape, buffer(index, address, 16), wraps, where)
        yield Defect("B05", f"to the end in {index}", shape, buffer(index, HOLE - 32, 32), accepted(), where)
        yield Defect("B06", f"beyond the end in {index}", shape, buffer(index, HOLE - 32, 33), unmapped, where)
        yield Defect("B08", f"over a hole in {index}", shape, buffer(index, HOLE - 16, 0x3000), unmapped, where)
        yield Defect("B08", f"over a border in {index}", shape, put("desc.addr", EDGE - 4, index), accepted(), where)
        yield Defect("B17", f"0 in {index}", shape, put("desc.addr", 0, index), accepted(), where)
    for first, name in ((Bench.single, "W"), (Bench.direct, "R")):
        huge = buffer(0, 2**64 - 8, 0xFFFF_FFFF)
        yield Defect("B04", f"2^32-1 bytes at the top, {name}", first, huge, wraps, where)
        yield Defect("B10", f"2^32-1 bytes, {name}", first, put("desc.len", 0xFFFF_FFFF), unmapped, where)
    pages = every(add_pages, buffer(2, BIG + 1, 400 * PAGE - 2))
    yield Defect("B11", "over 400 regions", shape, pages, accepted(), where)
    yield Defect("B13", "R and W at one place", shape, put("desc.addr", READ_A, 2), accepted(), where)
    rom = broken("ReadOnlyAddress")
    yield Defect("B15", "W in ROM", shape, put("desc.addr", ROM, 2), rom, where)
    yield Defect("B15", "R in ROM", shape, put("desc.addr", ROM, 1), accepted(), where)
    yield Defect("B15", "W into ROM", shape, every(add_before_rom, put("desc.addr", ROM - 4, 2)), rom, where)
    yield Defect("B15", "R into ROM", shape, every(add_before_rom, put("desc.addr", ROM - 4, 1)), accepted(), where)


def add_pages(bench: Bench) -> None:
    for page in range(400):
        bench.memory.add_region(BIG + PAGE * page, PAGE)


def add_before_rom(bench: Bench) -> None:
    bench.memory.add_region(ROM - PAGE, PAGE)


def tables(where: Where) -> Iterator[Defect]:
    shape, same = Bench.tabled, segments(*LEGAL)
    denied = Where(packed=where.packed, features=0)
    yield Defect("I01", "not negotiated", shape, nothing, broken("IndirectNotNegotiated"), denied)
    row = "P15" if where.packed else "I02"
    yield Defect(row, "INDIRECT and NEXT", shape, flag(NEXT), broken("IndirectAndNext"), where)

    bad = broken("IndirectBadLen")
    yield Defect("P16" if where.packed else "I06", "0 bytes", shape, put("desc.len", 0), bad, where)
    for length in (1, 15, 17, 31, 56):
        yield Defect("I07", f"{length} bytes", shape, put("desc.len", length), bad, where)
    floor = Where(packed=where.packed, indirect_remainder=True)
    yield Defect("I07", "56 bytes allowed", shape, put("desc.len", 56), accepted(), floor, same)
    yield Defect("I07", "15 bytes allowed", shape, put("desc.len", 15), bad, floor)

    long = broken("IndirectTooLong")
    yield Defect("I08", "8 entries", lambda bench: bench.table_of(8), nothing, accepted(), where)
    yield Defect("I08", "9 entries", lambda bench: bench.table_of(9), nothing, only_strict("IndirectTooLong"), where)
    yield Defect(
        "I08", "1024 entries", lambda bench: bench.table_of(1024), nothing, only_strict("IndirectTooLong"), where
    )
    yield Defect("I08", "1025 entries", lambda bench: bench.table_of(1025), nothing, long, where)
    limit = Where(packed=where.packed, max_indirect=1025)
    yield Defect("I08", "1025 entries allowed", lambda bench: bench.table_of(1025), nothing, accepted(), limit)
    yield Defect("I08", "1026 entries", lambda bench: bench.table_of(1026), nothing, long, limit)
    for count in (65535, 65536, 0x0FFF_FFFF):
        yield Defect("I08", f"{count} entries", shape, put("desc.len", 16 * count), long, where)

    for place in (TABLE + 1, TABLE + 8, TABLE + 15, EDGE - 20):
        yield Defect("I10", f"table at {place:#x}", shape, move_table(place), accepted(), where, same)
    for name, address in (("unmapped", HOLE), ("partly unmapped", HOLE - 40), ("wraps", 2**64 - 16)):
        yield Defect("I11", f"table {name}", shape, put("desc.addr", address), broken("IndirectUnmapped"), where)
    yield Defect("I16", "WRITE on INDIRECT", shape, flag(W), accepted(), where, same)
    yield Defect("I17", "table in its own buffer", table_in_itself, nothing, accepted(), where)
    yield Defect("I17", "table in the ring", shape, table_in_ring, accepted(), where, segments(LEGAL[2]))


def move_table(place: int) -> Step:
    return every(lambda bench: bench.memory.copy(place, TABLE, 48), put("desc.addr", place))


def table_in_itself(bench: Bench) -> None:
    bench.add(table=((TABLE, 16, False), (TABLE, 16, True)))


def table_in_ring(bench: Bench) -> None:
    """The last entry of the table, copied to an unused descriptor, is the table."""
    place = bench.at("desc.addr", 4)
    bench.memory.copy(place, bench.table.at("desc.addr", 2), 16)
    bench.put("desc.addr", place)
    bench.put("desc.len", 16)


def linked_tables() -> Iterator[Defect]:
    """What only a split ring's tables have: links."""
    shape, nested = Bench.tabled, broken("NestedIndirect")
    yield Defect("I03", "INDIRECT inside", shape, entry("desc.flags", INDIRECT | NEXT, 1), nested)
    yield Defect("I03", "INDIRECT at the end", shape, entry("desc.flags", INDIRECT, 2), nested)
    two = every(buffer(0, TABLE, 32), flag(INDIRECT))
    yield Defect("I05", "two INDIRECT in a chain", Bench.mixed, two, broken("IndirectAndNext"))
    # 5 is a descriptor of the ring, but none of this table.
    for link in (3, 5, 0xFFFF):
        yield Defect("I12", f"next {link:#x}", shape, entry("desc.next", link, 1), broken("NextOutOfRange"))
    for link in (0, 1):
        yield Defect("I13", f"loop to {link}", shape, entry("desc.next", link, 1), broken("ChainTooLong"))
    first = segments(LEGAL[0])
    yield Defect("I15", "entries behind the last", shape, entry("desc.flags", 0), accepted(), Where(), first)
    yield Defect("I18", "INDIRECT in the last one", one_entry, move_head, accepted(), Where(), segments(LEGAL[2]))
    foreign = every(*(every(entry("desc.flags", 1, i), entry("desc.next", 0x80, i)) for i in range(3)))
    yield Defect("I21", "a packed table", shape, foreign, broken("NextOutOfRange"))


def one_entry(bench: Bench) -> None:
    bench.add(table=(LEGAL[2],))


def move_head(bench: Bench) -> None:
    bench.memory.copy(bench.at("desc.addr", 7), bench.at("desc.addr"), 16)
    bench.put("avail.ring", 7)


BUFFERS = [
    defect
    for where in (Where(), Where(packed=True))
    for table in (lengths, addresses, tables)
    for defect in table(where)
] + [*linked_tables()]

"""Section 2.5 of the catalogue: the packed ring, as far as a single change of a legal ring goes."""

from __future__ import annotations

from collections.abc import Iterator

from tests.property.bench import AVAIL, INDIRECT, NEXT, TABLE, USED, WRITE, Bench, W
from tests.property.catalogue.buffers import LEGAL
from tests.property.catalogue.defect import (
    Defect,
    Refused,
    Step,
    Where,
    accepted,
    broken,
    entry,
    every,
    flag,
    nothing,
    only_strict,
    put,
    segments,
    unflag,
)

PACKED_RING = Where(packed=True)
S = Bench.single


def availability(here: Where) -> Iterator[Defect]:
    none = accepted(0)
    yield Defect("P01", "fresh ring", nothing, nothing, none, here)
    yield Defect("P02", "AVAIL and USED", S, put("desc.flags", AVAIL | USED | W), none, here)
    yield Defect("P02", "neither AVAIL nor USED", S, put("desc.flags", W), none, here)
    yield Defect("P03", "the lap before", S, put("desc.flags", USED | W), none, here)
    later = Where(packed=True, start=0)
    yield Defect("P03", "the lap before, wrap 0", S, put("desc.flags", AVAIL | W), none, later)
    for index in (1, 2):
        partly = broken("ChainNotAvail")
        yield Defect("P04", f"{index} unavailable", Bench.direct, unflag(AVAIL, index), partly, here)
        yield Defect("P04", f"{index} used", Bench.direct, flag(USED, index), partly, here)
    yield Defect("P05", "NEXT in all", Bench.readers, flag(NEXT, 7), broken("ChainTooLong"), here)
    yield Defect("P05", "NEXT in the only one", S, flag(NEXT), broken("ChainTooLong"), Where(packed=True, size=1))
    for identity in (8, 0x7FFF, 0xFFFF):
        yield Defect("P06", f"id {identity:#x}", S, put("desc.id", identity), accepted(), here)
    again = only_strict("IdInFlight", after=1, interop=2)
    yield Defect("P07", "one id twice", two_singles, put("desc.id", 0, 1), again, here)
    flipped = every(lambda bench: bench.queue.has_work(), put("desc.flags", W))
    yield Defect("P26", "unavailable after a look", S, flipped, none, here)


def two_singles(bench: Bench) -> None:
    for at in (0, 64):
        bench.add((WRITE + at, 32, True))


def rings() -> Iterator[Defect]:
    """Shapes that are legal and easily got wrong."""
    for wrap in (0, 1):
        crossing = Where(packed=True, start=6 | wrap << 15)
        check = segments(*LEGAL)
        yield Defect("P09", f"across the end, wrap {wrap}", Bench.direct, nothing, accepted(), crossing, check)
        last = Where(packed=True, start=7 | wrap << 15)
        yield Defect("P09", f"whole ring from its end, wrap {wrap}", Bench.readers, nothing, accepted(), last)
    for size in (1, 2, 3, 5, 7, 255, 257):
        row = "P12" if size == 1 else "P11"
        for wrap in (0, 1):
            odd = Where(packed=True, size=size, start=(size - 1) | wrap << 15)
            yield Defect(row, f"full, size {size}, wrap {wrap}", Bench.full, nothing, accepted(size), odd)


def lists(here: Where) -> Iterator[Defect]:
    reserved = 0xFFFF & ~(W | INDIRECT)
    junk = every(*(every(flags_of_entry(reserved, i), entry("desc.id", 0xABCD, i)) for i in range(3)))
    yield Defect("P14", "reserved bits in a table", Bench.tabled, junk, accepted(), here, segments(*LEGAL))
    nested = flags_of_entry(INDIRECT, 1)
    outcome = only_strict("NestedIndirect")
    yield Defect("P14", "INDIRECT in a table", Bench.tabled, nested, outcome, here, segments(*LEGAL))
    for index in (1, 2):
        behind = every(put("desc.addr", TABLE, index), put("desc.len", 16, index), flag(INDIRECT, index))
        # The last one has no NEXT; what is wrong is only that others come before it.
        yield Defect("P15", f"INDIRECT in {index}", Bench.direct, behind, broken("IndirectAfterDirect"), here)
    for change, name in ((flag(W), "W R W"), (every(flag(W, 1), unflag(W, 2)), "R W R")):
        yield Defect("P29", name, Bench.direct, change, broken("OutOfOrder"), here)
        yield Defect("P29", f"{name} allowed", Bench.direct, change, accepted(), Where(packed=True, mixed_order=True))

    # The driver goes on into the next lap while everything of this one is in flight.
    lap = every(Bench.drain, put("desc.flags", USED | W))
    yield Defect("P24", "a slot of the next lap", Bench.full, lap, broken("TooManyInFlight", after=8), here)
    replay = every(Bench.pop, put("desc.flags", AVAIL | W))
    yield Defect("P24", "the slot before again", S, replay, accepted(), here)


def flags_of_entry(bits: int, index: int) -> Step:
    def change(bench: Bench) -> None:
        at, (_, width, _, _) = bench.table.at("desc.flags", index), bench.table.fields()["desc.flags"]
        flags = int.from_bytes(bench.memory.read(at, width), "little") | bits
        bench.entry("desc.flags", flags, index)

    return change


PACKED = [*availability(PACKED_RING), *rings(), *lists(PACKED_RING)]

REFUSED = [
    Refused("P13", "size 0", "QueueSizeZero", {"size": 0}, packed=True),
    Refused("P13", "size 32769", "QueueSizeTooBig", {"size": 32769}, packed=True),
    Refused("P13", "size 65535", "QueueSizeTooBig", {"size": 65535}, packed=True),
    Refused("P13", "split size 0", "QueueSizeZero", {"size": 0}),
    Refused("P13", "split size 3", "QueueSizeNotPowerOfTwo", {"size": 3}),
    Refused("P13", "split size 65536", "QueueSizeTooBig", {"size": 65536}),
    *(
        Refused("P32", f"{avail:#x} {used:#x}", "StateOutOfRange", {}, packed=True, state=(avail, used))
        for avail, used in ((8, 0), (0, 8), (0x8008, 0x8000), (0x8000, 0x8008), (0xFFFF, 0x8000), (0x7FFF, 0x7FFF))
    ),
    *(
        Refused("P32", f"split {avail:#x} {used:#x}", "StateOutOfRange", {}, state=(avail, used))
        for avail, used in ((9, 0), (0, 1), (0x8000, 0))
    ),
]

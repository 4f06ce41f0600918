"""Sections 2.1 (available ring and heads) and 2.2 (walking) of the catalogue: the split ring."""

from __future__ import annotations

from collections.abc import Iterator

from virtio_test._core import DeviceQueue, DriverQueue

from tests.property.bench import HOLE, NEXT, READ_A, RING, ROM, Bench, W
from tests.property.catalogue.defect import (
    Defect,
    Outcome,
    Outcomes,
    Refused,
    Where,
    accepted,
    broken,
    every,
    flag,
    nothing,
    only_strict,
    put,
    unflag,
)

S = Bench.single


def heads() -> Iterator[Defect]:
    for ahead in (9, 12, 0x8000, 0xFFFF):
        yield Defect("A01", f"{ahead:#x} ahead", S, put("avail.idx", ahead), broken("AvailIdxTooFar"))
    yield Defect("A02", "size ahead", Bench.full, nothing, accepted(8))
    yield Defect("A03", "avail.idx wraps", Bench.full, nothing, accepted(32), Where(size=32, start=0xFFF0))
    for head in (8, 9, 0x7FFF, 0x8000, 0xFFFF):
        yield Defect("A04", f"head {head:#x}", S, put("avail.ring", head), broken("HeadOutOfRange"))

    again = every(put("avail.ring", 0, 1), put("avail.idx", 2))
    yield Defect("A05", "one head twice", S, again, only_strict("HeadInFlight", after=1, interop=2))
    same = every(*(put("avail.ring", 0, slot) for slot in range(8)), put("avail.idx", 8))
    yield Defect("A06", "one head in all slots", S, same, only_strict("HeadInFlight", after=1, interop=8))
    yield Defect("A07", "chains that share", Bench.pair, put("desc.next", 1, 2), accepted(2))
    yield Defect("A08", "reserved avail.flags", S, put("avail.flags", 0xFFFE), accepted())

    for idx in (99, 0):
        back = put("avail.idx", idx)
        yield Defect("A09", f"idx back to {idx}", S, back, broken("AvailIdxTooFar"), Where(start=100))
    # What was published when avail.idx was read stays published. Strict reads it again for each pop.
    partly = every(Bench.pop, put("avail.idx", 2))
    outcomes = Outcomes(Outcome(5, "AvailIdxTooFar"), Outcome(1, "AvailIdxDecreased"))
    yield Defect("A09", "idx partly back", Bench.several, partly, outcomes)
    looked = every(lambda bench: bench.queue.has_work(), put("avail.idx", 0))
    outcomes = Outcomes(Outcome(1, "AvailIdxTooFar"), Outcome(0, "AvailIdxDecreased"))
    yield Defect("A10", "idx back after a look", S, looked, outcomes)

    gone = every(lambda bench: bench.queue, lambda bench: bench.memory.remove_region(RING, 1 << 16))
    yield Defect("A13", "ring unmapped after enable", S, gone, broken("RingUnmapped"))
    garbage = every(put("used.idx", 0x1234), *(put("used.ring.id", 0xDEADBEEF, slot) for slot in range(8)))
    yield Defect("A14", "garbage in the used ring", Bench.pair, garbage, accepted(2))


def chains() -> Iterator[Defect]:
    loop = broken("ChainTooLong")
    for index in (0, 1):
        for link in (8, 0xFFFF):
            far = put("desc.next", link, index)
            yield Defect("C01", f"next {link:#x} in {index}", Bench.direct, far, broken("NextOutOfRange"))
        yield Defect("C02", f"{index} links itself", Bench.direct, put("desc.next", index, index), loop)
    yield Defect("C02", "a writable one links itself", S, every(flag(NEXT), put("desc.next", 0)), loop)
    yield Defect("C03", "a cycle of two", Bench.direct, put("desc.next", 0, 1), loop)
    for link, name in ((0, "all"), (3, "some, without the head")):
        yield Defect("C03", f"a cycle of {name}", Bench.readers, every(flag(NEXT, 7), put("desc.next", link, 7)), loop)
    yield Defect("C04", "a chain of size", Bench.readers, nothing, accepted())
    yield Defect("C05", "a chain of size + 1", longer_by_its_table, nothing, only_strict("ChainTooLong"))
    yield Defect("C06", "next without NEXT", Bench.direct, put("desc.next", 0xFFFF, 2), accepted())
    for change, name in ((flag(W), "W R W"), (every(flag(W, 1), unflag(W, 2)), "R W R")):
        yield Defect("C07", name, Bench.direct, change, broken("OutOfOrder"))
        yield Defect("C07", f"{name} allowed", Bench.direct, change, accepted(), Where(mixed_order=True))
    unknown = every(*(flag(0xFFF8, index) for index in range(3)))
    yield Defect("C09", "unknown flags", Bench.direct, unknown, accepted())


def longer_by_its_table(bench: Bench) -> None:
    byte = (READ_A, 1, False)
    bench.add(byte, table=(byte,) * 8)


SPLIT = [*heads(), *chains()]

REFUSED = [
    *(
        Refused("A13", f"{area} {name}", "RingUnmapped", {area: address})
        for area in ("desc", "driver", "device")
        for name, address in (("unmapped", 0x9000_0000), ("partly unmapped", HOLE - 16), ("wraps", 2**64 - 16))
    ),
    Refused("A13", "used ring read-only", "RingUnmapped", {"device": ROM}, ends=(DeviceQueue,)),
    Refused("A13", "descriptor table read-only", "RingUnmapped", {"desc": ROM}, ends=(DriverQueue,)),
    Refused("A13", "avail ring read-only", "RingUnmapped", {"driver": ROM}, ends=(DriverQueue,)),
    *(Refused("C11", f"desc {by} beside", "RingMisaligned", {"desc": RING + by}) for by in range(1, 16)),
    Refused("C11", "avail ring beside", "RingMisaligned", {"driver": RING + 0x101}),
    *(Refused("C11", f"used ring {by} beside", "RingMisaligned", {"device": RING + 0x200 + by}) for by in (1, 2, 3)),
]

"""Sections 2.1 (available ring and heads) and 2.2 (walking) of the catalogue: the split ring."""

from __future__ import annotations

from functools import cache

from virtio_test.strategies.acts import Buffer, Look, Pop, Push, Put, Unmap
from virtio_test.strategies.case import EDGE, LOW, Outcome, RingCase
from virtio_test.strategies.draft import INDIRECT, NEXT, READ_A, TABLES, TAKES, Draft, direct, single
from virtio_test.strategies.draw import Draw

from .registry import row


@cache
def singles(count: int, *, writable: bool = True) -> tuple[Buffer, ...]:
    """As many chains of one descriptor."""
    spans = [((TAKES if writable else READ_A) + 64 * number, 32) for number in range(count)]
    return tuple([Buffer((), (span,)) if writable else Buffer((span,)) for span in spans])


@cache
def readers(count: int) -> Buffer:
    """One chain of that many device-readable bytes."""
    return Buffer(tuple((READ_A + number, 1) for number in range(count)))


@row("A01")
def idx_too_far(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False)
    ahead = draw.choice((draft.size + 1, draft.size + 4, 0x8000, 0xFFFF, draw.integer(draft.size + 1, 0xFFFF)))
    draft.put("avail.idx", draft.start + ahead & 0xFFFF)
    # Nobody gets as far as the first of them: the index is judged before anything else is read.
    return draft.case(f"{ahead:#x} ahead", *[Outcome(0, "AvailIdxTooFar", segments=())] * 2)


@row("A02")
def idx_of_a_full_ring(draw: Draw) -> RingCase:
    return Draft(draw, singles(8), packed=False, size=8, alone=True).accepted("size ahead")


@row("A03")
def idx_wraps(draw: Draw) -> RingCase:
    start = draw.choice((0xFFF0, 0xFFFF, draw.integer(0xFFE1, 0xFFFF)))
    return Draft(draw, singles(32), packed=False, size=32, start=start, alone=True).accepted(f"from {start:#x}")


@row("A04")
def head_out_of_range(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False)
    head = draw.choice((draft.size, draft.size + 1, 0x7FFF, 0x8000, 0xFFFF, draw.integer(draft.size, 0xFFFF)))
    draft.put("avail.ring", head, draft.slot())
    return draft.broken(f"head {head:#x}", "HeadOutOfRange")


@row("A05")
def head_twice(draw: Draw) -> RingCase:
    draft = Draft(draw, singles(2), packed=False)
    draft.put("avail.ring", draft.head, draft.slot(1))
    draft.segments(*draft.view.segments, number=1)
    return draft.only_strict("one head twice", "HeadInFlight", after=1)


@row("A06")
def head_everywhere(draw: Draw) -> RingCase:
    draft = Draft(draw, singles(8), packed=False, size=8, alone=True)
    for number in range(8):
        draft.put("avail.ring", 0, draft.slot(number))
        draft.segments(*draft.view.segments, number=number)
    return draft.only_strict("one head in all slots", "HeadInFlight", after=1)


@row("A07")
def shared_descriptors(draw: Draw) -> RingCase:
    pair = [Buffer(((READ_A + at, 16),), ((TAKES + at, 32),)) for at in (0, 64)]
    draft = Draft(draw, pair, packed=False)
    draft.put("desc.next", draft.place(1), draft.place(2))
    draft.segments(pair[1].segments[0], pair[0].segments[1], number=1)
    return draft.accepted("chains that share")


@row("A08")
def reserved_avail_flags(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False)
    flags = draw.choice((0xFFFE, 0xFFFF, draw.integer(2, 0xFFFE)))
    draft.put("avail.flags", flags)
    return draft.accepted(f"avail.flags {flags:#x}")


@row("A09")
def idx_back(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False)
    back = draw.choice((1, 100, draw.integer(1, 0x10000 - draft.size - 1)))
    draft.put("avail.idx", draft.start - back & 0xFFFF)
    return draft.case(f"idx back by {back}", *[Outcome(0, "AvailIdxTooFar", segments=())] * 2)


@row("A09")
def idx_partly_back(draw: Draw) -> RingCase:
    """What was published when avail.idx was read stays published. Strict reads it again for each pop."""
    draft = Draft(draw, singles(5), packed=False, alone=True)
    back = draw.integer(1, 4)
    draft.later += [Pop(), Put("avail.idx", draft.start + 5 - back & 0xFFFF)]
    kept = draft.handed()
    interop = Outcome(5, "AvailIdxTooFar", segments=kept)
    return draft.case(f"idx back by {back} of 5", interop, Outcome(1, "AvailIdxDecreased", segments=kept[:1]))


@row("A10")
def idx_back_after_a_look(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False, alone=True)
    draft.later += [Look(), Put("avail.idx", draft.start)]
    interop = Outcome(1, "AvailIdxTooFar", segments=draft.handed())
    return draft.case("idx back after a look", interop, Outcome(0, "AvailIdxDecreased", segments=()))


@row("A13")
def ring_unmapped(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=draw.choice((False, True)))
    draft.later.append(Unmap(LOW, EDGE))
    return draft.case("unmapped after it was built", *[Outcome(0, "RingUnmapped", segments=())] * 2)


@row("A14")
def garbage_in_the_used_ring(draw: Draw) -> RingCase:
    draft = Draft(draw, singles(2), packed=False)
    draft.put("used.idx", draw.choice((0x1234, 0xFFFF, draw.integer(0, 0xFFFF))))
    for slot in range(draft.size):
        draft.put("used.ring.id", 0xDEADBEEF, slot)
    return draft.accepted("garbage in the used ring")


@row("A15")
def used_flags(draw: Draw) -> RingCase:
    draft = Draft(draw, single(draw), packed=False)
    draft.put("used.flags", draw.choice((0xFFFF, 1, draw.integer(2, 0xFFFF))))
    return draft.accepted("used.flags")


# ------------------------------------------------------------------------------------------------------------- walking


@row("C01")
def next_out_of_range(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=False)
    index = draw.choice((0, 1))
    link = draw.choice((draft.size, 0xFFFF, draw.integer(draft.size, 0xFFFF)))
    draft.desc(index, next=link)
    return draft.broken(f"next {link:#x} in {index}", "NextOutOfRange")


@row("C02")
def links_itself(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=False)
    index = draw.choice((0, 1, 2))
    draft.flip(index, add=NEXT)
    draft.desc(index, next=draft.place(index))
    return draft.broken(f"{index} links itself", "ChainTooLong")


@row("C03")
def cycle(draw: Draw) -> RingCase:
    draft = Draft(draw, readers(8), packed=False, size=8, alone=True)
    last, back = draw.choice(((7, 0), (7, 3), (7, 6), (1, 0), (4, 2)))
    draft.flip(last, add=NEXT)
    draft.desc(last, next=back)
    return draft.broken(f"a cycle from {last} to {back}", "ChainTooLong")


@row("C04")
def whole_ring(draw: Draw) -> RingCase:
    return Draft(draw, readers(8), packed=False, size=8, alone=True).accepted("a chain of size")


@row("C05")
def longer_by_its_table(draw: Draw) -> RingCase:
    """One descriptor in the ring, then a table of as many as the ring has."""
    draft = Draft(draw, readers(2), packed=False, size=8, alone=True)
    table = [(READ_A + 100 + number, 1, False) for number in range(8)]
    draft.desc(1, addr=TABLES, len=16 * len(table), flags=INDIRECT)
    for number, (address, length, _) in enumerate(table):
        draft.cell(number, addr=address, len=length, flags=NEXT * (number < 7), next=(number + 1) % 8)
    draft.segments(draft.view.segments[0], *table)
    return draft.only_strict("a chain of size + 1", "ChainTooLong")


@row("C06")
def next_without_next(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=False)
    draft.desc(2, next=draw.choice((0xFFFF, draft.size, draw.integer(0, 0xFFFF))))
    return draft.accepted("next without NEXT")


@row("C09")
def unknown_flags(draw: Draw) -> RingCase:
    draft = Draft(draw, direct(draw), packed=False)
    bits = draw.choice((0xFFF8, draw.integer(1, 0x1FFF) << 3))
    for index in range(3):
        draft.flip(index, add=bits)
    return draft.accepted(f"flags {bits:#x}")


@row("C13")
def changed_after_the_pop(draw: Draw) -> RingCase:
    """Whatever the driver makes of descriptors that were read is not looked at (T01 to T06)."""
    return overwritten(Draft(draw, direct(draw), packed=False), draw)


def overwritten(draft: Draft, draw: Draw) -> RingCase:
    """The chain in view is popped, and all that described it is written over; then it is completed."""
    draft.later.append(Pop(draft.before + 1))
    value = draw.choice((0, 0xFF, 0x7F))
    fields = {"addr": 8, "len": 4, "flags": 2, "id" if draft.packed else "next": 2}
    for index in range(1 if draft.view.indirect else 3):
        for name, width in fields.items():
            draft.later.append(Put(f"desc.{name}", int.from_bytes(bytes([value] * width)), draft.place(index)))
    if draft.view.indirect:
        for index in range(3):
            draft.later.append(Put("table.addr", int.from_bytes(bytes([value] * 8)), draft.entry(index)))
    if not draft.packed:
        draft.later.append(Put("avail.ring", 0xFFFF, draft.slot()))
    draft.later += [Push(number) for number in range(draft.before)]
    draft.later.append(Push(draft.before, draw.choice((0, 1))))
    return draft.accepted(f"all of {value:#x} after the pop")

"""Section 2.14 of the catalogue: what a device does to our driver end, in the used ring or in packed slots."""

from __future__ import annotations

from virtio_test.strategies.acts import Add, Buffer, Look, Put, Take, Use
from virtio_test.strategies.case import AVAIL, USED, Outcome, RingCase
from virtio_test.strategies.draft import READ_A, TAKES, WRITE, Draft
from virtio_test.strategies.draw import Draw

from .registry import row
from .split import singles
from .tables import either

SPARE = Buffer((), ((TAKES + 0x800, 32),))
"""A buffer that is added and not shown."""


class Back:
    """A driver end with buffers in flight, and the pen of its device."""

    def __init__(self, draw: Draw, *buffers: Buffer, packed: bool, features: int = 0) -> None:
        self.draft = Draft(draw, buffers, packed=packed, features=features | draw.some((0, 1 << 29)), alone=True)
        self.draft.more["end"] = "driver"
        self.packed, self.size = packed, self.draft.size
        self.number = 0

    def use(
        self, identity: int, length: int = 0, *, flags: int = WRITE, shown: bool = True, idx: int | None = None
    ) -> None:
        """The next used entry, with any content."""
        draft, number = self.draft, self.number
        self.number += 1
        if self.packed:
            place = draft.place(number)
            lap = (AVAIL | USED) * (draft.lap(number) == AVAIL)
            draft.later += [
                Put("desc.id", identity & 0xFFFF, place),
                Put("desc.len", length, place),
                Put("desc.flags", lap | flags, place),
            ]
            return
        slot = draft.slot(number)
        draft.later += [Put("used.ring.id", identity, slot), Put("used.ring.len", length, slot)]
        if shown:
            draft.later.append(Put("used.idx", draft.start + (number + 1 if idx is None else idx) & 0xFFFF))

    def broken(self, title: str, rule: str, *used: tuple[int, int]) -> RingCase:
        """The rule is found broken behind these."""
        found = Outcome(len(used), rule, used=used)
        return self.draft.case(title, found, found)

    def accepted(
        self, title: str, *used: tuple[int, int], strict: tuple[tuple[int, int], ...] | None = None
    ) -> RingCase:
        """These come back, and no rule is broken; under strict, where it differs, those."""
        strict = used if strict is None else strict
        return self.draft.case(title, Outcome(len(used), used=used), Outcome(len(strict), used=strict))


@row("G01")
def id_out_of_range(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1), packed=either(draw))
    top = 0xFFFF if back.packed else 0xFFFF_FFFF
    identity = draw.choice((back.size, 0x7FFF, 0xFFFF, top, draw.integer(back.size, top)))
    back.use(identity)
    return back.broken(f"id {identity:#x}", "UsedIdOutOfRange")


@row("G02")
def id_of_nothing(draw: Draw) -> RingCase:
    back = Back(draw, *singles(2), packed=either(draw))
    identity = draw.choice((back.size - 1, 2, draw.integer(2, back.size - 1)))
    back.use(identity)
    return back.broken(f"id {identity} of nothing", "UsedIdNotInFlight")


@row("G02")
def id_of_the_middle(draw: Draw) -> RingCase:
    chain = Buffer(((READ_A, 1), (READ_A + 8, 1)), ((TAKES, 1),))
    back = Back(draw, chain, packed=either(draw))
    identity = draw.choice((1, 2))
    back.use(identity)
    return back.broken(f"id {identity} of the middle", "UsedIdNotInFlight")


@row("G02")
def id_of_what_was_not_shown(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1), packed=either(draw))
    back.draft.later.append(Add(SPARE))
    back.use(1)
    return back.broken("id of what was not shown", "UsedIdNotInFlight")


@row("G04")
def longer_than_the_buffer(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1, writable=draw.choice((True, False))), packed=either(draw))
    room = 32 if back.draft.view.writable else 0
    length = draw.choice((room + 1, 1 << 31, 0xFFFF_FFFF, draw.integer(room + 1, 0xFFFF_FFFF)))
    back.use(0, length)
    return back.broken(f"{length} bytes in {room}", "UsedLenTooBig")


@row("G04")
def clamped(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1), packed=either(draw))
    back.draft.more["switches"] = {"used_len_beyond": True}
    back.use(0, draw.choice((33, 0xFFFF_FFFF)))
    return back.accepted("clamped", (0, 32))


@row("G05")
def idx_ahead(draw: Draw) -> RingCase:
    """2 in flight, so 0, 1 and 2 are all that used.idx can be."""
    back = Back(draw, *singles(2), packed=False)
    idx = draw.choice((3, 9, 0x7FFF, draw.integer(3, 0x7FFF)))
    back.use(0, idx=idx)
    return back.broken(f"used.idx {idx:#x} ahead", "UsedIdxTooFar")


@row("G05")
def idx_of_what_was_not_shown(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1), packed=False)
    back.draft.later.append(Add(SPARE))
    back.use(0, idx=2)
    return back.broken("used.idx of what was not shown", "UsedIdxTooFar")


@row("G06")
def idx_back(draw: Draw) -> RingCase:
    back = Back(draw, *singles(2), packed=False)
    idx = draw.choice((0xFFFF, 0x8000, draw.integer(0x8000, 0xFFFF)))
    back.use(0, idx=idx)
    return back.broken(f"used.idx back by {0x10000 - idx}", "UsedIdxTooFar")


@row("G06")
def idx_back_after_some(draw: Draw) -> RingCase:
    back = Back(draw, *singles(3), packed=False)
    back.draft.later += [Use(0, 5), Take(), Put("used.idx", back.draft.start)]
    return back.broken("used.idx back to where it was", "UsedIdxTooFar", (0, 5))


@row("G08")
def one_id_twice(draw: Draw) -> RingCase:
    back = Back(draw, *singles(2), packed=either(draw))
    back.use(0, 1)
    back.use(0, 1)
    return back.broken("one id twice", "UsedIdNotInFlight", (0, 1))


@row("G08")
def one_id_twice_in_order(draw: Draw) -> RingCase:
    """IN_ORDER: an entry stands for all up to it, so the same once more stands for nothing."""
    back = Back(draw, *singles(4), packed=either(draw), features=1 << 35)
    for _ in range(2):
        back.use(1, 1, idx=back.number + 2)
        # An entry lies at the first place of its batch, and the next one behind all of them (2.7.9, 2.8.8).
        back.number += 1
    return back.broken("one id twice, in order", "UsedIdNotInFlight", (0, 32), (1, 1))


@row("G09")
def nothing_used(draw: Draw) -> RingCase:
    back = Back(draw, *singles(1), packed=either(draw))
    back.draft.later += [Look(), Take(), Look(), Use(0, 3), Take(), Look(), Take()]
    return back.accepted("looks for nothing", (0, 3))


@row("G10")
def garbage_in_the_suppression_fields(draw: Draw) -> RingCase:
    back = Back(draw, *singles(2), packed=either(draw))
    names = ("device_event.off_wrap", "device_event.flags") if back.packed else ("avail_event", "used.flags")
    for name in names:
        back.draft.later.append(Put(name, draw.choice((0xFFFF, 0, draw.integer(0, 0xFFFF)))))
    back.draft.later += [Use(0, 2), Take(), Add(SPARE), Use(1, 1)]
    return back.accepted("garbage", (0, 2), (1, 1))


@row("G11")
def not_used(draw: Draw) -> RingCase:
    """AVAIL unlike USED, or both of the lap before: nothing has come back."""
    back = Back(draw, *singles(1), packed=True)
    other = (AVAIL | USED) * (back.draft.lap(0) == USED)
    flags = draw.choice((AVAIL, USED, other)) | draw.choice((0, WRITE))
    back.draft.later.append(Put("desc.flags", flags, back.draft.place(0)))
    return back.accepted(f"flags {flags:#x}")


@row("G11")
def nothing_in_flight(draw: Draw) -> RingCase:
    """A used entry of the present lap, and never a buffer: no id can be right."""
    back = Back(draw, packed=either(draw))
    back.use(0)
    return back.broken("nothing in flight", "UsedIdNotInFlight" if back.packed else "UsedIdxTooFar")


@row("P19")
def length_without_write(draw: Draw) -> RingCase:
    """2.8.4: without WRITE the length is reserved; QEMU never sets it."""
    back = Back(draw, *singles(1), packed=True)
    flags = draw.choice((0, WRITE))
    back.use(0, 7, flags=flags)
    return back.accepted(f"flags {flags}", (0, 7), strict=((0, 7 if flags else 0),))


@row("U11")
def batch_beyond_idx(draw: Draw) -> RingCase:
    """IN_ORDER: the entry names the third buffer, and used.idx says that one was used."""
    back = Back(draw, *singles(3), packed=False, features=1 << 35)
    back.use(2, 1, idx=1)
    return back.broken("a batch beyond used.idx", "UsedIdNotInFlight")


@row("U11")
def one_entry_for_a_batch(draw: Draw) -> RingCase:
    """IN_ORDER: what a batch skips counts as written whole (2.7.9, 2.8.8)."""
    back = Back(draw, *singles(4), packed=either(draw), features=1 << 35)
    last = draw.choice((1, 2, 3))
    back.use(last, 9, idx=last + 1)
    return back.accepted(f"a batch of {last + 1}", *((number, 32) for number in range(last)), (last, 9))

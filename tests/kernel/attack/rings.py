"""Attacks by rings and chains: rows of 2.1 and 2.2, in both formats where both have them."""

from __future__ import annotations

from typing import Final

from virtio_test.spec.testdevice import REQUEST

from tests.kernel.attack.case import NUMBER, Case, Chain, Machine, Writes, chain, ring
from tests.kernel.attack.driver import INDIRECT, NEXT, REQUESTS, RING, TABLE, WRITE, Queue
from tests.kernel.attack.pieces import READ, WHOLE, WRITTEN, asked, followed, joined
from tests.kernel.attack.program import At, Program

__all__ = ["CASES"]


def _heads(*heads: int, idx: int | None = None) -> Writes:
    """One request at descriptors 0 and 1, and these heads made available."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        queue.desc(p, 0, *followed(READ), 1)
        queue.desc(p, 1, *WRITTEN)
        queue.publish(p, *heads, idx=idx)

    return write


# --- 2.1: available ring and heads --------------------------------------------------------------------------


def _overtaken(p: Program, queue: Queue, _: Machine) -> None:
    """Two requests are answered, then idx goes back by one."""
    queue.ask(p, NUMBER, kicks=False)
    queue.ask(p, NUMBER, position=1)
    p.wait("both", queue.layout.at("used.idx"), 2, 2)
    p.interrupts("first", 1, 1)
    p.forget()
    queue.put(p, "avail.idx", 0, 1)


def _reserved_flags(p: Program, queue: Queue, machine: Machine) -> None:
    queue.put(p, "avail.flags", 0, 0xFFFE)
    _heads(0)(p, queue, machine)


def _shared(p: Program, queue: Queue, _: Machine) -> None:
    """Heads 0 and 1 both go on with 2."""
    asked(p)
    for head in (0, 1):
        queue.desc(p, head, *followed(READ), 2)
    queue.desc(p, 2, *WRITTEN)
    queue.publish(p, 0, 1)


def _filled_used(p: Program, queue: Queue, machine: Machine) -> None:
    """The used ring holds what no device wrote."""
    layout = queue.layout
    p.fill(layout.device, layout.device_bytes, 0xFF)
    _heads(0)(p, queue, machine)


def _full(p: Program, queue: Queue, _: Machine) -> None:
    """Every descriptor is a request of its own, in one table that they share."""
    asked(p)
    for index, entry in enumerate(WHOLE):
        queue.entry(p, index, *entry)
    for head in range(queue.size):
        queue.desc(p, head, At(TABLE), 32, INDIRECT, head if queue.packed else 0)
    queue.publish(p, *range(queue.size))


_AVAILABLE: Final = [
    *(
        each
        for idx in (9, 108, 0x8000, 0xFFFF)
        for each in ring(
            "A01" if idx != 0xFFFF else "A01 A09",
            f"idx-{idx:#x}",
            _heads(0, idx=idx),
            rules="AvailIdxTooFar",
            formats="split",
        )
    ),
    *ring("A09", "idx-back", _overtaken, rules="AvailIdxTooFar", formats="split", chains=2, before=2),
    *ring("A02", "full-ring", _full, outcome="accepted", chains=8, slot=7, answered=True),
    *(
        each
        for head in (8, 9, 0x7FFF, 0x8000, 0xFFFF)
        for each in ring("A04", f"head-{head:#x}", _heads(head), rules="HeadOutOfRange", formats="split")
    ),
    # The device answers one before it looks at the next: no head is in flight twice.
    *ring("A05", "same-head-twice", _heads(0, 0), outcome="accepted", formats="split", chains=2, answered=True),
    *ring("A06", "same-head-everywhere", _heads(*[0] * 8), outcome="accepted", formats="split", chains=8,
          answered=True),
    *ring("A07", "shared-descriptor", _shared, outcome="accepted", formats="split", chains=2, answered=True),
    *ring("A08", "avail-flags", _reserved_flags, outcome="accepted", formats="split", answered=True),
    *ring("A14 A15", "used-ring-filled", _filled_used, outcome="accepted", formats="split", answered=True),
]  # fmt: skip

# --- 2.2: chains --------------------------------------------------------------------------------------------


def _links(*nexts: int) -> Writes:
    """Readable descriptors of which each goes on with the next of these."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        for index, link in enumerate(nexts):
            queue.desc(p, index, *followed(READ), link)
        queue.publish(p, 0)

    return write


def _everywhere(p: Program, queue: Queue, _: Machine) -> None:
    """All descriptors of the ring have NEXT."""
    asked(p)
    for index in reversed(range(queue.size)):
        queue.desc(p, index, *followed(READ), 0 if queue.packed else (index + 1) % queue.size)
    queue.publish(p, 0)


def _stray_next(p: Program, queue: Queue, _: Machine) -> None:
    asked(p)
    queue.desc(p, 0, *followed(READ), 1)
    queue.desc(p, 1, *WRITTEN, 0xFFFF)
    queue.publish(p, 0)


def _unknown_flags(p: Program, queue: Queue, _: Machine) -> None:
    bits = 0x7F78 if queue.packed else 0xFFF8
    asked(p)
    # The id of a packed list is its last descriptor's.
    queue.desc(p, 1, *WRITTEN[:2], WRITE | bits)
    queue.desc(p, 0, *READ[:2], NEXT | bits, 0 if queue.packed else 1)
    queue.publish(p, 0)


def _split_up(parts: int) -> tuple[Chain, ...]:
    """The request in that many descriptors, and its response."""
    piece = REQUEST.size // parts
    lengths = [piece] * (parts - 1) + [REQUEST.size - piece * (parts - 1)]
    return (*((At(REQUESTS + piece * index), length, 0) for index, length in enumerate(lengths)), WRITTEN)


_WALKED: Final = [
    *ring("C01", "next-0x8", _links(8), rules="NextOutOfRange", formats="split"),
    *ring("C01", "next-0xffff", _links(0xFFFF), rules="NextOutOfRange", formats="split"),
    *ring("C01", "next-later", _links(1, 2, 0x7FFF), rules="NextOutOfRange", formats="split"),
    *ring("C02", "loop-of-one", _links(0), rules="ChainTooLong", formats="split"),
    *ring("C03", "loop-of-two", _links(1, 0), rules="ChainTooLong", formats="split"),
    *ring("C03", "loop-behind-the-head", _links(1, 2, 3, 1), rules="ChainTooLong", formats="split"),
    *ring("C03 C05 P05", "next-everywhere", _everywhere, rules="ChainTooLong"),
    *ring("C04", "as-long-as-the-queue", joined(*_split_up(7)), outcome="accepted", answered=True),
    *ring("C06", "next-without-NEXT", _stray_next, outcome="accepted", formats="split", answered=True),
    *ring("C07 P29", "W-R", joined(WRITTEN, READ), rules="OutOfOrder"),
    *ring("C07 P29", "R-W-R", joined(READ, WRITTEN, READ), rules="OutOfOrder"),
    *ring("C07 P29", "W-R-W", joined(WRITTEN, READ, WRITTEN), rules="OutOfOrder"),
    *ring("C08 B19", "only-writable", joined(WRITTEN), outcome="completed0"),
    *ring("C08", "only-readable", joined(READ), outcome="completed0"),
    *ring(
        "C12 Q10", "driver-area-in-the-ring", joined(READ, WRITTEN), outcome="accepted", answered=True,
        queue=Queue(places={"driver": At(RING + 64)}),
    ),
    *ring("C09", "unknown-flags", _unknown_flags, outcome="accepted", answered=True),
    *(
        each
        for desc in (1, 8, 15)
        for each in ring(
            "C11 Q08", f"desc-at-{desc}", chain(READ), rules="RingMisaligned", formats="split",
            queue=Queue(places={"desc": At(RING + desc)}), told=False,
        )
    ),
]  # fmt: skip

CASES: Final[list[Case]] = [*_AVAILABLE, *_WALKED]

"""Attacks by indirect tables: rows of 2.4, with what 2.5 has of them."""

from __future__ import annotations

from typing import Final

from tests.kernel.attack.case import Case, Chain, Machine, Writes, ring
from tests.kernel.attack.driver import BASIC, INDIRECT, NEXT, REQUESTS, TABLE, WRITE, Queue
from tests.kernel.attack.pieces import NOWHERE, READ, WHOLE, WRITTEN, asked, followed, joined
from tests.kernel.attack.program import At, FromEnd, Program, Value

__all__ = ["CASES"]

_HERE: Final = At(TABLE)


def _with_table(
    *entries: tuple[Value, int, int, int],
    head: int = 0,
    flags: int = INDIRECT,
    length: int | None = None,
    address: Value = _HERE,
    after: tuple[Chain, ...] = (),
) -> Writes:
    """One descriptor that is a table of (address, length, flags, next), then others."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        for index, (where, size, bits, link) in enumerate(entries):
            queue.entry(p, index, where, size, bits, link)
        for index, (where, size, bits) in reversed(list(enumerate(after, head + 1))):
            queue.desc(p, index, where, size, bits)
        queue.desc(p, head, address, 16 * len(entries) if length is None else length, flags, flags & NEXT)
        queue.publish(p, head)

    return write


def _bytewise(count: int) -> tuple[tuple[Value, int, int, int], ...]:
    """A request in a table of that many entries, one byte each as far as they last."""
    readable = count - 1
    entries = [(At(REQUESTS + index), 1, NEXT, index + 1) for index in range(readable)]
    return (*entries, (*WRITTEN, 0))


def _strange_ids(p: Program, queue: Queue, _: Machine) -> None:
    """A packed table whose ids and whose flags but WRITE mean nothing."""
    asked(p)
    queue.entry(p, 0, *READ[:2], NEXT | 0x8080, 0xFFFF)
    queue.entry(p, 1, *WRITTEN[:2], WRITE | 0x80 | NEXT, 0x1234)
    queue.desc(p, 0, _HERE, 32, INDIRECT)


def _in_the_ring(p: Program, queue: Queue, _: Machine) -> None:
    """The table lies in descriptors 4 and 5 of the ring itself; of a packed ring those are not available."""
    asked(p)
    flip = 0x80 if queue.packed else 0
    queue.desc(p, 4, *followed(READ)[:2], NEXT ^ flip, 1)
    queue.desc(p, 5, *WRITTEN[:2], WRITE ^ flip)
    queue.desc(p, 0, At(queue.layout.at("desc.addr", 4)), 32, INDIRECT)
    queue.publish(p, 0)


def _behind(p: Program, queue: Queue, _: Machine) -> None:
    """A split chain may end in a table (2.7.5.3.2)."""
    asked(p)
    queue.entry(p, 0, *WRITTEN)
    queue.desc(p, 0, *followed(READ), 1)
    queue.desc(p, 1, _HERE, 16, INDIRECT)
    queue.publish(p, 0)


def _packed_in_split(p: Program, queue: Queue, _: Machine) -> None:
    """Entries as a packed ring has them: where the split one has flags is an id, where it has next are flags."""
    asked(p)
    queue.entry(p, 0, *READ[:2], NEXT, 0x80)
    queue.entry(p, 1, *WRITTEN[:2], 1, WRITE | 0x80)
    queue.desc(p, 0, _HERE, 32, INDIRECT)
    queue.publish(p, 0)


def _unaligned(p: Program, queue: Queue, _: Machine) -> None:
    """The table begins at an odd address."""
    asked(p)
    for index, entry in enumerate(WHOLE):
        queue.entry(p, index, *entry, at=TABLE + 1)
    queue.desc(p, 0, At(TABLE + 1), 32, INDIRECT)
    queue.publish(p, 0)


def _partly(p: Program, queue: Queue, _: Machine) -> None:
    """The table begins in memory and ends behind it."""
    queue.desc(p, 0, FromEnd(-16), 32, INDIRECT)
    queue.publish(p, 0)


_PLAIN: Final = Queue(features=BASIC - BASIC.from_bits(1 << 28))
_TOO_LONG: Final = ("broken", "IndirectTooLong")

CASES: Final[list[Case]] = [
    *ring("I01", "not-negotiated", _with_table(*WHOLE), rules="IndirectNotNegotiated", queue=_PLAIN),
    *ring(
        "I02 P15 P18 CVE-2026-16457", "with-NEXT", _with_table(*WHOLE, flags=INDIRECT | NEXT, after=(WRITTEN,)),
        rules="IndirectAndNext",
    ),
    *ring(
        "I05 P15", "two-tables", _with_table(*WHOLE, flags=INDIRECT | NEXT, after=((_HERE, 32, INDIRECT),)),
        rules="IndirectAndNext",
    ),
    *ring("P15 P18", "behind-direct", joined(READ, (_HERE, 32, INDIRECT)), rules="IndirectAfterDirect",
          formats="packed"),
    *ring("I15", "behind-direct", _behind, outcome="accepted", formats="split", answered=True),
    *ring("I03", "nested", _with_table((_HERE, 16, INDIRECT, 0)), rules="NestedIndirect", formats="split"),
    *ring(
        "I03 P14", "nested", _with_table((At(REQUESTS), 48, INDIRECT, 0), (*WRITTEN, 0)), outcome="accepted",
        strict=("broken", "NestedIndirect"), formats="packed", answered=True,
    ),
    *(
        each
        for length in (0, 1, 15, 17, 31, 40)
        for each in ring(
            "I06 P16" if length == 0 else "I07", f"table-of-{length}-bytes", _with_table(*WHOLE, length=length),
            rules="IndirectBadLen",
        )
    ),
    *ring("I08", "table-as-long-as-the-queue", _with_table(*_bytewise(64)), outcome="accepted", answered=True,
          queue=Queue(size=64)),
    *ring("I08", "table-of-one-more", _with_table(*_bytewise(65)), outcome="accepted", strict=_TOO_LONG, answered=True,
          queue=Queue(size=64)),
    *ring("I08", "table-of-1024", _with_table(*_bytewise(1024)), outcome="accepted", strict=_TOO_LONG, answered=True),
    *(
        each
        for count in (1025, 65535, 65536, 0x0FFFFFFF)
        for each in ring(
            "I08 CVE-2011-2212", f"table-of-{count:#x}", _with_table(*WHOLE, length=16 * count),
            rules="IndirectTooLong",
        )
    ),
    *ring("I11", "table-nowhere", _with_table(*WHOLE, address=NOWHERE), rules="IndirectUnmapped"),
    *ring("I11", "table-wraps", _with_table(*WHOLE, address=(1 << 64) - 16), rules="IndirectUnmapped"),
    *ring("I12", "next-beyond-the-table", _with_table((*followed(READ), 2), (*WRITTEN, 0)), rules="NextOutOfRange",
          formats="split"),
    *ring("I13", "loop-in-the-table", _with_table((*followed(READ), 1), (*followed(READ), 0)), rules="ChainTooLong",
          formats="split"),
    *ring("I15", "rest-of-the-table", _with_table(*WHOLE, (NOWHERE, 16, NEXT, 0xFFFF)), outcome="accepted",
          formats="split", answered=True),
    *ring("I16", "table-with-WRITE", _with_table(*WHOLE, flags=INDIRECT | WRITE), outcome="accepted", answered=True),
    *ring("I17", "table-in-the-ring", _in_the_ring, outcome="accepted", answered=True),
    *ring("I18", "table-at-the-last-head", _with_table(*WHOLE, head=7), outcome="accepted", formats="split",
          answered=True),
    *ring("I21", "packed-table-in-a-split-ring", _packed_in_split, rules="NextOutOfRange", formats="split"),
    *ring("P14", "table-of-strange-ids", _strange_ids, outcome="accepted", formats="packed", answered=True),
    *ring("I10", "table-unaligned", _unaligned, outcome="accepted", answered=True),
    *ring("I11", "table-partly", _partly, rules="IndirectUnmapped"),
]  # fmt: skip

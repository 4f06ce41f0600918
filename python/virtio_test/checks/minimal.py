"""The minimal rings: for each rule of rings, in each format that has it, one that breaks it and no other rule."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from .example import AVAIL, BUFFER, INDIRECT, NEXT, NOWHERE, RAM, RING, ROM, TABLE, USED, WRITE, Example, Write

__all__ = ["EXAMPLES"]

_CONFIGURED: Final = (
    ("QueueSizeZero", (False, True), {"size": 0}),
    ("QueueSizeNotPowerOfTwo", (False,), {"size": 3}),
    ("QueueSizeTooBig", (False, True), {"size": 65536}),
    ("RingMisaligned", (False, True), {"desc": RING + 8}),
    ("RingUnmapped", (False, True), {"desc": NOWHERE}),
)


def _desc(index: int, address: int, length: int, flags: int = 0, link: int = 0) -> tuple[Write, ...]:
    """A split descriptor."""
    last: tuple[Write, ...] = (("desc.next", index, link),) if flags & NEXT else ()
    return (("desc.addr", index, address), ("desc.len", index, length), ("desc.flags", index, flags), *last)


def _heads(*heads: int) -> tuple[Write, ...]:
    ring: tuple[Write, ...] = tuple(("avail.ring", slot, head) for slot, head in enumerate(heads))
    return (*ring, ("avail.idx", 0, len(heads)))


def _slot(index: int, address: int, length: int, flags: int = 0, identity: int = 0) -> tuple[Write, ...]:
    """A packed descriptor, available in the first lap."""
    return (
        ("desc.addr", index, address),
        ("desc.len", index, length),
        ("desc.id", index, identity),
        ("desc.flags", index, flags | AVAIL),
    )


def _entry(index: int, address: int, length: int, flags: int = 0, link: int = 0) -> tuple[Write, ...]:
    """An entry of an indirect table; the link counts in a split one only."""
    last: tuple[Write, ...] = (("table.next", index, link),) if flags & NEXT else ()
    return (("table.addr", index, address), ("table.len", index, length), ("table.flags", index, flags), *last)


def _used(identity: int, length: int = 0, idx: int = 1) -> tuple[Write, ...]:
    return (("used.ring.id", 0, identity), ("used.ring.len", 0, length), ("used.idx", 0, idx))


def _used_slot(identity: int, length: int = 0) -> tuple[Write, ...]:
    return (("desc.len", 0, length), ("desc.id", 0, identity), ("desc.flags", 0, AVAIL | USED | WRITE))


def _both(rule: str, *chain: tuple[int, int, int], tolerated: bool = False, indirect: bool = True) -> list[Example]:
    """One chain of (address, length, flags) that breaks the same rule in both formats."""
    split = tuple(
        each
        for index, (address, length, flags) in enumerate(chain)
        for each in _desc(index, address, length, flags, index + 1)
    )
    packed = tuple(each for index, link in enumerate(chain) for each in _slot(index, *link))
    size = 32 if len(chain) > 4 else 4
    return [
        Example(rule=rule, size=size, writes=split + _heads(0), tolerated=tolerated, indirect=indirect),
        Example(rule=rule, size=size, packed=True, writes=packed, tolerated=tolerated, indirect=indirect),
    ]


_RINGS: Final = (
    *(
        Example(rule=rule, packed=packed, config=changes)
        for rule, formats, changes in _CONFIGURED
        for packed in formats
    ),
    Example(rule="StateOutOfRange", state=(5, 0)),
    Example(rule="StateOutOfRange", packed=True, state=(4 | 1 << 15, 1 << 15)),
    Example(rule="AvailIdxTooFar", writes=(("avail.idx", 0, 5),)),
    Example(
        rule="AvailIdxDecreased",
        writes=_desc(0, BUFFER, 16) + _desc(1, BUFFER, 16) + _heads(0, 1),
        later=(("avail.idx", 0, 1),),
        pops=2,
        tolerated=True,
    ),
    Example(rule="HeadOutOfRange", writes=_heads(4)),
    Example(rule="HeadInFlight", writes=_desc(0, BUFFER, 16) + _heads(0, 0), tolerated=True),
    Example(rule="IdInFlight", packed=True, writes=_slot(0, BUFFER, 16) + _slot(1, BUFFER, 16), tolerated=True),
    Example(rule="TooManyInFlight", size=1, writes=_desc(0, BUFFER, 16) + _heads(0), later=(("avail.idx", 0, 2),)),
    Example(
        rule="TooManyInFlight",
        packed=True,
        size=1,
        writes=_slot(0, BUFFER, 16),
        later=(("desc.flags", 0, USED),),
    ),
    Example(rule="NextOutOfRange", writes=_desc(0, BUFFER, 16, NEXT, 4) + _heads(0)),
    Example(rule="ChainTooLong", writes=_desc(0, BUFFER, 16, NEXT, 0) + _heads(0)),
    Example(rule="ChainTooLong", packed=True, size=1, writes=_slot(0, BUFFER, 16, NEXT)),
    *_both("ChainTooBig", *([(0, RAM, NEXT)] * 16), (0, 1, 0)),
    Example(
        rule="ChainNotAvail",
        packed=True,
        writes=_slot(0, BUFFER, 16, NEXT),
    ),
    *_both("OutOfOrder", (BUFFER, 16, WRITE | NEXT), (BUFFER, 16, 0)),
    *_both("ZeroLength", (BUFFER, 0, 0), tolerated=True),
    *_both("UnmappedAddress", (NOWHERE, 16, 0)),
    *_both("AddressWraps", (2**64 - 8, 16, 0)),
    *_both("ReadOnlyAddress", (ROM, 16, WRITE)),
    *_both("IndirectNotNegotiated", (TABLE, 16, INDIRECT), indirect=False),
    *_both("IndirectAndNext", (TABLE, 16, INDIRECT | NEXT)),
    Example(rule="IndirectAfterDirect", packed=True, writes=_slot(0, BUFFER, 16, NEXT) + _slot(1, TABLE, 16, INDIRECT)),
    Example(
        rule="NestedIndirect",
        writes=_entry(0, BUFFER, 16, INDIRECT) + _desc(0, TABLE, 16, INDIRECT) + _heads(0),
    ),
    Example(
        rule="NestedIndirect",
        packed=True,
        writes=_entry(0, BUFFER, 16, INDIRECT) + _slot(0, TABLE, 16, INDIRECT),
        tolerated=True,
    ),
    *_both("IndirectBadLen", (TABLE, 24, INDIRECT)),
    Example(
        rule="IndirectTooLong",
        writes=_entry(0, BUFFER, 16) + _desc(0, TABLE, 5 * 16, INDIRECT) + _heads(0),
        tolerated=True,
    ),
    Example(
        rule="IndirectTooLong",
        packed=True,
        writes=tuple(each for index in range(5) for each in _entry(index, BUFFER, 16))
        + _slot(0, TABLE, 5 * 16, INDIRECT),
        tolerated=True,
    ),
    *_both("IndirectUnmapped", (NOWHERE, 16, INDIRECT)),
    Example(rule="UsedIdxTooFar", end="driver", writes=_used(0, idx=2)),
    Example(rule="UsedIdOutOfRange", end="driver", writes=_used(4)),
    Example(rule="UsedIdOutOfRange", end="driver", packed=True, writes=_used_slot(4)),
    Example(rule="UsedIdNotInFlight", end="driver", writes=_used(1)),
    Example(rule="UsedIdNotInFlight", end="driver", packed=True, writes=_used_slot(1)),
    Example(rule="UsedLenTooBig", end="driver", writes=_used(0, 17)),
    Example(rule="UsedLenTooBig", end="driver", packed=True, writes=_used_slot(0, 17)),
)


def _by_rule() -> dict[str, tuple[Example, ...]]:
    found: dict[str, tuple[Example, ...]] = {}
    for example in _RINGS:
        found[example.rule] = (*found.get(example.rule, ()), example)
    return found


EXAMPLES: Final = MappingProxyType(_by_rule())
"""Name of the rule to its rings, the split one first."""

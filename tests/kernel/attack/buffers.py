"""Attacks by the addresses and lengths of buffers: rows of 2.3."""

from __future__ import annotations

from typing import Final

from tests.kernel.attack.case import Case, Chain, Machine, Writes, ring
from tests.kernel.attack.driver import REQUESTS, RING, WRITE, Queue
from tests.kernel.attack.pieces import NOWHERE, READ, RESPONSE_AT, WRITTEN, joined
from tests.kernel.attack.program import At, FromEnd, InBar, Program

__all__ = ["CASES"]


def _into_rom(p: Program, queue: Queue, machine: Machine) -> None:
    joined(READ, (machine.rom or 0, 12, WRITE))(p, queue, machine)


def _sum(extra: int) -> Writes:
    """Readable buffers of 2**32 bytes and `extra` in all, that lie over each other."""
    whole, rest = divmod((1 << 32) + extra, _MUCH)
    links = [(FromEnd(-_MUCH), _MUCH, 0)] * whole + ([(FromEnd(-_MUCH), rest, 0)] if rest else [])
    return joined(*links)


_MUCH: Final = 48 << 20
"""Bytes at the end of memory that every guest has."""

_EMPTY: Final[Chain] = (At(REQUESTS), 0, 0)
_EMPTY_W: Final[Chain] = (RESPONSE_AT, 0, WRITE)
_ZERO: Final = ("broken", "ZeroLength")

CASES: Final[list[Case]] = [
    *ring("B01 B02 C10 P30", "empty-alone", joined(_EMPTY), outcome="completed0", strict=_ZERO),
    *ring(
        "B01 B02 P30 CVE-2016-6490 CVE-2023-5158", "empty-writable", joined(_EMPTY_W), outcome="completed0",
        strict=_ZERO,
    ),
    *ring(
        "B01 P30 CVE-2016-6490", "empty-first", joined(_EMPTY, READ, WRITTEN), outcome="accepted", strict=_ZERO,
        answered=True,
    ),
    *ring(
        "B01 P30 CVE-2023-5158", "empty-in-between", joined(READ, _EMPTY, _EMPTY_W, WRITTEN), outcome="accepted",
        strict=_ZERO, answered=True,
    ),
    *ring("B01 P30", "empty-last", joined(READ, WRITTEN, _EMPTY_W), outcome="accepted", strict=_ZERO, answered=True),
    *ring("B01 B02", "empty-all", joined(*[_EMPTY] * 4, *[_EMPTY_W] * 4), outcome="completed0", strict=_ZERO),
    *(
        each
        for address in (NOWHERE, 1 << 52, (1 << 64) - 4096)
        for each in ring("B03", f"buffer-at-{address:#x}", joined((address, 16, 0)), rules="UnmappedAddress")
    ),
    *ring("B03", "buffer-behind-others", joined(READ, WRITTEN, (NOWHERE, 16, WRITE)), rules="UnmappedAddress"),
    *ring("B04", "wraps-by-8", joined(((1 << 64) - 8, 16, 0)), rules="AddressWraps"),
    *ring("B04", "wraps-by-len", joined(((1 << 64) - 8, 0xFFFFFFFF, WRITE)), rules="AddressWraps"),
    *ring("B03 B04", "last-address", joined(((1 << 64) - 1, 1, 0)), rules="AddressWraps"),
    *ring("B05", "ends-with-memory", joined(READ, (FromEnd(-16), 16, 0), WRITTEN), outcome="accepted", answered=True),
    *ring("B06", "one-beyond-memory", joined(READ, (FromEnd(-16), 17, 0)), rules="UnmappedAddress"),
    *ring(
        "B10 CVE-2016-7422", "longest-in-the-last-page", joined((FromEnd(-4096), 0xFFFFFFFF, 0)),
        rules="UnmappedAddress",
    ),
    *ring("B09 B10", "longest-and-more", joined(READ, (FromEnd(-4096), 0xFFFFFFFF, 0)), rules="ChainTooBig"),
    *ring("B10", "longest-request", joined((At(REQUESTS), 0xFFFFFFFF, 0), WRITTEN), rules="UnmappedAddress"),
    *ring("B09", "two-to-the-32", _sum(0), outcome="completed0", queue=Queue(size=128)),
    *ring("B09", "two-to-the-32-and-one", _sum(1), rules="ChainTooBig", queue=Queue(size=128)),
    *ring(
        "B12", "response-over-descriptors", joined(READ, (At(RING + 64), 12, WRITE)), outcome="accepted",
    ),
    *ring("B12", "request-is-the-ring", joined((At(RING), 48, 0), WRITTEN), outcome="accepted"),
    *ring("B13", "request-is-response", joined(READ, (At(REQUESTS), 12, WRITE)), outcome="accepted"),
    *ring(
        "B14 CVE-2024-3446", "request-in-own-bar", joined((InBar(4), 48, 0), WRITTEN), rules="UnmappedAddress",
        needs="own_bar",
    ),
    *ring(
        "B14 CVE-2024-3446", "response-over-own-registers", joined(READ, (InBar(4, 0x3000), 12, WRITE)),
        rules="UnmappedAddress", needs="own_bar",
    ),
    *ring("B15", "response-in-rom", _into_rom, rules="ReadOnlyAddress", needs="rom"),
    *ring("B17", "address-0", joined(READ, (0, 16, 0), WRITTEN), outcome="accepted", answered=True,
          needs="low"),
    *ring("B19", "request-too-short", joined((At(REQUESTS), 47, 0), WRITTEN), outcome="completed0"),
    *ring("B19", "response-too-short", joined(READ, (RESPONSE_AT, 11, WRITE)), outcome="completed0"),
]  # fmt: skip

"""What legal traffic can look like: memory maps, rings, requests cut into descriptors, and the order of things.

A `Script` holds numbers only, no objects of either side, so any pair of ends can play it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from hypothesis import strategies as st
from virtio_test._core import Policy

from tests.property.ends import EVENT_IDX, IN_ORDER, INDIRECT_DESC, Setup, features_of
from tests.property.model import Plan, Segment

PAGE = 4096
RESERVE = (1 << 40, 1 << 20)
"""A region that is always there: for what fits nowhere else."""

SPLIT_SIZES = [1, 2, 4, 8, 16, 256, 32768]
PACKED_SIZES = [*SPLIT_SIZES, 3, 5, 7, 255, 257, 32767]
SUBSETS = st.sampled_from([0, EVENT_IDX, IN_ORDER, EVENT_IDX | IN_ORDER])
SPLIT_STARTS = [0, 1, 0x7FFF, *range(0xFFF0, 0x10000)]


@dataclass(frozen=True)
class Request:
    """One buffer: lengths of its readable and writable descriptors, and how many bytes the device answers.

    `direct` descriptors stay in the ring, the others are in an indirect table; None when there is no table.
    """

    readable: tuple[int, ...]
    writable: tuple[int, ...]
    answered: int
    direct: int | None
    backwards: bool
    junk: int
    gap: int

    def data(self, number: int) -> bytes:
        return Random(number).randbytes(sum(self.readable))

    def response(self, number: int) -> bytes:
        return Random(~number).randbytes(self.answered)


@dataclass(frozen=True)
class Round:
    """Requests that are made available together, and which of the waiting ones the device then finishes."""

    requests: tuple[Request, ...]
    finish: tuple[int, ...]


@dataclass(frozen=True)
class Script:
    """A queue, the memory around it, and what happens."""

    setup: Setup
    regions: tuple[tuple[int, int], ...]
    islands: tuple[tuple[int, int], ...]
    rounds: tuple[Round, ...]

    def place(self) -> Iterator[tuple[Request, Plan]]:
        """Every request with addresses: never two buffers at one place, many of them across region borders."""
        space = Space([*self.islands, RESERVE])
        for round_ in self.rounds:
            for request in round_.requests:
                yield request, space.plan(request)


class Space:
    """Gives out guest memory, in order and never twice."""

    def __init__(self, islands: list[tuple[int, int]]) -> None:
        self._islands = islands
        self._at = islands[0][0]

    def take(self, length: int, gap: int = 0) -> int:
        while True:
            first, size = self._islands[0]
            address = self._at + gap
            if address + length <= first + size:
                self._at = address + length
                return address
            self._islands = self._islands[1:]
            self._at = self._islands[0][0]

    def plan(self, request: Request) -> Plan:
        lengths = [(n, False) for n in request.readable] + [(n, True) for n in request.writable]
        segments = [Segment(self.take(n, request.gap), n, writable) for n, writable in lengths]
        if request.direct is None:
            return Plan(segments, junk=request.junk)
        table = segments[request.direct :]
        at = self.take(16 * len(table), request.gap)
        return Plan(segments[: request.direct], table, at, backwards=request.backwards, junk=request.junk)


@st.composite
def starts(draw: st.DrawFn, *, packed: bool, size: int) -> int:
    if not packed:
        return draw(st.sampled_from(SPLIT_STARTS))
    return draw(st.sampled_from([0, size // 2, size - 1])) | draw(st.integers(0, 1)) << 15


@st.composite
def setups(
    draw: st.DrawFn,
    *,
    packed: bool | None = None,
    sizes: list[int] | None = None,
    features: st.SearchStrategy[int] = SUBSETS,
) -> Setup:
    is_packed = draw(st.booleans()) if packed is None else packed
    size = draw(st.sampled_from(sizes or (PACKED_SIZES if is_packed else SPLIT_SIZES)))
    return Setup(
        packed=is_packed,
        size=size,
        base=draw(st.sampled_from([0, PAGE, 0xFFFF_F000])),
        start=draw(starts(packed=is_packed, size=size)),
        features=features_of(INDIRECT_DESC | draw(features), packed=is_packed),
        policy=draw(st.sampled_from([Policy.interop, Policy.strict])),
        seed=draw(st.integers(0, 3)) if size <= 256 else 0,
    )


@st.composite
def requests(draw: st.DrawFn, setup: Setup, *, plain: bool = False) -> Request:
    """Any legal request for this queue; `plain`: one that our own driver end can make as well."""
    strict = setup.policy == Policy.strict
    empty = not strict and not plain
    # Our driver end puts all of a request into a table, or nothing. A table may be longer than the queue only
    # where the policy says so.
    indirect = draw(st.booleans())
    most = min(setup.size, 8) if strict or plain or not indirect else 12
    length = st.one_of(
        st.integers(1, 4), st.integers(1, 90), *([st.just(0)] if empty else []), st.sampled_from([PAGE, PAGE + 1])
    )
    count = draw(st.integers(1, most))
    split_at = draw(st.integers(0, count))
    lengths = tuple(draw(length) for _ in range(count))
    readable, writable = lengths[:split_at], lengths[split_at:]
    direct: int | None = None
    if indirect:
        alone = setup.packed or plain
        direct = 0 if alone else draw(st.integers(0, min(count - 1, setup.size - 1)))
    room = sum(writable)
    return Request(
        readable=readable,
        writable=writable,
        answered=draw(st.one_of(st.just(room), st.integers(0, room))),
        direct=direct,
        backwards=draw(st.booleans()),
        junk=draw(st.sampled_from([0, 0xFFFF, 0x8002])),
        gap=draw(st.sampled_from([0, 0, 1, 7])),
    )


@st.composite
def maps(draw: st.DrawFn, setup: Setup) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Regions for the ring and 1 to 4 for the buffers; and the islands that adjacent ones of these form."""
    end = -(-setup.layout.end // PAGE) * PAGE
    if end - setup.base <= 8 * PAGE and draw(st.booleans()):
        ring = [(address, PAGE) for address in range(setup.base, end, PAGE)]
    else:
        ring = [(setup.base, end - setup.base)]
    at, data = end + 16 * PAGE, list[tuple[int, int]]()
    islands = list[tuple[int, int]]()
    for _ in range(draw(st.integers(1, 4))):
        gap, size = draw(st.sampled_from([0, 0, PAGE, 1 << 30])), draw(st.sampled_from([PAGE, 2 * PAGE]))
        at += gap
        data.append((at, size))
        if islands and not gap:
            first, whole = islands[-1]
            islands[-1] = (first, whole + size)
        else:
            islands.append((at, size))
        at += size
    # Buffers begin shortly before the first border of each island, so that they cross it.
    back = draw(st.integers(0, 64))
    borders = {address for address, _ in data}
    near = tuple(_before_a_border(borders, back, island) for island in islands)
    regions = [*ring, *data, RESERVE]
    draw(st.randoms(use_true_random=False)).shuffle(regions)
    return tuple(regions), near


def _before_a_border(borders: set[int], back: int, island: tuple[int, int]) -> tuple[int, int]:
    first, size = island
    begin = min((border - back for border in borders if first < border < first + size), default=first)
    return begin, first + size - begin


@st.composite
def scripts(
    draw: st.DrawFn,
    *,
    plain: bool = False,
    packed: bool | None = None,
    sizes: list[int] | None = None,
) -> Script:
    setup = draw(setups(packed=packed, sizes=sizes))
    regions, islands = draw(maps(setup))
    rounds = draw(
        st.lists(
            st.builds(
                Round,
                st.lists(requests(setup, plain=plain), min_size=1, max_size=4).map(tuple),
                st.lists(st.integers(0, 7), max_size=4).map(tuple),
            ),
            min_size=1,
            max_size=4,
        )
    )
    return Script(setup, regions, islands, tuple(rounds))

"""The split virtqueue (VIRTIO 1.4, 2.7), both ends."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from random import Random

from tests.property.model.common import INDIRECT, NEXT, WRITE, Element, Memory, Plan, Segment, as_int, passed, u16


@dataclass(frozen=True)
class SplitRing:
    """Where the fields lie (2.7.5, 2.7.6, 2.7.8)."""

    memory: Memory
    size: int
    desc: int
    avail: int
    used: int

    def avail_flags(self) -> int:
        return self.avail

    def avail_idx(self) -> int:
        return self.avail + 2

    def avail_ring(self, idx: int) -> int:
        return self.avail + 4 + 2 * (idx % self.size)

    def used_event(self) -> int:
        return self.avail + 4 + 2 * self.size

    def used_flags(self) -> int:
        return self.used

    def used_idx(self) -> int:
        return self.used + 2

    def used_ring(self, idx: int) -> int:
        return self.used + 4 + 8 * (idx % self.size)

    def avail_event(self) -> int:
        return self.used + 4 + 8 * self.size

    def get(self, address: int) -> int:
        """One 16-bit field."""
        return as_int(self.memory.read(address, 2))

    def put(self, address: int, value: int) -> None:
        self.memory.write(address, u16(value))

    def begin_at(self, start: int) -> None:
        """The state of a ring whose first `start` buffers have all been used."""
        self.put(self.avail_idx(), start)
        self.put(self.used_idx(), start)


class SplitDriver:
    """The driver end. Descriptors are taken in a shuffled order, except with IN_ORDER (2.7.5.2 wants 0, 1, 2 …)."""

    def __init__(self, ring: SplitRing, *, start: int = 0, in_order: bool = False, seed: int = 0) -> None:
        self.ring = ring
        self.in_order = in_order
        self.free = deque(range(ring.size))
        if seed and not in_order:
            shuffled = list(self.free)
            Random(seed).shuffle(shuffled)
            self.free = deque(shuffled)
        self.chains: dict[int, tuple[list[int], int]] = {}
        self.avail = self.used = start & 0xFFFF
        self.moved = 0

    def add(self, plan: Plan) -> int:
        """Write one chain and its avail ring entry, not yet the index; the head."""
        ring = self.ring
        slots = [self.free.popleft() for _ in range(plan.slots)]
        entries = [(s.address, s.length, WRITE if s.writable else 0) for s in plan.direct]
        if plan.table is not None:
            # WRITE on the INDIRECT descriptor means nothing (2.7.5.3.2).
            entries.append((plan.table_at, 16 * len(plan.table), INDIRECT | plan.junk & WRITE))
            self._table(plan)
        for place, (address, length, flags) in enumerate(entries):
            more = place + 1 < len(slots)
            following = slots[place + 1] if more else plan.junk
            self._desc(ring.desc, slots[place], address, length, flags | NEXT * more, following)
        ring.put(ring.avail_ring(self.avail), slots[0])
        self.avail = self.avail + 1 & 0xFFFF
        self.moved += 1
        writable = sum(s.length for s in plan.segments if s.writable)
        self.chains[slots[0]] = (slots, writable)
        return slots[0]

    def _table(self, plan: Plan) -> None:
        segments = list(plan.table or ())
        count = len(segments)
        order = [0, *range(count - 1, 0, -1)] if plan.backwards else list(range(count))
        for place, segment in enumerate(segments):
            more = place + 1 < count
            flags = (WRITE if segment.writable else 0) | NEXT * more
            following = order[place + 1] if more else plan.junk
            self._desc(plan.table_at, order[place], segment.address, segment.length, flags, following)

    def _desc(self, table: int, index: int, address: int, length: int, flags: int, following: int) -> None:
        self.ring.memory.write(table + 16 * index, struct.pack("<QIHH", address, length, flags, following & 0xFFFF))

    def publish(self) -> None:
        self.ring.put(self.ring.avail_idx(), self.avail)

    def wants_to_kick(self, *, event_idx: bool) -> bool:
        """Whether the device asked for a kick since the last call of this (2.7.7, 2.7.10)."""
        moved, self.moved = self.moved, 0
        if event_idx:
            return passed(self.ring.get(self.ring.avail_event()), self.avail - moved, moved)
        return moved > 0 and self.ring.get(self.ring.used_flags()) & 1 == 0

    def take(self) -> list[tuple[int, int]]:
        """(head, written) of everything that was used since the last call."""
        ring, found = self.ring, list[tuple[int, int]]()
        while self.used != ring.get(ring.used_idx()):
            head, written = struct.unpack("<II", ring.memory.read(ring.used_ring(self.used), 8))
            # With IN_ORDER one entry may stand for a batch; what it skips was used completely (2.7.9).
            waiting = list(self.chains)
            batch = waiting[: waiting.index(head)] if self.in_order else []
            for skipped in batch:
                found.append((skipped, self._release(skipped)))
            writable = self._release(head)
            assert written <= writable, f"used length {written} of {writable} writable bytes"
            found.append((head, written))
            self.used = self.used + len(batch) + 1 & 0xFFFF
        return found

    def _release(self, head: int) -> int:
        slots, writable = self.chains.pop(head)
        self.free.extend(slots)
        return writable


class SplitDevice:
    """The device end."""

    def __init__(self, ring: SplitRing, *, start: int = 0) -> None:
        self.ring = ring
        self.avail = self.used = start & 0xFFFF
        self.moved = 0

    def pop(self) -> Element | None:
        ring = self.ring
        ahead = ring.get(ring.avail_idx()) - self.avail & 0xFFFF
        assert ahead <= ring.size, f"avail.idx is {ahead} ahead (2.7.6.1)"
        if not ahead:
            return None
        head = ring.get(ring.avail_ring(self.avail))
        assert head < ring.size
        self.avail = self.avail + 1 & 0xFFFF
        segments, slots = self._walk(ring.desc, ring.size, head)
        last_seen = [s.writable for s in segments]
        assert last_seen == sorted(last_seen), "readable after writable (2.7.4.2)"
        return Element(head, slots, [s for s in segments if s.length])

    def _walk(self, table: int, count: int, index: int) -> tuple[list[Segment], int]:
        segments, seen = list[Segment](), 0
        while True:
            assert index < count, "next beyond the table"
            raw = self.ring.memory.read(table + 16 * index, 16)
            address, length, flags, following = struct.unpack("<QIHH", raw)
            seen += 1
            assert seen <= count, "a loop"
            if flags & INDIRECT:
                assert not flags & NEXT, "INDIRECT with NEXT (2.7.5.3.1)"
                assert table == self.ring.desc, "INDIRECT in a table (2.7.5.3.1)"
                assert length, "an empty table"
                assert length % 16 == 0, "half a descriptor"
                return segments + self._walk(address, length // 16, 0)[0], seen
            segments.append(Segment(address, length, bool(flags & WRITE)))
            if not flags & NEXT:
                return segments, seen
            index = following

    def push(self, *elements: tuple[Element, int]) -> None:
        """Use (element, written) pairs; only the index makes them visible (2.7.8.2)."""
        for element, written in elements:
            assert written <= element.writable
            entry = struct.pack("<II", element.head, written)
            self.ring.memory.write(self.ring.used_ring(self.used), entry)
            self._advance(1)
        self.ring.put(self.ring.used_idx(), self.used)

    def push_batch(self, elements: list[Element], written: int) -> None:
        """IN_ORDER: one entry for the last of `elements`, at the place of the first (2.7.9)."""
        entry = struct.pack("<II", elements[-1].head, written)
        self.ring.memory.write(self.ring.used_ring(self.used), entry)
        self._advance(len(elements))
        self.ring.put(self.ring.used_idx(), self.used)

    def _advance(self, count: int) -> None:
        self.used = self.used + count & 0xFFFF
        self.moved += count

    def wants_to_call(self, *, event_idx: bool) -> bool:
        """Whether the driver asked for a call since the last call of this (2.7.7, 2.7.10)."""
        moved, self.moved = self.moved, 0
        if event_idx:
            return passed(self.ring.get(self.ring.used_event()), self.used - moved, moved)
        return moved > 0 and self.ring.get(self.ring.avail_flags()) & 1 == 0

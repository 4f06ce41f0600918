"""The packed virtqueue (VIRTIO 1.4, 2.8), both ends."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from random import Random

from tests.property.model.common import INDIRECT, NEXT, WRITE, Element, Memory, Plan, Segment, passed, u16

AVAIL, USED = 1 << 7, 1 << 15


@dataclass(frozen=True)
class PackedRing:
    """Where the fields lie (2.8.13, 2.8.14)."""

    memory: Memory
    size: int
    desc: int
    driver: int
    device: int

    def get_desc(self, slot: int) -> tuple[int, int, int, int]:
        """(address, length, id, flags) of one descriptor."""
        address, length, identity, flags = struct.unpack("<QIHH", self.memory.read(self.desc + 16 * slot, 16))
        return address, length, identity, flags

    def put_desc(self, slot: int, address: int, length: int, identity: int, flags: int) -> None:
        self.memory.write(self.desc + 16 * slot, struct.pack("<QIHH", address, length, identity & 0xFFFF, flags))

    def put_flags(self, slot: int, flags: int) -> None:
        self.memory.write(self.desc + 16 * slot + 14, u16(flags))

    def begin_at(self, start: int) -> None:
        """The state of a ring that stands at `start` (bit 15: wrap counter) with nothing in flight.

        What lies before was used in this lap, what lies behind in the lap before (2.8.1).
        """
        here, wrap = start & 0x7FFF, start >> 15
        this_lap, last_lap = (struct.pack("<QIHH", 0, 0, 0, (AVAIL | USED) * lap) for lap in (wrap, 1 - wrap))
        self.memory.write(self.desc, this_lap * here + last_lap * (self.size - here))

    def wants(self, area: int, here: Cursor, moved: int, *, event_idx: bool) -> bool:
        """Whether the other side, whose event structure is at `area`, wants to hear of the `moved` slots up to `here`.

        A structure that makes no sense is answered with a notification, which is always allowed.
        """
        off_wrap, flags = struct.unpack("<HH", self.memory.read(area, 4))
        if not moved or flags & 3 == 1:
            return False
        if flags & 3 == 2 and event_idx and off_wrap & 0x7FFF < self.size:
            event = Cursor(self.size, off_wrap).circle()
            return passed(event, here.circle() - moved, moved, modulus=2 * self.size)
        return True


class Cursor:
    """A place in the ring and its wrap counter (2.8.1)."""

    def __init__(self, size: int, start: int) -> None:
        self.size = size
        self.slot, self.wrap = start & 0x7FFF, start >> 15

    def advance(self, count: int) -> None:
        for _ in range(count):
            self.slot += 1
            if self.slot == self.size:
                self.slot, self.wrap = 0, 1 - self.wrap

    def circle(self) -> int:
        return self.slot + (0 if self.wrap else self.size)

    def state(self) -> int:
        return self.slot | self.wrap << 15

    def avail_flags(self) -> int:
        """AVAIL equal to the wrap counter, USED its inverse."""
        return AVAIL if self.wrap else USED

    def used_flags(self) -> int:
        """Both equal to the wrap counter."""
        return AVAIL | USED if self.wrap else 0


class PackedDriver:
    """The driver end. Ids are any 16-bit numbers: the device hands them back and knows nothing of them (2.8.6)."""

    def __init__(self, ring: PackedRing, *, start: int = 0x8000, in_order: bool = False, seed: int = 0) -> None:
        self.ring = ring
        self.in_order = in_order
        self.ids = deque(Random(seed).sample(range(0x10000), ring.size) if seed else range(ring.size))
        self.room = ring.size
        self.chains: dict[int, tuple[int, int]] = {}
        self.next, self.used = Cursor(ring.size, start), Cursor(ring.size, start)
        self.moved = 0
        self.hidden: list[tuple[int, int]] = []

    def add(self, plan: Plan) -> int:
        """Write one list, all but the flags of its first descriptor; the buffer id."""
        ring, identity = self.ring, self.ids.popleft()
        assert plan.slots <= self.room
        assert plan.table is None or not plan.direct, "a packed list has no INDIRECT descriptor behind others (2.8.19)"
        entries = [(s.address, s.length, WRITE if s.writable else 0) for s in plan.direct]
        if plan.table is not None:
            entries.append((plan.table_at, 16 * len(plan.table), INDIRECT | plan.junk & WRITE))
            for place, s in enumerate(plan.table):
                # Id and every flag but WRITE are reserved in a table (2.8.7).
                flags = WRITE if s.writable else 0
                entry = struct.pack("<QIHH", s.address, s.length, plan.junk & 0xFFFF, flags)
                ring.memory.write(plan.table_at + 16 * place, entry)
        for place, (address, length, own) in enumerate(entries):
            last = place + 1 == len(entries)
            flags = own | self.next.avail_flags() | NEXT * (not last)
            if place == 0:
                self.hidden.append((self.next.slot, flags))
            shown = flags if place else ring.get_desc(self.next.slot)[3]
            # Only the last id of a list counts (2.8.6).
            ring.put_desc(self.next.slot, address, length, identity if last else plan.junk, shown)
            self.next.advance(1)
        self.room -= plan.slots
        self.moved += plan.slots
        self.chains[identity] = (plan.slots, sum(s.length for s in plan.segments if s.writable))
        return identity

    def publish(self) -> None:
        """Show the lists that were added, the newest first: the device sees all of them or none (2.8.21)."""
        while self.hidden:
            self.ring.put_flags(*self.hidden.pop())

    def wants_to_kick(self, *, event_idx: bool) -> bool:
        moved, self.moved = self.moved, 0
        return self.ring.wants(self.ring.device, self.next, moved, event_idx=event_idx)

    def take(self) -> list[tuple[int, int]]:
        """(id, written) of everything that was used since the last call."""
        found = list[tuple[int, int]]()
        while self.chains:
            _, length, identity, flags = self.ring.get_desc(self.used.slot)
            if flags & (AVAIL | USED) != self.used.used_flags():
                break
            waiting = list(self.chains)
            batch = waiting[: waiting.index(identity)] if self.in_order else []
            for skipped in batch:
                found.append((skipped, self._release(skipped)))
            writable = self._release(identity)
            # The length of a used descriptor without WRITE is reserved (2.8.4).
            written = length if flags & WRITE else 0
            assert written <= writable, f"used length {written} of {writable} writable bytes"
            found.append((identity, written))
        return found

    def _release(self, identity: int) -> int:
        slots, writable = self.chains.pop(identity)
        self.ids.append(identity)
        self.room += slots
        self.used.advance(slots)
        return writable


class PackedDevice:
    """The device end."""

    def __init__(self, ring: PackedRing, *, start: int = 0x8000) -> None:
        self.ring = ring
        self.next, self.used = Cursor(ring.size, start), Cursor(ring.size, start)
        self.moved = 0

    def pop(self) -> Element | None:
        segments, slots = list[Segment](), 0
        while True:
            address, length, identity, flags = self.ring.get_desc(self.next.slot)
            if flags & (AVAIL | USED) != self.next.avail_flags():
                assert not slots, "a list that is available only in part (2.8.17)"
                return None
            slots += 1
            assert slots <= self.ring.size, "a loop"
            self.next.advance(1)
            if flags & INDIRECT:
                assert slots == 1, "INDIRECT behind others (2.8.19)"
                assert not flags & NEXT, "INDIRECT with NEXT (2.8.19)"
                segments = self._table(address, length)
            else:
                segments.append(Segment(address, length, bool(flags & WRITE)))
            if not flags & NEXT:
                directions = [s.writable for s in segments]
                assert directions == sorted(directions), "readable after writable (2.8.17)"
                return Element(identity, slots, [s for s in segments if s.length])

    def _table(self, address: int, length: int) -> list[Segment]:
        assert length, "an empty table"
        assert length % 16 == 0, "half a descriptor"
        raw = self.ring.memory.read(address, length)
        return [Segment(a, n, bool(flags & WRITE)) for a, n, _, flags in struct.iter_unpack("<QIHH", raw)]

    def push(self, *elements: tuple[Element, int]) -> None:
        """Use (element, written) pairs; the flags of the first come last, so all appear at once."""
        hidden = list[tuple[int, int]]()
        for element, written in elements:
            assert written <= element.writable
            at = self.ring.desc + 16 * self.used.slot
            self.ring.memory.write(at + 8, struct.pack("<IH", written, element.head))
            hidden.append((self.used.slot, self.used.used_flags() | (WRITE if written else 0)))
            self._advance(element.slots)
        for slot, flags in reversed(hidden):
            self.ring.put_flags(slot, flags)

    def push_batch(self, elements: list[Element], written: int) -> None:
        """IN_ORDER: one used descriptor for the last of `elements`, at the place of the first (2.8.8)."""
        self.push((elements[-1]._replace(slots=sum(element.slots for element in elements)), written))

    def _advance(self, count: int) -> None:
        self.used.advance(count)
        self.moved += count

    def wants_to_call(self, *, event_idx: bool) -> bool:
        moved, self.moved = self.moved, 0
        return self.ring.wants(self.ring.driver, self.used, moved, event_idx=event_idx)

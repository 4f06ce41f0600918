"""A bench for one queue: a legal ring made by the model's driver, and a pen for any field of it.

What an evil driver would write is data: `put` finds a field through `queue.layout()` and writes it with a plain
`memory.write`. Nothing here computes an offset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import pytest
from virtio_test._core import Chain, DeviceQueue, GuestMemory, Policy, QueueConfig, RingLayout, Trace

from tests.property.ends import INDIRECT_DESC, Setup, features_of
from tests.property.model import Plan, Segment

PAGE = 4096
LOW = 0
"""A page of RAM at guest address 0, which is an address like any other."""
RING = 0x10000
DATA = 0x100000
EDGE = 0x110000
"""Adjacent to the data region; behind it is a hole, then one more page."""
HOLE = 0x111000
FAR = 0x113000
ROM = 0x200000
BIG = 1 << 32

READ_A, READ_B, TABLE, WRITE = DATA, DATA + 0x100, DATA + 0x4000, DATA + 0x8000

NEXT, W, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15


@dataclass
class Bench:
    """One queue of `size` descriptors that begins at `start` (split: index; packed: slot and wrap counter)."""

    packed: bool
    policy: Policy = Policy.interop
    size: int = 8
    start: int = -1
    features: int = INDIRECT_DESC
    trace: Trace = field(default_factory=Trace)
    popped: list[Chain] = field(default_factory=list[Chain])

    def __post_init__(self) -> None:
        if self.start < 0:
            self.start = 0x8000 if self.packed else 0
        regions = [(LOW, PAGE), (RING, 1 << 16), (DATA, 1 << 16), (EDGE, PAGE), (FAR, PAGE)]
        self.memory = GuestMemory(regions, trace=self.trace)
        self.memory.add_region(ROM, PAGE, writable=False)
        self.setup = Setup(
            packed=self.packed,
            size=self.size,
            base=RING,
            start=self.start,
            features=features_of(self.features, packed=self.packed),
            policy=self.policy,
        )
        self.setup.ring(self.memory).begin_at(self.start)
        self.driver = self.setup.model_driver(self.memory)
        self.table = RingLayout(32768, packed=self.packed, desc=TABLE)
        self.memory.write(READ_A, bytes(range(200)))

    @cached_property
    def queue(self) -> DeviceQueue:
        return DeviceQueue(self.memory, self.setup.config(), state=self.setup.state())

    def config(self, **changes: int) -> QueueConfig:
        """The legal configuration with some fields changed."""
        layout = self.setup.layout
        fields = {"size": self.size, "desc": layout.desc, "driver": layout.driver, "device": layout.device} | changes
        size = fields.pop("size")
        return QueueConfig(size, **fields, index=3, features=self.setup.features, policy=self.policy)

    # ------------------------------------------------------------------------------------------------- legal rings

    def add(self, *segments: tuple[int, int, bool], table: tuple[tuple[int, int, bool], ...] | None = None) -> int:
        """One buffer of (address, length, device-writable) descriptors; those of `table` in an indirect one."""
        entries = None if table is None else [Segment(*entry) for entry in table]
        head = self.driver.add(Plan([Segment(*segment) for segment in segments], entries, TABLE))
        self.driver.publish()
        return head

    def single(self) -> None:
        self.add((WRITE, 32, True))

    def direct(self) -> None:
        """Three descriptors: 0 and 1 readable, 2 writable."""
        self.add((READ_A, 16, False), (READ_B, 8, False), (WRITE, 32, True))

    def several(self) -> None:
        """Five chains of one descriptor."""
        for at in range(5):
            self.add((WRITE + 64 * at, 32, True))

    def full(self) -> None:
        """As many chains as there are descriptors."""
        for at in range(self.size):
            self.add((WRITE + 64 * at, 32, True))

    def tabled(self) -> None:
        """Three entries in an indirect table."""
        self.add(table=((READ_A, 16, False), (READ_B, 8, False), (WRITE, 32, True)))

    def mixed(self) -> None:
        """Split only: one direct descriptor, then INDIRECT with two entries (2.7.5.3.2)."""
        self.add((READ_A, 16, False), table=((READ_B, 8, False), (WRITE, 32, True)))

    # --------------------------------------------------------------------------------------------------- the defect

    def at(self, name: str, index: int = 0) -> int:
        return self.queue.layout().at(name, index)

    def get(self, name: str, index: int = 0) -> int:
        width = self.queue.layout().fields()[name][1]
        return int.from_bytes(self.memory.read(self.at(name, index), width), "little")

    def put(self, name: str, value: int, index: int = 0) -> None:
        """Overwrite one field of the ring."""
        width = self.queue.layout().fields()[name][1]
        self.memory.write(self.at(name, index), value.to_bytes(width, "little"))

    # -------------------------------------------------------------------------------------------------- what follows

    def pop(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        self.popped.append(chain)
        return chain

    def drain(self) -> None:
        """Pop until there is no more; a violation propagates."""
        for _ in range(2 * self.size + 2):
            chain = self.queue.pop()
            if chain is None:
                return
            self.popped.append(chain)
        pytest.fail("the queue hands out more chains than it can have")

    def complete(self) -> None:
        """Fill, push and find every popped chain in the used ring."""
        for chain in self.popped:
            before = self.queue.state.used
            written = chain.write(b"\xa5" * min(chain.writable, 64))
            assert written == min(chain.writable, 64)
            assert self.queue.push(chain)
            assert self.used(before) == (chain.head, written)
        assert self.queue.in_flight == 0

    def used(self, state: int) -> tuple[int, int]:
        """(id, length) of the used entry written at `state`."""
        if not self.packed:
            assert self.get("used.idx") == state + 1 & 0xFFFF
            slot = state % self.size
            return self.get("used.ring.id", slot), self.get("used.ring.len", slot)
        slot, wrap = state & 0x7FFF, state >> 15
        flags, length = self.get("desc.flags", slot), self.get("desc.len", slot)
        assert flags == (AVAIL | USED) * wrap | W * (length > 0), f"used flags {flags:#x} (P19)"
        return self.get("desc.id", slot), length

    def assert_reset_heals(self) -> None:
        """A new generation on a fresh ring works, whatever happened before."""
        self.memory.fill(RING, 1 << 16)
        self.setup.ring(self.memory).begin_at(self.start)
        self.driver = self.setup.model_driver(self.memory)
        self.queue.reset(state=self.setup.state())
        self.popped.clear()
        self.single()
        self.drain()
        assert len(self.popped) == 1
        self.complete()

    def image(self) -> list[bytes]:
        """All of guest memory that is worth reading."""
        return [self.memory.read(region.address, region.size) for region in self.memory.regions if region.address < BIG]

"""Whatever is written into a PCI function: nothing raises, and memory is written where and when it was granted only.

A program is a list of accesses, of a driver that knows what it does in part: single bytes anywhere, registers by
name, the steps of a bring-up, buffers, kicks. Memory has two regions. The driver names addresses in the first one
alone; the second one is nobody's and stays as it is. The first one changes only in a turn of the loop, and only
while the function is awake, bus master, and its driver has said DRIVER_OK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import event, given
from hypothesis import strategies as st
from virtio_test._core import DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.errors import RuleViolation, UsageError
from virtio_test.features import FeatureSet
from virtio_test.spec.clauses import CLAUSES
from virtio_test.spec.pci import COMMON
from virtio_test.transport.bank import TRANSPORT_FEATURES
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci

from .pci_world import LIVE, READY, UP, S, Sink, upper

OWN: Final = 0x10000
FOREIGN: Final = 0x5A5A_0000_0000
CANARY: Final = bytes(range(256)) * 16
RINGS: Final = (0x4000, 0x8000)

Step = tuple[str, tuple[int, ...]]
"""A method of `Machine`, and its arguments."""


class Machine:
    """A function, and a driver for whom nothing is too strange."""

    def __init__(self, *, transitional: bool, express: bool, external: bool, late: bool) -> None:
        handler = kept(lambda _: None) if late else bytes.upper
        device = upper(handlers={0: handler, 1: bytes.upper}, features=FeatureSet("ADMIN_VQ"))
        self.device: BaseDevice = device
        plan = declare(device, flavour="transitional" if transitional else "non-transitional", express=express)
        self.memory = GuestMemory([(0, OWN), (FOREIGN, len(CANARY))])
        self.memory.write(FOREIGN, CANARY)
        self.function = VirtioPci(
            device, declaration=plan, memory=self.memory, offered=device.features | TRANSPORT_FEATURES
        )
        self.function.external_table = external
        self.layout = plan.layout
        self.bank = self.function.bank
        self.sink = Sink()
        self.function.connect(self.sink)
        self.queues: dict[int, DriverQueue] = {}
        self.bars = [bar.index for bar in plan.bars]

    def check(self, step: Step) -> None:
        name, arguments = step
        getattr(self, name)(*arguments)
        assert self.memory.read(FOREIGN, len(CANARY)) == CANARY

    def turn(self) -> None:
        before = self.memory.read(0, OWN)
        told = len(self.sink.messages)
        granted = self.function.bus_master and (self.bank.status.driver_ok or self.bank.legacy)
        self.function.loop.run_pending()
        if not granted:
            assert self.memory.read(0, OWN) == before
        if not self.function.bus_master:
            assert len(self.sink.messages) == told

    def quietly(self, access: Callable[[], object]) -> None:
        """An access that must not touch memory at all: devices work in turns of their own."""
        before = self.memory.read(0, OWN)
        access()
        assert self.memory.read(0, OWN) == before

    def register(self, number: int, value: int, half: int) -> None:
        self.write(list(COMMON)[number % len(COMMON)], value, half)

    def write(self, name: str, value: int, half: int = 0) -> None:
        at = COMMON[name]
        size = min(4, at.size)
        offset = self.layout.common.offset + at.offset + (4 * half if at.size == 8 else 0)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self.quietly(lambda: self.function.write_bar(self.layout.common.bar, offset, data))
        self.function.read_bar(self.layout.common.bar, offset, size)

    def bring_up(self, without: int, packed: int) -> None:
        for status in (0, S.ACKNOWLEDGE, UP):
            self.write("device_status", status)
        accepted = self.bank.offered.bits & ~without
        accepted &= -1 if packed else ~FeatureSet("RING_PACKED").bits
        for select in range(2):
            self.write("driver_feature_select", select)
            self.write("driver_feature", accepted >> 32 * select)
        self.write("device_status", READY)
        self.queues.clear()

    def place(self, index: int, size: int) -> None:
        packed = "RING_PACKED" in self.bank.accepted
        layout = RingLayout.contiguous(size, RINGS[index], packed=packed)
        self.write("queue_select", index)
        self.write("queue_size", size)
        for area in ("desc", "driver", "device"):
            self.write(f"queue_{area}", getattr(layout, area) & 0xFFFF_FFFF, 0)
            self.write(f"queue_{area}", 0, 1)
        self.write("queue_enable", 1)
        config = QueueConfig.from_layout(layout, index=index, features=self.bank.accepted.bits & (1 << 64) - 1)
        self.memory.fill(RINGS[index], layout.end - RINGS[index])
        self.queues[index] = DriverQueue(self.memory, config, kick=Notifier.callback(lambda: None))

    def post(self, index: int, length: int) -> None:
        queue = self.queues.get(index)
        if queue is None or queue.latched is not None:
            return
        try:
            queue.add([(0x1000, length)], [(0x2000, length)])
        except UsageError:
            return
        queue.enable_calls()
        queue.signal()
        data = index.to_bytes(4 if "NOTIFICATION_DATA" in self.bank.accepted else 2, "little")
        place = self.layout.notify
        self.quietly(lambda: self.function.write_bar(place.bar, place.offset + index * self.layout.multiplier, data))

    def live(self) -> None:
        self.write("device_status", int(LIVE))

    def on(self) -> None:
        self.function.write_config(4, b"\x07\x00")

    def junk(self, offset: int, value: int) -> None:
        self.memory.write(RINGS[0] + offset, value.to_bytes(8, "little"))

    def change(self, count: int) -> None:
        self.device.config.update(count=count)

    def hold(self) -> None:
        self.quietly(self.function.hold)

    def release(self) -> None:
        self.quietly(self.function.release)

    def reset(self) -> None:
        self.quietly(self.function.reset)

    def write_bar(self, which: int, offset: int, size: int, value: int) -> None:
        bar = self.bars[which % len(self.bars)]
        self.quietly(lambda: self.function.write_bar(bar, offset, data(value, size)))

    def read_bar(self, which: int, offset: int, size: int) -> None:
        bar = self.bars[which % len(self.bars)]
        self.quietly(lambda: self.function.read_bar(bar, offset, size))

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.quietly(lambda: self.function.write_config(offset, data(value, size)))

    def read_config(self, offset: int, size: int) -> None:
        self.quietly(lambda: self.function.read_config(offset, size))

    def complete(self) -> None:
        for chain in self.device.kept:
            granted = self.bank.status.driver_ok
            before = self.memory.read(0, OWN)
            done = self.device.complete(chain, b"late")
            if not granted:
                assert not done
                assert self.memory.read(0, OWN) == before


VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 0xFF, 0xFFFE, 0xFFFF, 0x10000, (1 << 32) - 1, 1 << 63]),
    st.sampled_from([0x1000, 0x4000, 0x4100, 0x8000, OWN - 16, OWN - 8, OWN, int(UP), int(READY), int(LIVE)]),
    st.integers(0, (1 << 64) - 1),
)
SIZES = st.sampled_from([1, 2, 3, 4, 5, 8])
WHICH = st.integers(0, 2)
BAR_OFFSETS = st.one_of(st.integers(0, 0x40), st.sampled_from([0x800, 0x1000, 0x2000, 0x2004, 0x3000, 0x3004]))
CONFIG_OFFSETS = st.one_of(st.integers(0, 0x110), st.sampled_from([4, 0x42, 0x94, 0x98, 0x9C, 0xA0, 0xA8, 0xB0]))


def data(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def step(name: str, *arguments: st.SearchStrategy[int]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), st.tuples(*arguments))


STEPS: st.SearchStrategy[Step] = st.one_of(
    step("register", st.integers(0, len(COMMON) - 1), VALUES, st.integers(0, 1)),
    step("write_bar", WHICH, BAR_OFFSETS, SIZES, VALUES),
    step("read_bar", WHICH, st.integers(0, 0x4100), SIZES),
    step("write_config", CONFIG_OFFSETS, SIZES, VALUES),
    step("read_config", st.integers(0, 0x110), st.sampled_from([1, 2, 4, 64, 256])),
    step("on"),
    step("bring_up", st.sampled_from([0, 0, 1 << 40, 1 << 38, 1 << 32, 1 << 29]), st.integers(0, 1)),
    step("place", st.integers(0, 1), st.sampled_from([1, 2, 4, 8, 16])),
    step("live"),
    step("post", st.integers(0, 1), st.integers(1, 64)),
    step("post", st.integers(0, 1), st.integers(1, 64)),
    step("turn"),
    step("turn"),
    step("complete"),
    step("hold"),
    step("release"),
    step("reset"),
    step("junk", st.integers(0, 0x200), st.integers(0, (1 << 64) - 1)),
    step("change", st.integers(0, 3)),
)
USUAL: Final[list[Step]] = [
    ("on", ()),
    ("bring_up", (0, 0)),
    ("place", (0, 16)),
    ("place", (1, 16)),
    ("live", ()),
    ("turn", ()),
]


@given(
    steps=st.lists(STEPS, max_size=60),
    usual=st.booleans(),
    transitional=st.booleans(),
    express=st.booleans(),
    external=st.booleans(),
    late=st.booleans(),
)
def test_no_program_breaks_the_function(
    steps: list[Step], usual: bool, transitional: bool, express: bool, external: bool, late: bool
) -> None:
    machine = Machine(transitional=transitional, express=express, external=external, late=late)
    for each in [*(USUAL if usual else []), *steps]:
        machine.check(each)
    machine.turn()
    for error in machine.bank.errors:
        # Everything that is held against a driver stands somewhere.
        assert isinstance(error, RuleViolation)
        assert error.clause in CLAUSES, error
    event(f"live: {machine.bank.live}")
    event(f"interrupted: {bool(machine.sink.messages or machine.sink.levels)}")
    # Whatever it was, a reset makes the function new.
    machine.function.reset()
    machine.function.release()
    machine.on()
    machine.function.external_table = False
    machine.bring_up(FeatureSet("NOTIFICATION_DATA", "NOTIF_CONFIG_DATA").bits, packed=False)
    machine.place(1, 16)
    machine.live()
    machine.memory.write(0x1000, b"again")
    machine.post(1, 5)
    machine.turn()
    assert machine.queues[1].get_used() is not None
    assert machine.memory.read(0x2000, 5) == b"AGAIN"

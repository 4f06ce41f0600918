"""Any program of accesses against virtio-mmio raises nothing, leaves the registers sane, and a reset heals it."""

from __future__ import annotations

from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_test._core import GuestMemory
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.clock import VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.errors import VirtioTestError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.mmio import CONFIG, LEGACY_REGISTERS, REGISTERS
from virtio_test.status import Status
from virtio_test.transport.mmio import PAGE, Override, VirtioMmio

SIZE = 8
Step = tuple[str, int, bytes]

OFFSETS = sorted({each.offset for each in (*REGISTERS.values(), *LEGACY_REGISTERS.values())})
BITS = FeatureSet("VERSION_1", "RING_RESET", "EVENT_IDX", "NOTIFICATION_DATA").bits
STATUS = [0, 1, 3, 3 | 8, 3 | 8 | 4, 0x40, 0x80, 0x10]
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 7, SIZE, 0x1000, 0x2000, BITS & 0xFFFF_FFFF, BITS >> 32, *STATUS]),
    st.integers(0, 0xFFFF_FFFF),
)


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def step(name: str, value: int) -> Step:
    return ("write", REGISTERS[name].offset, word(value))


# What takes a driver further: programs begin with some of it, or they would all end before the first queue.
USUAL: list[list[Step]] = [
    [step("Status", 0), step("Status", 1), step("Status", 3)],
    [step("DriverFeaturesSel", 0), step("DriverFeatures", BITS & 0xFFFF_FFFF)],
    [step("DriverFeaturesSel", 1), step("DriverFeatures", BITS >> 32), step("Status", 3 | 8)],
    [
        step("QueueSel", 0),
        step("QueueSize", SIZE),
        step("QueueDescLow", 0x1000),
        step("QueueDriverLow", 0x2000),
        step("QueueDeviceLow", 0x3000),
        step("QueueReady", 1),
    ],
    [("write", 0x028, word(4096)), ("write", 0x03C, word(4096)), ("write", 0x040, word(1))],
    [step("Status", 3 | 8 | 4), ("run", 0, b""), step("QueueNotify", 0), ("run", 0, b"")],
    [step("Status", 3 | 4), ("run", 0, b"")],
    [("poke", 0x2002, b"\x01\x00"), step("QueueNotify", 0), ("run", 0, b"")],
    [step("QueueReset", 1)],
]
BRING_UP: dict[int, list[Step]] = {
    1: [*USUAL[0], *USUAL[4], *USUAL[6], *USUAL[7]],
    2: [*USUAL[0], *USUAL[1], *USUAL[2], *USUAL[3], *USUAL[5], *USUAL[7]],
}
ONE: st.SearchStrategy[list[Step]] = st.one_of(
    st.sampled_from(USUAL),
    st.tuples(st.just("write"), st.sampled_from(OFFSETS), WORDS.map(word)).map(lambda each: [each]),
    st.tuples(st.just("write"), st.integers(0, PAGE - 8), st.binary(min_size=1, max_size=8)).map(lambda each: [each]),
    st.tuples(st.just("read"), st.sampled_from(OFFSETS), st.just(bytes(4))).map(lambda each: [each]),
    st.tuples(st.just("read"), st.integers(0, PAGE - 8), st.binary(min_size=1, max_size=8)).map(lambda each: [each]),
    st.tuples(st.just("poke"), st.integers(0x1000, 0x3FF0), st.binary(min_size=1, max_size=16)).map(
        lambda each: [each]
    ),
    st.just([("run", 0, b"")]),
)


class World:
    """Two queues, one whose chains are kept, over a little memory that a program may scribble on."""

    def __init__(self, version: Literal[1, 2]) -> None:
        layout = ConfigLayout(("mac", "bytes(6)", "rw"), ("mtu", "le16"), ("wide", "le64", "rw"))
        self.device = BaseDevice(
            7,
            handlers={0: bytes.upper, 1: kept(lambda _: None)},
            queue_sizes=(SIZE, SIZE),
            features=FeatureSet("NOTIFICATION_DATA"),
            config=ConfigSpace(layout),
        )
        self.memory = GuestMemory([(0, 0x10000)])
        self.mmio = VirtioMmio(self.device, version=version, memory=self.memory, loop=OwnerLoop(clock=VirtualClock()))
        self.levels: list[bool] = []
        self.mmio.interrupt = self.levels.append

    def get(self, offset: int) -> int:
        return int.from_bytes(self.mmio.read(offset, 4), "little")

    def do(self, step: Step) -> None:
        kind, at, data = step
        if kind == "write":
            self.mmio.write(at, data)
        elif kind == "read":
            assert len(self.mmio.read(at, len(data))) == len(data)
        elif kind == "poke":
            self.memory.write(at, data)
        else:
            self.mmio.loop.run_pending()
        self.check()

    def check(self) -> None:
        assert self.get(0x060) & ~3 == 0
        assert self.mmio.asserted == (self.get(0x060) != 0)
        assert self.levels == [bool(index % 2 == 0) for index in range(len(self.levels))]
        status = self.get(0x070)
        assert status & ~(0x0F | 0x50 | 0x80) == 0
        if self.mmio.version == 2 and status & Status.DRIVER_OK:
            assert status & Status.FEATURES_OK
        for slot in self.mmio.bank.slots:
            assert 1 <= slot.size <= SIZE


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((1, 2)), st.one_of(st.just(99), st.integers(0, 20)), st.lists(ONE, max_size=25))
def test_any_program_of_accesses(version: Literal[1, 2], begun: int, program: list[list[Step]]) -> None:
    world = World(version)
    for steps in [BRING_UP[version][:begun], *program]:
        for each in steps:
            world.do(each)
    world.do(("write", 0x070, bytes(4)))
    assert world.get(0x070) == 0
    assert not world.mmio.asserted
    driver = Driver(MmioRegisters(MmioLoopback(world.mmio)), wanted=FeatureSet("VERSION_1"))
    driver.initialize()
    assert driver.submit(0, [b"after all"], [9]).wait() == b"AFTER ALL"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from((1, 2)),
    st.dictionaries(st.sampled_from(sorted(REGISTERS.keys() & LEGACY_REGISTERS.keys())), WORDS, max_size=3),
    st.lists(st.tuples(st.integers(0, PAGE - 4), WORDS), max_size=3),
)
def test_any_device_against_our_driver(
    version: Literal[1, 2], registers: dict[str, Override], config: list[tuple[int, int]]
) -> None:
    """Registers that read anything: our driver ends, with an answer or with an error of ours."""
    world = World(version)
    world.mmio.registers.update(registers)
    try:
        driver = Driver(MmioRegisters(MmioLoopback(world.mmio), timeout=0.01), timeout=0.05)
        driver.initialize()
        for offset, value in config:
            driver.registers.write_config(offset % (PAGE - CONFIG - 4), word(value))
        assert driver.submit(0, [b"x"], [1]).wait(timeout=0.05) == b"X"
        driver.reset()
    except VirtioTestError:
        pass

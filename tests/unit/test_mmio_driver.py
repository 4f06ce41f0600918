"""Our driver over virtio-mmio: the loopback's transcripts through both versions, and devices that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from virtio_test._core import GuestMemory, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.clock import MonotonicClock, VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import TestDevice
from virtio_test.driver import mmio as driver_mmio
from virtio_test.driver.access import MmioAccess
from virtio_test.driver.base import Driver
from virtio_test.driver.mmio import MAX_SPURIOUS, MmioRegisters
from virtio_test.driver.registers import Registers
from virtio_test.driver.test import TestDriver
from virtio_test.errors import (
    DeviceNeedsReset,
    InvalidArgument,
    PeerTimeout,
    QueueViolation,
    RuleViolation,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.mmio import CONFIG, MAGIC, REGISTERS
from virtio_test.status import Status
from virtio_test.transport.mmio import Override, VirtioMmio, WriteOverride

from tests.combinations import record

Version = Literal[1, 2]
VERSIONS = pytest.mark.parametrize("version", [1, 2])
RINGS = {
    "split": RING_FEATURES - FeatureSet("RING_PACKED"),
    "packed": RING_FEATURES,
    "plain": FeatureSet("VERSION_1"),
}
ALL = pytest.mark.parametrize(
    ("version", "ring", "indirect"),
    [
        (version, ring, indirect)
        for version in (1, 2)
        for ring in RINGS
        for indirect in (False, True)
        if (version, ring) != (1, "packed")
    ],
)


def machine(device: BaseDevice, **options: Any) -> tuple[VirtioMmio, MmioRegisters]:
    mmio = VirtioMmio(device, **options)
    return mmio, MmioRegisters(MmioLoopback(mmio))


def transcript(
    registers: Callable[[TestDevice], Registers], *, timer: bool, ring: str, indirect: bool
) -> tuple[list[str], FeatureSet]:
    """What both consoles say, in one list: requests one by one and many at once, or three ticks; what was agreed."""
    lines: list[str] = []
    device = TestDevice(timer=timer, console=lines.append)
    driver = TestDriver(registers(device), timer=timer, console=lines.append, wanted=RINGS[ring], indirect=indirect)
    agreed = driver.initialize()
    if timer:
        driver.loop.run(timeout=32.5)
    else:
        driver.request(10)
        driver.request_many(range(250, 256))
    return lines, agreed


@ALL
@pytest.mark.parametrize("timer", [False, True])
def test_the_transcripts_are_those_of_the_loopback(version: Version, ring: str, *, indirect: bool, timer: bool) -> None:
    made: list[VirtioMmio] = []

    def registers(device: TestDevice) -> MmioRegisters:
        mmio, found = machine(device, version=version)
        made.append(mmio)
        return found

    expected, _ = transcript(Loopback, timer=timer, ring=ring, indirect=indirect)
    assert len(expected) == (15 if timer else 63)
    lines, agreed = transcript(registers, timer=timer, ring=ring, indirect=indirect)
    assert lines == expected
    assert made[0].errors == []
    assert not made[0].asserted
    record(
        device="test (timer)" if timer else "test",
        transport="mmio legacy" if version == 1 else "mmio modern",
        carrier="in process",
        ring=", ".join(
            ["packed" if "RING_PACKED" in agreed else "split"]
            + [name.lower() for name in ("IN_ORDER", "EVENT_IDX") if name in agreed]
        ),
        peer="virtio-test's driver",
    )


@VERSIONS
def test_what_a_driver_sees(version: Version) -> None:
    mmio, registers = machine(TestDevice(), version=version)
    assert isinstance(registers, Registers)
    assert isinstance(registers.access, MmioAccess)
    assert (registers.transport, registers.legacy, registers.version) == ("mmio", version == 1, version)
    assert (registers.device_id(), registers.vendor_id(), registers.config_size()) == (45, 0x1AF4, 0xF00)
    offered = mmio.bank.legacy_features() if version == 1 else TestDevice().features.bits
    assert registers.device_features() == offered
    assert registers.queue_max_sizes() == [128]
    assert mmio.errors == []


def test_a_legacy_driver_gets_a_legacy_queue() -> None:
    mmio, registers = machine(TestDevice(console=lambda _: None), version=1)
    driver = TestDriver(registers, console=lambda _: None)
    assert "VERSION_1" not in driver.initialize()
    layout = driver.queues[0].layout()
    assert layout.desc % 4096 == layout.device % 4096 == 0 != layout.desc
    registers.write("QueueSel", 0)
    assert registers.read("QueuePFN") == layout.desc // 4096
    assert driver.request(3).ret == 104
    registers.write_status(0)
    registers.write("QueueSel", 0)
    assert registers.read("QueuePFN") == 0
    assert mmio.errors == []


def test_the_page_size_survives_a_reset() -> None:
    # Linux says it once, when it probes the device, and resets the device after that.
    mmio, registers = machine(TestDevice(), version=1)
    registers.write("GuestPageSize", 8192)
    registers.write_status(0)
    registers.write("QueueSel", 0)
    registers.write("QueueAlign", 4096)
    registers.write("QueuePFN", 3)
    assert mmio.bank.slots[0].desc == 3 * 8192
    assert registers.read("QueuePFN") == 3


@pytest.mark.row("Q17")
@pytest.mark.parametrize(
    ("register", "value", "rule"),
    [
        ("GuestPageSize", 0, "BadGuestPageSize"),
        ("GuestPageSize", 4097, "BadGuestPageSize"),
        ("QueueAlign", 0, "BadQueueAlign"),
        ("QueueAlign", 12, "BadQueueAlign"),
        ("QueuePFN", 1, "NoGuestPageSize"),
        ("GuestFeatures", 1, "FeatureNotOffered"),
    ],
)
def test_what_a_legacy_driver_must_not_write(register: str, value: int, rule: str) -> None:
    mmio, registers = machine(TestDevice(), version=1)
    registers.write("GuestFeaturesSel", 1)
    registers.write(register, value)
    assert dict(mmio.bank.ignored) == {rule: 1}
    assert registers.read("QueuePFN") == 0


def test_a_legacy_queue_in_use_is_frozen() -> None:
    mmio, registers = machine(TestDevice(console=lambda _: None), version=1)
    driver = TestDriver(registers, console=lambda _: None)
    driver.initialize()
    page = registers.read("QueuePFN")
    registers.write("QueuePFN", page + 1)
    registers.write("QueueAlign", 8192)
    assert dict(mmio.bank.ignored) == {"EnabledQueueWritten": 2}
    assert registers.read("QueuePFN") == page
    assert driver.request(1).ret == 102
    registers.disable_queue(0)
    with pytest.raises(InvalidArgument, match="at no page"):
        registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(8, 0x1010)))


@VERSIONS
def test_a_queue_is_taken_back(version: Version) -> None:
    mmio, registers = machine(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,)), version=version)
    driver = Driver(registers)
    driver.initialize()
    registers.disable_queue(0)
    assert not mmio.bank.slots[0].enabled
    registers.enable_queue(driver.queues[0].config)
    assert mmio.bank.slots[0].enabled
    with pytest.raises(QueueViolation) as found:
        registers.enable_queue(driver.queues[0].config)
    assert found.value.rule == "QueueInUse"


def test_one_queue_is_reset_alone() -> None:
    mmio, registers = machine(BaseDevice(7, handlers={0: kept(lambda _: None), 1: bytes.upper}, queue_sizes=(8, 8)))
    driver = Driver(registers)
    driver.initialize()
    lost = driver.submit(0, [b"x"], [1])
    assert driver.reset_queue(0) == [lost]
    assert driver.submit(1, [b"x"], [1]).wait() == b"X"
    assert mmio.errors == []


def test_a_kick_carries_the_position_when_negotiated() -> None:
    device = BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(4,))
    for ring in ("split", "packed"):
        kicks: list[int] = []

        def spy(value: int, kicks: list[int] = kicks) -> int:
            kicks.append(value)
            return value

        writes: dict[str, WriteOverride] = {"QueueNotify": spy}
        _, registers = machine(device, writes=writes, offered=device.features | FeatureSet("NOTIFICATION_DATA"))
        driver = Driver(registers, wanted=RINGS[ring] | FeatureSet("NOTIFICATION_DATA"))
        driver.initialize()
        for text in (b"a", b"b", b"c"):
            assert driver.submit(0, [text], [1]).wait() == text.upper()
        # A packed chain of two descriptors takes two places of four, and the wrap counter is bit 15.
        expected = [1, 2, 3] if ring == "split" else [0x8002, 0x0000, 0x0002]
        assert [value >> 16 for value in kicks[-3:]] == expected
        assert all(value & 0xFFFF == 0 for value in kicks)


def test_shared_memory_is_found() -> None:
    _, registers = machine(TestDevice(), shared_memory={3: (0x10_0000_0000, 0x2000)})
    assert registers.shared_memory(3) == (0x10_0000_0000, 0x2000)
    assert registers.shared_memory(0) is None
    _, legacy = machine(TestDevice(), version=1)
    with pytest.raises(StateError, match="legacy"):
        legacy.shared_memory(0)


@VERSIONS
def test_configuration_fields_of_every_width(version: Version) -> None:
    layout = ConfigLayout(("mac", "bytes(6)", "rw"), ("mtu", "le16", "rw"), ("wide", "le64", "rw"), ("odd", "u8", "rw"))
    values = {"mac": b"abcdef", "mtu": 0x1234, "wide": 0x1122_3344_5566_7788, "odd": 9}
    device = BaseDevice(1, handlers={0: bytes.upper}, config=ConfigSpace(layout, **values))
    mmio = VirtioMmio(device, version=version)
    access = MmioLoopback(mmio)
    driver = Driver(MmioRegisters(access), layout=layout)
    driver.initialize()
    assert {name: driver.read_field(name) for name in values} == values
    for name, value in (("mac", b"ABCDEF"), ("mtu", 1), ("wide", 2**63), ("odd", 255)):
        driver.write_field(name, value)
        assert mmio.device.config[name] == value
    assert mmio.errors == []
    seen: list[tuple[int, int]] = []
    read = access.read
    access.read = lambda offset, size: (seen.append((offset - CONFIG, size)), read(offset, size))[1]
    driver.read_field("wide")
    # As wide as the field, and a legacy driver byte by byte, twice.
    looks = [(8, 4), (12, 4)] if version == 2 else [(at, 1) for at in range(8, 16)] * 2
    assert [each for each in seen if each[0] >= 0] == looks


# --- devices that are wrong --------------------------------------------------------------------------------


def wrong(
    registers: dict[str, Override] | None = None,
    writes: dict[str, WriteOverride] | None = None,
    *,
    version: Version = 2,
    **options: Any,
) -> Driver:
    """A driver before a device whose registers are wrong on purpose."""
    mmio = VirtioMmio(
        BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,)),
        version=version,
        registers=registers or {},
        writes=writes or {},
        **options,
    )
    return Driver(MmioRegisters(MmioLoopback(mmio)), wanted=RINGS["split"])


def endless(value: int) -> Override:
    """Reads so each time, to whoever gives up in time."""
    looks = iter(range(10_000))

    def look(_: int) -> int:
        assert next(looks, None) is not None
        return value

    return look


def counting() -> Override:
    count = iter(range(1, 1 << 30))
    return lambda _: next(count)


@pytest.mark.parametrize(
    ("register", "value", "rule"),
    [
        ("MagicValue", 0, "BadMagic"),
        ("MagicValue", MAGIC ^ 1, "BadMagic"),
        ("MagicValue", 0xFFFF_FFFF, "BadMagic"),
        ("Version", 0, "UnknownVersion"),
        ("Version", 3, "UnknownVersion"),
        ("Version", 0xFFFF_FFFF, "UnknownVersion"),
    ],
)
def test_no_device_that_we_know(register: str, value: int, rule: str) -> None:
    with pytest.raises(StatusViolation) as found:
        wrong({register: value})
    assert (found.value.rule, found.value.clause) == (rule, "4.2.2.2")


def test_device_id_0_touches_nothing_more() -> None:
    mmio = VirtioMmio(TestDevice(), registers={"DeviceID": 0})
    access = MmioLoopback(mmio)
    touched: list[int] = []
    read = access.read
    access.read = lambda offset, size: (touched.append(offset), read(offset, size))[1]
    access.write = lambda offset, size, value: touched.append(offset)  # noqa: ARG005 - the access's own names
    with pytest.raises(StateError, match="no device here"):
        MmioRegisters(access)
    assert touched == [REGISTERS[name].offset for name in ("MagicValue", "Version", "DeviceID")]


WRONG: list[tuple[dict[str, Override], dict[str, WriteOverride], str]] = [
    ({"QueueSizeMax": 0x8001}, {}, "QueueSizeMaxTooLarge"),
    ({"QueueSizeMax": 0xFFFF_FFFF}, {}, "QueueSizeMaxTooLarge"),
    ({"QueueSizeMax": 24}, {}, "QueueSizeMaxNoPowerOfTwo"),
    ({"QueueSizeMax": endless(8)}, {}, "TooManyQueues"),
    ({"QueueReady": 1}, {}, "QueueInUse"),
    ({"QueueReady": 0}, {}, "QueueNotReady"),
    ({"QueueReady": lambda honest: honest * 3}, {}, "QueueNotReady"),
    ({"Status": lambda honest: honest & ~Status.FEATURES_OK}, {}, "FeaturesRefused"),
    ({"Status": lambda honest: honest & ~Status.ACKNOWLEDGE}, {}, "StatusBitLost"),
    ({"Status": lambda honest: honest | 0x20 if honest else 0}, {}, "StatusBitInvented"),
    ({"DeviceFeatures": 0}, {}, "Version1NotOffered"),
    ({}, {"QueueReady": lambda _: None}, "QueueNotReady"),
    ({}, {"DriverFeatures": lambda _: None}, "FeaturesRefused"),
]
WRONG_LEGACY: list[tuple[dict[str, Override], str]] = [
    ({"QueueSizeMax": 24}, "QueueSizeMaxNoPowerOfTwo"),
    ({"QueuePFN": 1}, "QueueInUse"),
    ({"QueuePFN": 0}, "QueueNotReady"),
    ({"QueuePFN": lambda honest: honest and honest + 1}, "QueueNotReady"),
]


@pytest.mark.row("G16", "G17")
@pytest.mark.parametrize(("registers", "writes", "rule"), WRONG)
def test_a_device_that_does_not_come_up(
    registers: dict[str, Override], writes: dict[str, WriteOverride], rule: str
) -> None:
    driver = wrong(registers, writes)
    with pytest.raises(RuleViolation) as found:
        driver.initialize()
    assert found.value.rule == rule
    assert not driver.live


@pytest.mark.parametrize(("registers", "rule"), WRONG_LEGACY)
def test_a_legacy_device_that_does_not_come_up(registers: dict[str, Override], rule: str) -> None:
    with pytest.raises(RuleViolation) as found:
        wrong(registers, version=1).initialize()
    assert found.value.rule == rule


@pytest.mark.parametrize("clock", [VirtualClock, MonotonicClock])
def test_a_reset_that_never_ends(clock: type[VirtualClock] | type[MonotonicClock]) -> None:
    driver = wrong({"Status": lambda honest: honest or 1}, loop=OwnerLoop(clock=clock()))
    driver.timeout = 0.05
    with pytest.raises(PeerTimeout, match="end of the reset"):
        driver.initialize()


@pytest.mark.parametrize("clock", [VirtualClock, MonotonicClock])
def test_a_reset_that_takes_its_time(clock: type[VirtualClock] | type[MonotonicClock]) -> None:
    left = [20]

    def slow(honest: int) -> int:
        left[0] -= honest == 0
        return honest or int(left[0] > 0)

    driver = wrong({"Status": slow}, loop=OwnerLoop(clock=clock()))
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"X"


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("register", "act", "rule"),
    [
        ("QueueReset", "reset_queue", "QueueResetEndless"),
        ("QueueReady", "reset_queue", "QueueStaysReady"),
        ("QueueReady", "disable_queue", "QueueStaysReady"),
    ],
)
def test_a_queue_that_is_never_let_go(register: str, act: str, rule: str, *, inside: bool) -> None:
    stuck = [False]
    driver = wrong({register: lambda honest: 1 if stuck[0] else honest})
    driver.initialize()
    registers = driver.registers
    assert isinstance(registers, MmioRegisters)
    registers.timeout = 0.02
    stuck[0] = True
    if inside:
        driver.loop.call_soon(lambda: getattr(registers, act)(0))
    with pytest.raises(QueueViolation) as found:
        driver.loop.run(timeout=1) if inside else getattr(registers, act)(0)
    assert (found.value.rule, found.value.queue) == (rule, 0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_queue_reset_that_takes_its_time(*, inside: bool) -> None:
    left = [0]

    def slow(_: int) -> int:
        left[0] -= 1
        return int(left[0] > 0)

    driver = wrong({"QueueReset": slow})
    driver.initialize()
    left[0] = 5
    done: list[object] = []
    if inside:
        driver.loop.call_soon(lambda: done.append(driver.registers.reset_queue(0)))
        driver.loop.run_pending()
    else:
        done.append(driver.registers.reset_queue(0))
    assert done == [None]
    assert left[0] == 0


@pytest.mark.row("G15")
def test_a_generation_that_never_stands_still() -> None:
    layout = ConfigLayout(("field", "le32"))
    mmio = VirtioMmio(
        BaseDevice(1, handlers={0: bytes.upper}, config=ConfigSpace(layout)), registers={"ConfigGeneration": counting()}
    )
    driver = Driver(MmioRegisters(MmioLoopback(mmio)), layout=layout)
    driver.initialize()
    with pytest.raises(StatusViolation) as found:
        driver.read_field("field")
    assert found.value.rule == "ConfigNeverStable"


def test_a_legacy_value_that_never_stands_still() -> None:
    layout = ConfigLayout(("field", "le32"))
    config = ConfigSpace(layout)
    mmio = VirtioMmio(BaseDevice(1, handlers={0: bytes.upper}, config=config), version=1)
    access = MmioLoopback(mmio)
    read = access.read
    count = iter(range(1 << 30))

    def torn(offset: int, size: int) -> int:
        config["field"] = next(count)
        return read(offset, size)

    driver = Driver(MmioRegisters(access), layout=layout)
    driver.initialize()
    access.read = torn
    with pytest.raises(StatusViolation) as found:
        driver.read_field("field")
    assert found.value.rule == "ConfigNeverStable"


def test_a_shared_memory_region_beyond_all_addresses() -> None:
    mmio = VirtioMmio(TestDevice(), registers={"SHMBaseHigh": 0xFFFF_FFFF, "SHMLenHigh": 0xFFFF_FFF0})
    with pytest.raises(StatusViolation) as found:
        MmioRegisters(MmioLoopback(mmio)).shared_memory(0)
    assert found.value.rule == "BadSharedMemory"


# --- interrupts --------------------------------------------------------------------------------------------


@pytest.mark.row("G09")
@pytest.mark.parametrize("status", [0, 0xFFFF_FFFC])
def test_a_line_without_a_cause(status: int) -> None:
    driver = wrong({"InterruptStatus": status})
    driver.initialize()
    request = driver.submit(0, [b"x"], [1])
    with pytest.raises(StatusViolation) as found:
        driver.loop.run(timeout=10)
    assert (found.value.rule, found.value.clause) == ("InterruptWithoutCause", "4.2.2.1")
    driver.loop.run(timeout=10)
    assert not request.done
    registers = driver.registers
    assert isinstance(registers, MmioRegisters)
    assert registers.spurious == MAX_SPURIOUS


def test_an_interrupt_that_cannot_be_silenced_stops_no_clock() -> None:
    driver = wrong(writes={"InterruptACK": lambda _: None})
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"X"
    assert driver.submit(0, [b"y"], [1]).wait() == b"Y"
    start = driver.loop.clock.now()
    assert not driver.loop.run(timeout=5)
    assert driver.loop.clock.now() == pytest.approx(start + 5)


def test_undefined_bits_are_ignored_and_not_acknowledged() -> None:
    acknowledged: list[int] = []

    def spy(value: int) -> int:
        acknowledged.append(value)
        return value

    driver = wrong({"InterruptStatus": lambda honest: honest | 0xFFFF_FFF0}, {"InterruptACK": spy})
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"X"
    assert acknowledged == [1]


def test_a_device_that_breaks_is_heard() -> None:
    mmio, registers = machine(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,)))
    driver = Driver(registers)
    driver.initialize()
    mmio.bank.broken(QueueViolation("Broken", "2.1.2", "on purpose", queue=0))
    driver.loop.run_pending()
    assert isinstance(driver.broken, DeviceNeedsReset)
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"X"


def test_the_line_is_sampled_when_its_turn_comes() -> None:
    mmio = VirtioMmio(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,)))
    access = MmioLoopback(mmio)
    driver = Driver(MmioRegisters(access))
    driver.initialize()
    calls: list[int] = []
    access.listen(line=lambda: calls.append(1))
    mmio.bank.on_call(0)
    assert mmio.asserted
    mmio.acknowledge(1)
    access.loop.run_pending()
    assert calls == []


def test_a_line_that_was_asserted_before_is_heard() -> None:
    mmio = VirtioMmio(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,)))
    mmio.bank.on_call(0)
    access = MmioLoopback(mmio)
    calls: list[int] = []
    access.listen(line=lambda: calls.append(1))
    access.loop.run_pending()
    assert calls == [1]


def test_our_own_mistakes() -> None:
    access = MmioLoopback(VirtioMmio(TestDevice(), memory=GuestMemory([(0, 4096)])))
    for act in (
        lambda: access.read(0, 3),
        lambda: access.write(0, 16, 0),
        lambda: access.write(0, 1, 256),
        lambda: access.write(0, 4, -1),
        lambda: MmioRegisters(access, size=0x80),
    ):
        with pytest.raises(InvalidArgument):
            act()
    assert driver_mmio.MAX_QUEUES == 1024

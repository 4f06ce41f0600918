"""The registers of virtio-mmio, both versions, as a driver that writes what it is told to sees them."""

from __future__ import annotations

from typing import Any, Final

import pytest
from virtio_test._core import DriverQueue, Notifier, QueueConfig, RingLayout
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import TestDevice
from virtio_test.errors import InvalidArgument, QueueViolation
from virtio_test.features import FeatureSet
from virtio_test.spec.mmio import CONFIG, LEGACY_REGISTERS, REGISTERS
from virtio_test.status import Status
from virtio_test.transport.mmio import LEGACY, MODERN, PAGE, Override, Row, VirtioMmio, WriteOverride

S = Status
UP = S.ACKNOWLEDGE | S.DRIVER
READY = UP | S.FEATURES_OK
LIVE = READY | S.DRIVER_OK
SIZE: Final = 16
BASE: Final = 0x4000
SPLIT = FeatureSet("VERSION_1", "RING_RESET", "EVENT_IDX")


class Machine:
    """A device that answers in upper case, and the registers before it."""

    def __init__(self, device: BaseDevice | None = None, **options: Any) -> None:
        if device is None:
            device = BaseDevice(7, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(SIZE, SIZE))
        self.device = device
        self.mmio = VirtioMmio(device, **options)
        self.levels: list[bool] = []
        self.mmio.interrupt = self.levels.append
        self.table = LEGACY_REGISTERS if self.mmio.legacy else REGISTERS

    def get(self, name: str) -> int:
        return int.from_bytes(self.mmio.read(self.table[name].offset, 4), "little")

    def put(self, name: str, value: int) -> None:
        self.mmio.write(self.table[name].offset, value.to_bytes(4, "little"))

    def run(self) -> None:
        self.mmio.loop.run_pending()

    def rules(self) -> dict[str, int]:
        return dict(self.mmio.bank.ignored)

    def features(self, features: FeatureSet = SPLIT) -> None:
        for select in range(2):
            self.put("DriverFeaturesSel", select)
            self.put("DriverFeatures", features.word(select))

    def status(self, *values: int) -> int:
        for value in values:
            self.put("Status", int(value))
        return self.get("Status")

    def ready(self, features: FeatureSet = SPLIT) -> None:
        self.status(0, S.ACKNOWLEDGE, UP)
        self.features(features)
        assert self.status(READY) == READY

    def place(self, index: int = 0, *, size: int = SIZE, **areas: int) -> RingLayout:
        layout = RingLayout.contiguous(size, BASE * (index + 1))
        self.put("QueueSel", index)
        self.put("QueueSize", size)
        for name in ("desc", "driver", "device"):
            address: int = areas[name] if name in areas else getattr(layout, name)
            self.put(f"Queue{name.title()}Low", address & 0xFFFF_FFFF)
            self.put(f"Queue{name.title()}High", address >> 32)
        return layout

    def live(self) -> DriverQueue:
        self.ready()
        layout = self.place()
        self.put("QueueReady", 1)
        assert self.status(LIVE) == LIVE
        self.run()
        return self.queue(layout)

    def queue(self, layout: RingLayout, index: int = 0) -> DriverQueue:
        config = QueueConfig.from_layout(layout, index=index, features=self.mmio.bank.accepted.bits)
        kick = Notifier.callback(lambda: self.put("QueueNotify", index))
        return DriverQueue(self.mmio.memory, config, kick=kick)

    def answers(self, queue: DriverQueue) -> bool:
        """Whether a request is answered, with an interrupt, which is then acknowledged."""
        self.mmio.memory.write(0x1000, b"hello")
        self.mmio.memory.fill(0x2000, 64)
        token = queue.add([(0x1000, 5)], [(0x2000, 64)])
        queue.enable_calls()
        queue.signal()
        assert not self.mmio.asserted, "a kick is answered before anything runs"
        self.run()
        if queue.get_used() != (token, 5):
            return False
        assert self.mmio.memory.read(0x2000, 5) == b"HELLO"
        assert self.get("InterruptStatus") == 1
        assert self.mmio.asserted
        self.put("InterruptACK", 1)
        assert not self.mmio.asserted
        return True


# --- the tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "registers"), [(MODERN, REGISTERS), (LEGACY, LEGACY_REGISTERS)])
def test_the_rows_are_those_of_the_specification(rows: dict[int, Row], registers: dict[str, tuple[int, str]]) -> None:
    found = {row.name: (offset, "R" * bool(row.read) + "W" * bool(row.write)) for offset, row in rows.items()}
    assert found == dict(registers)


def test_what_every_device_says_of_itself() -> None:
    machine = Machine(TestDevice(), vendor_id=0x1234_5678)
    assert machine.mmio.read(0, 4) == b"virt"
    assert [machine.get(name) for name in ("Version", "DeviceID", "VendorID")] == [2, 45, 0x1234_5678]
    assert Machine(version=1).get("Version") == 1
    assert machine.rules() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version is 3"),
        ({"registers": {"QueuePFN": 1}}, "no register 'QueuePFN'"),
        ({"writes": {"Bogus": int}}, "no register 'Bogus'"),
        ({"shared_memory": {256: (0, 1)}}, "region 256"),
        ({"shared_memory": {0: (1 << 64, 1)}}, "region 0"),
        ({"shared_memory": {0: (-1, 1)}}, "region 0"),
        ({"shared_memory": {0: (0, 1)}, "version": 1}, "legacy"),
        ({"vendor_id": 1 << 32}, "vendor id"),
        ({"offered": FeatureSet()}, "VERSION_1"),
        ({"offered": SPLIT | FeatureSet("NOTIF_CONFIG_DATA")}, "NOTIF_CONFIG_DATA"),
    ],
)
def test_what_cannot_be_declared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Machine(**options)


def test_a_device_without_legacy_rules_has_no_version_1() -> None:
    device = BaseDevice(7, handlers={0: bytes.upper}, transitional=False)
    with pytest.raises(InvalidArgument, match="no legacy rules"):
        Machine(device, version=1)


# --- accesses (4.2.2.2) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (0, 2), (0, 8), (2, 4), (1, 1), (0x70, 1), (0xFE, 4), (0x50, 2)]
)
def test_control_registers_take_aligned_words_only(version: int, offset: int, length: int) -> None:
    machine = Machine(version=version)
    assert machine.mmio.read(offset, length) == bytes(length)
    machine.mmio.write(offset, b"\xff" * length)
    assert machine.rules() == {"RegisterWidth": 2}
    assert machine.get("Status") == 0


@pytest.mark.parametrize(
    ("version", "offset"), [(2, 0x018), (2, 0x040), (2, 0x0D0), (1, 0x044), (1, 0x0FC), (1, 0x080)]
)
def test_a_place_without_a_register_reads_0(version: int, offset: int) -> None:
    machine = Machine(version=version)
    assert machine.mmio.read(offset, 4) == bytes(4)
    machine.mmio.write(offset, b"\xff" * 4)
    assert machine.rules() == {"NoSuchRegister": 2}


@pytest.mark.parametrize("version", [1, 2])
def test_directions(version: int) -> None:
    machine = Machine(version=version)
    one_way = {name: each.access for name, each in machine.table.items() if each.access != "RW"}
    for name, access in one_way.items():
        if access == "R":
            before = machine.get(name)
            machine.put(name, 0xFFFF_FFFF)
            assert machine.get(name) == before
        else:
            assert machine.get(name) == 0
    rules = machine.rules()
    assert rules["ReadOnlyRegister"] == list(one_way.values()).count("R")
    assert rules["WriteOnlyRegister"] == list(one_way.values()).count("W")


@pytest.mark.parametrize(("offset", "length"), [(-4, 4), (PAGE, 4), (PAGE - 2, 4), (0, 0), (0, -1), (0, PAGE + 1)])
def test_what_is_no_access_to_the_page_is_our_mistake(offset: int, length: int) -> None:
    with pytest.raises(InvalidArgument, match="no access"):
        Machine().mmio.read(offset, length)


def test_a_selector_is_written_before_it_is_used() -> None:
    machine = Machine()
    machine.get("DeviceFeatures")
    machine.put("DriverFeatures", 0)
    assert machine.rules() == {"SelectNotWritten": 2}


# --- configuration space -----------------------------------------------------------------------------------


def configured(**options: Any) -> Machine:
    layout = ConfigLayout(("mac", "bytes(6)", "rw"), ("mtu", "le16", "rw"), ("wide", "le64", "rw"), ("word", "le32"))
    config = ConfigSpace(layout, mac=b"abcdef", mtu=0x1234, wide=0x1122_3344_5566_7788, word=7)
    return Machine(BaseDevice(1, handlers={0: bytes.upper}, config=config), **options)


def test_fields_are_read_as_wide_as_they_are() -> None:
    machine = configured()
    read = machine.mmio.read
    assert b"".join(read(CONFIG + at, 1) for at in range(6)) == b"abcdef"
    assert read(CONFIG + 6, 2) == b"\x34\x12"
    assert read(CONFIG + 8, 4) + read(CONFIG + 12, 4) == bytes.fromhex("8877665544332211")
    machine.mmio.write(CONFIG + 2, b"X")
    machine.mmio.write(CONFIG + 8, bytes(4))
    assert (machine.device.config["mac"], machine.device.config["wide"]) == (b"abXdef", 0x1122_3344_0000_0000)
    assert machine.rules() == {}


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (4, 4), (6, 1), (8, 1), (8, 2), (0, 2)])
def test_another_width_is_served_and_noted(offset: int, length: int) -> None:
    machine = configured()
    whole = b"abcdef\x34\x12" + bytes.fromhex("8877665544332211")
    assert machine.mmio.read(CONFIG + offset, length) == whole[offset : offset + length]
    assert machine.rules() == {"ConfigAccessWidth": 1}
    legacy = configured(version=1)
    assert legacy.mmio.read(CONFIG + offset, length) == whole[offset : offset + length]
    assert legacy.rules() == {}


@pytest.mark.parametrize(("offset", "length"), [(0, 8), (1, 2), (2, 4), (0, 3), (0, 16)])
def test_what_no_field_can_be_is_not_served(offset: int, length: int) -> None:
    machine = configured()
    assert machine.mmio.read(CONFIG + offset, length) == bytes(length)
    machine.mmio.write(CONFIG + offset, b"\xff" * length)
    assert machine.device.config["mac"] == b"abcdef"
    assert machine.rules() == {"ConfigAccess": 2}


@pytest.mark.row("X09")
def test_behind_the_end_there_is_nothing() -> None:
    machine = configured()
    assert machine.mmio.read(CONFIG + 20, 4) == bytes(4)
    machine.mmio.write(PAGE - 4, b"\xff" * 4)
    assert machine.rules() == {"ConfigOutOfRange": 2}
    odd = Machine(
        BaseDevice(1, handlers={0: bytes.upper}, config=ConfigSpace(ConfigLayout(("a", "bytes(5)")), a=b"abcde"))
    )
    assert odd.mmio.read(CONFIG + 4, 4) == b"e\0\0\0"


def test_the_generation_moves_with_what_was_seen() -> None:
    machine = configured()
    before = machine.get("ConfigGeneration")
    machine.mmio.read(CONFIG, 1)
    machine.device.config["mtu"] = 1
    assert machine.get("ConfigGeneration") == before + 1
    assert machine.get("ConfigGeneration") == before + 1


def test_a_configuration_change_interrupts_once_the_driver_is_live() -> None:
    machine = configured()
    machine.device.config["mtu"] = 1
    machine.run()
    assert machine.levels == []
    machine.ready()
    machine.status(LIVE)
    machine.device.config["mtu"] = 2
    machine.run()
    assert (machine.get("InterruptStatus"), machine.levels) == (2, [True])
    machine.put("InterruptACK", 1)
    assert machine.mmio.asserted, "the other bit was acknowledged"
    machine.put("InterruptACK", 2)
    assert (machine.get("InterruptStatus"), machine.levels) == (0, [True, False])


# --- features and status (2.7 of the catalogue) ------------------------------------------------------------


def test_features_come_in_words() -> None:
    machine = Machine()
    words: list[int] = []
    for select in (0, 1, 2, 3, 4, 0xFFFF_FFFF):
        machine.put("DeviceFeaturesSel", select)
        words.append(machine.get("DeviceFeatures"))
    assert words == [machine.device.features.word(0), machine.device.features.word(1), 0, 0, 0, 0]
    machine.put("DriverFeaturesSel", 0xFFFF_FFFF)
    machine.put("DriverFeatures", 1)
    assert machine.rules() == {"FeatureNotOffered": 1}


@pytest.mark.parametrize(
    ("features", "rule"),
    [
        (FeatureSet("EVENT_IDX"), "Version1NotAccepted"),
        (SPLIT | FeatureSet("SUSPEND"), "FeatureNotOffered"),
        (SPLIT | FeatureSet.from_bits(1 << 5), "FeatureNotOffered"),
    ],
)
def test_bad_features_leave_features_ok_clear(features: FeatureSet, rule: str) -> None:
    machine = Machine()
    machine.status(0, S.ACKNOWLEDGE, UP)
    machine.features(features)
    assert machine.status(READY) == UP
    assert machine.rules()[rule] == 1


def test_features_are_frozen_by_features_ok() -> None:
    machine = Machine()
    machine.ready()
    machine.features(machine.device.features)
    assert machine.mmio.bank.accepted == SPLIT
    assert machine.rules() == {"FeaturesAfterOk": 2}


@pytest.mark.parametrize(
    ("before", "write", "after", "rule"),
    [
        ((S.ACKNOWLEDGE, UP), UP | S.DRIVER_OK, UP, "DriverOkWithoutFeaturesOk"),
        ((S.ACKNOWLEDGE, UP), S.ACKNOWLEDGE, UP, "StatusBitCleared"),
        ((S.ACKNOWLEDGE, UP), UP | S.DEVICE_NEEDS_RESET, UP, "DriverSetNeedsReset"),
        ((S.ACKNOWLEDGE, UP), UP | 0x20, UP, "UndefinedStatusBit"),
        ((S.ACKNOWLEDGE, UP), UP | 0xABCD_0000, UP, "UndefinedStatusBit"),
        ((S.ACKNOWLEDGE, UP, UP | S.FAILED), READY | S.FAILED, UP | S.FAILED, "StatusAfterFailed"),
    ],
)
def test_status_bits_that_a_driver_may_not_write(before: tuple[int, ...], write: int, after: int, rule: str) -> None:
    machine = Machine()
    machine.status(*before)
    assert machine.status(write) == after
    assert machine.rules()[rule] == 1


def test_driver_ok_twice_activates_once() -> None:
    machine = Machine()
    queue = machine.live()
    device_end = machine.mmio.bank.queue(0)
    machine.status(LIVE)
    machine.run()
    assert machine.mmio.bank.queue(0) is device_end
    assert machine.answers(queue)


@pytest.mark.parametrize("moment", range(6))
def test_a_reset_in_every_state(moment: int) -> None:
    machine = Machine(BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(SIZE,)))
    steps = [
        lambda: machine.status(S.ACKNOWLEDGE, UP),
        machine.features,
        lambda: machine.status(READY),
        lambda: (machine.place(), machine.put("QueueReady", 1)),
        lambda: machine.status(LIVE),
        lambda: machine.mmio.bank.broken(InvalidArgument("broken on purpose")),
    ]
    for step in steps[: moment + 1]:
        step()
    machine.run()
    assert machine.status(0) == 0
    assert machine.status(0) == 0
    machine.put("QueueSel", 0)
    assert (machine.get("QueueReady"), machine.get("InterruptStatus"), machine.mmio.asserted) == (0, 0, False)
    again = Machine()
    again.mmio.bank.broken(InvalidArgument("broken on purpose"))
    assert again.answers(again.live())


def test_a_completion_after_a_reset_reaches_nobody() -> None:
    device = BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(SIZE,))
    machine = Machine(device)
    queue = machine.live()
    machine.mmio.memory.fill(0x2000, 64)
    queue.add([(0x1000, 5)], [(0x2000, 64)])
    queue.signal()
    machine.run()
    (chain,) = device.kept
    machine.status(0)
    assert not device.complete(chain, b"late")
    machine.run()
    assert machine.mmio.memory.read(0x2000, 4) == bytes(4)
    assert machine.levels == []


# --- queues (2.6 of the catalogue) -------------------------------------------------------------------------


def test_a_queue_as_the_specification_sets_it_up() -> None:
    machine = Machine()
    assert machine.answers(machine.live())
    assert machine.levels == [True, False]
    machine.put("QueueSel", 2)
    assert (machine.get("QueueSizeMax"), machine.get("QueueReady")) == (0, 0)
    assert machine.rules() == {}


@pytest.mark.parametrize("size", [0, 3, 12, SIZE * 2, 0x8001, 0x1_0000, 0x1_0010, 0xFFFF_FFFF])
def test_an_impossible_size_is_not_taken_over(size: int) -> None:
    machine = Machine()
    machine.ready()
    layout = machine.place(size=SIZE)
    machine.put("QueueSize", size)
    assert machine.rules() == {"BadQueueSize": 1}
    machine.put("QueueReady", 1)
    machine.status(LIVE)
    machine.run()
    assert machine.answers(machine.queue(layout))


def test_an_enabled_queue_is_frozen() -> None:
    machine = Machine()
    queue = machine.live()
    machine.place(size=8)
    machine.put("QueueReady", 1)
    assert machine.rules() == {"EnabledQueueWritten": 8}
    assert machine.answers(queue)


@pytest.mark.parametrize("value", [2, 3, 0xFFFF, 0xFFFF_FFFF])
def test_ready_is_0_or_1(value: int) -> None:
    machine = Machine()
    machine.ready()
    machine.place()
    machine.put("QueueReady", value)
    assert machine.get("QueueReady") == 0
    assert machine.rules() == {"BadQueueReady": 1}


@pytest.mark.parametrize(
    "areas", [{"desc": 8}, {"driver": 1}, {"device": 2}, {"desc": 1 << 40}, {"device": 0xFFFF_FFFC}]
)
def test_an_impossible_queue_breaks_the_device(areas: dict[str, int]) -> None:
    machine = Machine()
    machine.ready()
    machine.place(**areas)
    machine.put("QueueReady", 1)
    assert machine.get("Status") == READY | S.DEVICE_NEEDS_RESET
    assert isinstance(machine.mmio.errors[-1], QueueViolation)
    machine.run()
    assert machine.levels == [], "no notification before DRIVER_OK (2.1.2)"
    assert machine.status(0) == 0
    assert machine.answers(machine.live())


def test_a_broken_ring_is_told_by_a_configuration_interrupt() -> None:
    machine = Machine()
    queue = machine.live()
    machine.mmio.memory.write(queue.layout().at("avail.idx"), (SIZE + 1).to_bytes(2, "little"))
    machine.put("QueueNotify", 0)
    machine.run()
    assert machine.get("Status") == LIVE | S.DEVICE_NEEDS_RESET
    assert (machine.get("InterruptStatus"), machine.levels) == (2, [True])


def test_a_queue_that_is_taken_back_is_not_touched() -> None:
    machine = Machine()
    queue = machine.live()
    machine.put("QueueReady", 0)
    assert machine.get("QueueReady") == 0
    queue.add([(0x1000, 5)], [(0x2000, 64)])
    queue.publish()
    machine.put("QueueNotify", 0)
    machine.run()
    assert queue.get_used() is None
    machine.put("QueueSize", 8)
    layout = machine.place(size=8)
    machine.put("QueueReady", 1)
    assert machine.answers(machine.queue(layout))
    assert machine.rules() == {}


def test_a_queue_is_reset_alone() -> None:
    machine = Machine()
    machine.live()
    other = machine.place(1)
    machine.put("QueueReady", 1)
    machine.put("QueueSel", 0)
    machine.put("QueueReset", 1)
    assert (machine.get("QueueReset"), machine.get("QueueReady")) == (0, 0)
    layout = machine.place(size=8)
    machine.put("QueueReady", 1)
    assert machine.answers(machine.queue(layout))
    assert machine.answers(machine.queue(other, 1))


@pytest.mark.parametrize("value", [0, 2, 0xFFFF_FFFF])
def test_a_queue_reset_is_1_and_negotiated(value: int) -> None:
    machine = Machine()
    queue = machine.live()
    machine.put("QueueReset", value)
    assert machine.rules() == {"BadQueueReset": 1}
    assert machine.answers(queue)
    other = Machine()
    other.ready(SPLIT - FeatureSet("RING_RESET"))
    layout = other.place()
    other.put("QueueReady", 1)
    other.status(LIVE)
    other.put("QueueReset", 1)
    assert other.rules() == {"QueueResetNotNegotiated": 1}
    assert other.answers(other.queue(layout))


@pytest.mark.parametrize("value", [1, 2, 0xFFFF, 0x1_0000, 0xFFFF_FFFF])
def test_a_kick_for_nobody_does_nothing(value: int) -> None:
    machine = Machine()
    queue = machine.live()
    queue.add([(0x1000, 5)], [(0x2000, 64)])
    queue.publish()
    machine.put("QueueNotify", value)
    machine.run()
    assert queue.get_used() is None, "the value is the whole queue index"


def test_a_kick_may_carry_the_position() -> None:
    device = BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(SIZE,))
    machine = Machine(device, offered=device.features | FeatureSet("NOTIFICATION_DATA"))
    machine.ready(SPLIT | FeatureSet("NOTIFICATION_DATA"))
    queue = machine.queue(machine.place())
    machine.put("QueueReady", 1)
    machine.status(LIVE)
    machine.run()
    queue.add([(0x1000, 5)], [(0x2000, 64)])
    queue.publish()
    machine.put("QueueNotify", 0x0001_0000)
    machine.run()
    assert queue.get_used() is not None


def test_undefined_bits_are_not_acknowledged() -> None:
    machine = Machine()
    machine.live()
    machine.put("InterruptACK", 0xFFFF_FFFC)
    assert machine.rules() == {"UndefinedAckBits": 1}


# --- shared memory -----------------------------------------------------------------------------------------


def test_shared_memory_regions() -> None:
    machine = Machine(shared_memory={0: (0x1_2345_6000, 0x2_0000_1000), 7: (0x1000, 0)})

    def region(number: int) -> tuple[int, int]:
        machine.put("SHMSel", number)
        words = [machine.get(f"SHM{part}") for part in ("BaseHigh", "BaseLow", "LenHigh", "LenLow")]
        return words[0] << 32 | words[1], words[2] << 32 | words[3]

    none = (0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
    assert [region(number) for number in (0, 7, 1, 256)] == [(0x1_2345_6000, 0x2_0000_1000), (0x1000, 0), none, none]


# --- wrong on purpose --------------------------------------------------------------------------------------


def test_a_register_reads_what_it_is_told_to() -> None:
    count = iter(range(100))
    registers: dict[str, Override] = {
        "MagicValue": 0,
        "QueueSizeMax": lambda honest: honest * 3,
        "ConfigGeneration": lambda _: next(count),
        "DeviceFeaturesSel": -1,
    }
    machine = Machine(registers=registers)
    assert (machine.get("MagicValue"), machine.get("QueueSizeMax")) == (0, 3 * SIZE)
    assert [machine.get("ConfigGeneration") for _ in range(3)] == [0, 1, 2]
    assert machine.get("DeviceFeaturesSel") == 0xFFFF_FFFF


def test_a_write_becomes_what_it_is_told_to() -> None:
    writes: dict[str, WriteOverride] = {"Status": lambda value: value or None, "QueueSel": lambda _: 1}
    machine = Machine(writes=writes)
    machine.status(S.ACKNOWLEDGE, 0)
    assert machine.get("Status") == S.ACKNOWLEDGE
    machine.put("QueueSel", 0)
    assert machine.mmio.queue_sel == 1


def test_nothing_is_kept_for_queues_that_do_not_exist() -> None:
    machine = Machine(version=1)
    machine.put("GuestPageSize", 4096)
    for index in range(2, 500):
        machine.put("QueueSel", index)
        machine.put("QueueAlign", 8192)
        machine.put("QueuePFN", index)
    assert machine.mmio.aligns == {}
    assert machine.mmio.pages == {}
    assert machine.rules() == {"NoSuchQueue": 2 * 498}

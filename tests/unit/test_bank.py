"""`RegisterBank`: the legacy rules, memory that moves, and what a driver must not write.

What the bank shares with every transport is tried through the loopback, PCI and MMIO; here is what no
driver of ours does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, Literal

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.errors import InvalidArgument, QueueViolation, StateError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.status import Status
from virtio_test.transport.bank import MAX_ERRORS, RegisterBank

S = Status
UP = S.ACKNOWLEDGE | S.DRIVER
BASE = 0x4000
SIZE = 16


class Machine:
    """A bank, a device that answers in upper case, and a driver that writes what it is told to."""

    def __init__(self, device: BaseDevice | None = None) -> None:
        self.device = BaseDevice(7, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(SIZE, SIZE))
        if device is not None:
            self.device = device
        self.bank = RegisterBank(self.device)
        self.calls: list[int] = []
        self.changes: list[int] = []
        self.bank.on_call = self.calls.append
        self.bank.on_config = lambda: self.changes.append(self.bank.read_status())
        self.run = self.bank.loop.run_pending

    def bring_up(self, features: FeatureSet | None = None) -> None:
        """Everything but the queues and DRIVER_OK."""
        accepted = self.bank.offered - FeatureSet("RING_PACKED") if features is None else features
        for select in range(4):
            self.bank.write_driver_features(select, accepted.word(select))
        for status in (S.ACKNOWLEDGE, UP, UP | S.FEATURES_OK):
            self.bank.write_status(status)

    def modern_queue(self, index: int = 0, *, enable: bool = True) -> DriverQueue:
        layout = RingLayout.contiguous(SIZE, BASE * (index + 1))
        for area in ("desc", "driver", "device"):
            self.bank.write_queue_address(index, area, getattr(layout, area))
        if enable:
            self.bank.enable_queue(index)
        return self.driver_queue(layout, index)

    def driver_queue(self, layout: RingLayout, index: int = 0) -> DriverQueue:
        config = QueueConfig.from_layout(layout, index=index, features=self.bank.accepted.bits)
        return DriverQueue(self.bank.memory, config, kick=Notifier.callback(lambda: self.bank.kick(index)))

    def live(self) -> DriverQueue:
        self.bring_up()
        queue = self.modern_queue()
        self.bank.write_status(UP | S.FEATURES_OK | S.DRIVER_OK)
        self.run()
        return queue

    def rules(self) -> dict[str, int]:
        return dict(self.bank.ignored)

    def post(self, queue: DriverQueue, text: bytes = b"hello") -> int:
        self.bank.memory.write(0x1000, text)
        self.bank.memory.fill(0x2000, 64)
        token = queue.add([(0x1000, len(text))], [(0x2000, 64)])
        queue.signal()
        return token

    def answers(self, queue: DriverQueue) -> bool:
        """Whether a request is answered."""
        token = self.post(queue)
        self.run()
        return queue.get_used() == (token, 5) and self.bank.memory.read(0x2000, 5) == b"HELLO"


# --- the legacy interface -----------------------------------------------------------------------------------


def legacy_machine() -> tuple[Machine, DriverQueue]:
    machine = Machine()
    bank = machine.bank
    assert bank.claim("legacy")
    bank.write_status(S.ACKNOWLEDGE)
    bank.write_status(UP)
    bank.write_driver_features(0, bank.legacy_features())
    bank.place_legacy_queue(0, BASE)
    return machine, machine.driver_queue(RingLayout.legacy(SIZE, BASE))


def test_a_legacy_driver_has_no_features_ok() -> None:
    machine, queue = legacy_machine()
    machine.bank.write_status(UP | S.DRIVER_OK)
    assert machine.bank.read_status() == UP | S.DRIVER_OK
    assert machine.answers(queue)
    assert machine.calls == [0]
    assert "VERSION_1" not in machine.bank.accepted
    assert machine.bank.errors == []


def test_a_legacy_driver_may_use_the_device_before_driver_ok() -> None:
    machine, queue = legacy_machine()
    assert machine.answers(queue)
    assert machine.bank.read_status() == UP
    machine.bank.write_status(UP | S.DRIVER_OK)
    assert machine.answers(queue)
    assert machine.bank.errors == []


def test_the_legacy_offer_is_32_bits_with_the_legacy_features() -> None:
    machine = Machine()
    offered = FeatureSet.from_bits(machine.bank.legacy_features())
    assert "NOTIFY_ON_EMPTY" in offered
    assert "ANY_LAYOUT" in offered
    assert offered.bits < 1 << 32
    assert "NOTIFY_ON_EMPTY" not in FeatureSet.from_bits(machine.bank.device_features(0))


def test_what_a_legacy_driver_was_not_offered_it_does_not_get() -> None:
    machine, queue = legacy_machine()
    machine.bank.write_driver_features(0, 0xFFFF_FFFF)
    machine.bank.write_driver_features(1, 0xFFFF_FFFF)
    machine.bank.write_status(UP | S.DRIVER_OK)
    assert machine.bank.accepted.bits == machine.bank.legacy_features()
    assert machine.answers(queue)


def test_a_legacy_driver_takes_its_queue_back() -> None:
    machine, queue = legacy_machine()
    machine.bank.write_status(UP | S.DRIVER_OK)
    machine.bank.place_legacy_queue(0, 0)
    machine.post(queue)
    machine.run()
    assert queue.get_used() is None
    machine.bank.place_legacy_queue(0, 2 * BASE)
    assert machine.answers(machine.driver_queue(RingLayout.legacy(SIZE, 2 * BASE)))


@pytest.mark.parametrize("align", [0, 3, 4095])
def test_an_alignment_that_is_none_places_nothing(align: int) -> None:
    machine, _ = legacy_machine()
    machine.bank.place_legacy_queue(1, BASE, align=align)
    assert machine.rules() == {"BadQueueAddress": 1}
    assert not machine.bank.slots[1].enabled


@pytest.mark.parametrize("first", ["modern", "legacy"])
def test_nobody_drives_half_by_one_interface_and_half_by_the_other(first: Literal["modern", "legacy"]) -> None:
    machine = Machine()
    other: Literal["modern", "legacy"] = "legacy" if first == "modern" else "modern"
    assert machine.bank.claim(first)
    assert not machine.bank.claim(other)
    assert machine.rules() == {"MixedInterfaces": 1}
    machine.bank.write_status(0)
    assert machine.bank.claim(other)


# --- memory that moves --------------------------------------------------------------------------------------


def test_kicks_wait_while_memory_moves() -> None:
    machine = Machine()
    queue = machine.live()
    machine.bank.hold()
    machine.bank.memory.remove_region(0, 16 << 20)
    machine.bank.kick(0)
    machine.run()
    machine.bank.memory.add_region(0, 16 << 20)
    layout = RingLayout.contiguous(SIZE, BASE)
    fresh = machine.driver_queue(layout)
    token = machine.post(fresh)
    machine.run()
    assert fresh.get_used() is None
    machine.bank.release()
    machine.run()
    assert fresh.get_used() == (token, 5)
    assert machine.bank.errors == []
    assert queue.latched is None


def test_a_reset_forgets_what_waited() -> None:
    machine = Machine()
    machine.live()
    machine.bank.hold()
    machine.bank.kick(0)
    machine.run()
    machine.bank.reset()
    machine.bank.release()
    assert machine.run() == 0


def test_a_ring_whose_memory_has_gone_breaks_the_device_once() -> None:
    machine = Machine()
    machine.live()
    machine.bank.memory.remove_region(0, 16 << 20)
    for _ in range(3):
        machine.bank.kick(0)
        machine.run()
    assert machine.changes == [UP | S.FEATURES_OK | S.DRIVER_OK | S.DEVICE_NEEDS_RESET]
    assert len(machine.bank.errors) == 1
    machine.bank.write_status(0)
    assert machine.bank.read_status() == 0


# --- what a driver must not write ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, SIZE + 1, 2 * SIZE, 65536, 1 << 32, -1])
def test_an_impossible_size_is_not_taken_over(size: int) -> None:
    machine = Machine()
    machine.bring_up()
    machine.bank.write_queue_size(0, size)
    assert machine.bank.slots[0].size == SIZE
    assert machine.rules() == {"BadQueueSize": 1}


FROZEN: Final[list[Callable[[RegisterBank], None]]] = [
    lambda bank: bank.write_queue_size(0, 8),
    lambda bank: bank.write_queue_address(0, "desc", 0),
    lambda bank: bank.write_queue_address(0, "device", 1, half="high"),
    lambda bank: bank.enable_queue(0),
    lambda bank: bank.place_legacy_queue(0, 0x8000),
]


@pytest.mark.parametrize("write", FROZEN)
def test_an_enabled_queue_is_frozen(write: Callable[[RegisterBank], None]) -> None:
    machine = Machine()
    queue = machine.live()
    write(machine.bank)
    assert machine.rules() == {"EnabledQueueWritten": 1}
    assert machine.answers(queue)


@pytest.mark.parametrize("index", [-1, 2, 0xFFFF])
def test_a_queue_that_does_not_exist(index: int) -> None:
    machine = Machine()
    machine.live()
    bank = machine.bank
    bank.write_queue_size(index, 8)
    bank.write_queue_address(index, "driver", 0)
    bank.enable_queue(index)
    bank.place_legacy_queue(index, BASE)
    bank.disable_queue(index)
    bank.kick(index)
    assert machine.rules() == {"NoSuchQueue": 4}
    assert machine.run() == 0


def test_halves_make_an_address() -> None:
    machine = Machine()
    bank = machine.bank
    bank.write_queue_address(0, "desc", 0x1234_5678, half="low")
    bank.write_queue_address(0, "desc", 0x9ABC_DEF0, half="high")
    assert bank.slots[0].desc == 0x9ABC_DEF0_1234_5678
    bank.write_queue_address(0, "desc", 1, half="low")
    assert bank.slots[0].desc == 0x9ABC_DEF0_0000_0001


def test_a_queue_reset_alone_needs_the_feature() -> None:
    machine = Machine()
    machine.bring_up(machine.bank.offered - FeatureSet("RING_PACKED", "RING_RESET"))
    queue = machine.modern_queue()
    machine.bank.write_status(UP | S.FEATURES_OK | S.DRIVER_OK)
    machine.bank.reset_queue(0)
    assert machine.rules() == {"QueueResetNotNegotiated": 1}
    assert machine.answers(queue)


def test_features_are_frozen_by_features_ok() -> None:
    machine = Machine()
    machine.live()
    before = machine.bank.accepted
    machine.bank.write_driver_features(0, 0)
    assert machine.bank.accepted == before
    assert machine.rules() == {"FeaturesAfterOk": 1}


def test_features_beyond_the_last_word() -> None:
    machine = Machine()
    for select in (4, 0xFFFF_FFFF, -1):
        assert machine.bank.device_features(select) == machine.bank.driver_features(select) == 0
        machine.bank.write_driver_features(select, 0)
        machine.bank.write_driver_features(select, 1)
    assert machine.rules() == {"FeatureNotOffered": 3}


def test_a_requirement_of_the_class_is_one() -> None:
    names = {"FIRST": 0, "SECOND": 1}
    first, second = FeatureSet("FIRST", device=names), FeatureSet("SECOND", device=names)
    device = BaseDevice(7, handlers={0: bytes.upper}, features=first | second, requires={"SECOND": ("FIRST",)})
    machine = Machine(device)
    machine.bring_up(machine.bank.offered - FeatureSet("RING_PACKED") - first)
    assert machine.bank.read_status() == UP
    assert machine.rules()["BadFeatures"] == 1
    with pytest.raises(InvalidArgument, match="without FIRST"):
        RegisterBank(device, offered=device.features - first)


def test_an_impossible_queue_breaks_the_device_and_a_reset_mends_it() -> None:
    machine = Machine()
    machine.bring_up()
    machine.bank.write_queue_address(0, "desc", 0x1001)
    machine.bank.enable_queue(0)
    machine.bank.write_status(UP | S.FEATURES_OK | S.DRIVER_OK)
    assert machine.bank.read_status() & S.DEVICE_NEEDS_RESET
    assert isinstance(machine.bank.errors[0], QueueViolation)
    machine.bank.write_status(0)
    assert machine.answers(machine.live())


def test_errors_are_bounded_and_all_are_counted() -> None:
    machine = Machine()
    for _ in range(2 * MAX_ERRORS):
        machine.bank.write_queue_size(0, 3)
    assert len(machine.bank.errors) == MAX_ERRORS
    assert machine.rules() == {"BadQueueSize": 2 * MAX_ERRORS}


def test_a_completion_after_the_queue_was_taken_back_writes_nothing() -> None:
    device = BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(SIZE,))
    machine = Machine(device)
    queue = machine.live()
    machine.post(queue)
    machine.run()
    (chain,) = device.kept
    before = machine.bank.memory.read(BASE, 0x1000)
    machine.bank.reset_queue(0)
    assert device.complete(chain, b"late") is False
    assert machine.bank.memory.read(BASE, 0x1000) == before
    assert machine.bank.memory.read(0x2000, 4) == bytes(4)
    assert machine.calls == []


def test_a_bank_over_memory_of_its_owner() -> None:
    memory = GuestMemory([(0x10000, 0x10000)])
    loop = OwnerLoop()
    bank = RegisterBank(BaseDevice(7, handlers={0: bytes.upper}), memory=memory, loop=loop)
    assert bank.memory is memory
    assert bank.loop is loop
    assert bank.clock is loop.clock


# --- interrupts that come too late --------------------------------------------------------------------------


def test_a_call_that_waits_is_not_delivered_once_the_device_is_broken() -> None:
    machine = Machine()
    machine.live()
    machine.bank.call(0)
    machine.bank.broken(ValueError("the device's own"))
    machine.run()
    assert machine.calls == []
    assert len(machine.changes) == 1


def test_a_call_that_a_thread_pends_beside_a_queue_reset_is_not_delivered() -> None:
    machine = Machine()
    machine.live()
    machine.bank.reset_queue(0)
    # The thread has seen a live device, and pends only now.
    machine.bank.call(0)
    machine.run()
    assert machine.calls == []


# --- what it asks of its device ------------------------------------------------------------------------------


class Counting(BaseDevice):
    """Counts what its bank asks of it."""

    def __init__(self) -> None:
        super().__init__(7, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(SIZE, SIZE))
        self.asked = Counter[str]()

    def activate(self, features: FeatureSet) -> None:
        self.asked["activate"] += 1
        super().activate(features)

    def start_queue(self, queue: DeviceQueue) -> None:
        self.asked[f"start {queue.index}"] += 1
        super().start_queue(queue)

    def kicked(self, queue_index: int) -> bool:
        self.asked[f"kick {queue_index}"] += 1
        return super().kicked(queue_index)


def test_a_legacy_driver_that_was_served_before_driver_ok_activates_once() -> None:
    device = Counting()
    machine = Machine(device)
    assert machine.bank.claim("legacy")
    machine.bank.write_status(UP)
    machine.bank.place_legacy_queue(0, BASE)
    assert machine.answers(machine.driver_queue(RingLayout.legacy(SIZE, BASE)))
    machine.bank.write_status(UP | S.DRIVER_OK)
    machine.run()
    assert (device.asked["activate"], device.asked["start 0"]) == (1, 1)


@pytest.mark.parametrize("bit", [S.DEVICE_NEEDS_RESET, S.FAILED])
def test_a_legacy_device_that_broke_or_was_given_up_is_not_live(bit: Status) -> None:
    device = Counting()
    machine = Machine(device)
    assert machine.bank.claim("legacy")
    machine.bank.write_status(UP | S.DRIVER_OK)
    machine.bank.place_legacy_queue(0, BASE)
    machine.run()
    assert machine.bank.live
    if bit == S.FAILED:
        machine.bank.write_status(UP | S.DRIVER_OK | S.FAILED)
    else:
        machine.bank.broken(ValueError("the device's own"))
    machine.run()
    assert not machine.bank.live
    before = device.asked["kick 0"]
    machine.bank.kick(0)
    machine.bank.call(0)
    machine.run()
    assert device.asked["kick 0"] == before
    assert machine.calls == []


def test_a_queue_that_is_enabled_while_memory_moves_starts_behind_that() -> None:
    device = Counting()
    machine = Machine(device)
    machine.live()
    machine.bank.hold()
    queue = machine.modern_queue(1)
    machine.run()
    assert device.asked["start 1"] == 0
    machine.bank.release()
    assert device.asked["start 1"] == 1
    machine.bank.memory.write(0x1000, b"hello")
    token = queue.add([(0x1000, 5)], [(0x2000, 64)])
    queue.signal()
    machine.run()
    assert queue.get_used() == (token, 5)


def test_taking_back_a_queue_that_is_not_enabled_leaves_its_registers() -> None:
    machine = Machine()
    machine.bring_up()
    machine.bank.write_queue_size(0, 8)
    machine.bank.write_queue_address(0, "desc", 0x4000)
    machine.bank.disable_queue(0)
    assert (machine.bank.slots[0].size, machine.bank.slots[0].desc) == (8, 0x4000)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_queue_that_is_not_enabled_has_no_device_end(index: int) -> None:
    machine = Machine()
    with pytest.raises(StateError, match="is not enabled"):
        machine.bank.queue(index)


def test_what_the_device_has_not_is_not_offered() -> None:
    device = BaseDevice(7, handlers={0: bytes.upper})
    with pytest.raises(InvalidArgument, match="cannot offer BIT_57"):
        RegisterBank(device, offered=device.features | FeatureSet("BIT_57"))


def test_a_configuration_change_is_due_until_it_is_told() -> None:
    machine = Machine()
    machine.live()
    machine.bank.config_changed()
    assert machine.bank.config_due
    machine.run()
    assert (machine.bank.config_due, len(machine.changes)) == (False, 1)

"""Drivers at the edges: the last value that can be, what is lost or comes late, and a device that is not up."""

from __future__ import annotations

from typing import Any

import pytest
from virtio_test._core import GuestMemory, QueueConfig
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.chains import ChainDevice
from virtio_test.devices.console import ConsoleDevice, ConsolePort
from virtio_test.devices.test import TestDevice
from virtio_test.driver.alloc import Arena
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.console import ConsoleDriver
from virtio_test.driver.mmio import MAX_QUEUES, MmioRegisters
from virtio_test.driver.net import NetDriver
from virtio_test.driver.request import Request
from virtio_test.driver.test import TestDriver
from virtio_test.errors import (
    AnswerViolation,
    DeviceNeedsReset,
    InvalidArgument,
    NoFeature,
    PeerTimeout,
    QueueViolation,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.mmio import CONFIG
from virtio_test.spec.net import CONFIG_FIELDS, FEATURE_NAMES, HEADER
from virtio_test.spec.status import Status
from virtio_test.transport.mmio import VirtioMmio

SUSPEND = FeatureSet("SUSPEND")
SPLIT = RING_FEATURES - FeatureSet("RING_PACKED")


def echo(request: bytes) -> bytes:
    return request


def quiet(_: object) -> None:
    """A console, an output, a handler that keeps."""


def silent(queues: int = 1, *, features: FeatureSet | None = None, device_id: int = 7, **config: Any) -> BaseDevice:
    """A device that answers nothing."""
    handlers = {index: kept(quiet) for index in range(queues)}
    return BaseDevice(device_id, handlers=handlers, queue_sizes=(16,) * queues, features=features, **config)


# --- any driver --------------------------------------------------------------------------------------------


def test_a_byte_may_be_aligned_to_a_byte() -> None:
    arena = Arena(GuestMemory([(0, 4096)]))
    assert [arena.allocate(3, align=1), arena.allocate(1, align=1)] == [0, 3]


def test_while_it_is_being_suspended_it_is_not_live() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(Driver):
        def _has_moved(self, then: int) -> bool:
            seen.append((self.suspended, self.live))
            return super()._has_moved(then)

    device = silent()
    driver = Watching(Loopback(device, offered=device.features | SUSPEND))
    driver.initialize()
    driver.suspend()
    driver.resume()
    assert len(seen) >= 2
    assert set(seen) == {(True, False)}
    assert driver.live


def test_a_queue_is_not_touched_where_it_cannot_be_reset_alone() -> None:
    class Untouched(Loopback):
        def reset_queue(self, index: int) -> None:
            raise AssertionError(index)

    driver = Driver(Untouched(silent()), wanted=RING_FEATURES - FeatureSet("RING_RESET"))
    driver.initialize()
    with pytest.raises(NoFeature, match="RING_RESET was not negotiated"):
        driver.reset_queue(0)


def test_a_broken_device_says_why_it_is_not_resumed() -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: lambda _: 5}))  # pyright: ignore[reportArgumentType]
    driver = Driver(loopback)
    driver.initialize()
    with pytest.raises(DeviceNeedsReset):
        driver.submit(0, [b"x"], [4]).wait()
    with pytest.raises(DeviceNeedsReset):
        driver.resume()
    driver.initialize()
    with pytest.raises(StateError, match="not suspended"):
        driver.resume()


def test_nothing_is_given_to_a_device_whose_bring_up_has_failed() -> None:
    class Giving(Driver):
        def set_up(self) -> None:
            raise StatusViolation("BadConfig", "2.5", "as an example")

    driver = Giving(Loopback(silent()))
    with pytest.raises(StatusViolation):
        driver.initialize()
    with pytest.raises(StateError, match="initialize"):
        driver.submit(0, [b"x"])


def test_a_flush_says_whether_it_kicked() -> None:
    driver = Driver(Loopback(silent()), wanted=SPLIT)
    driver.initialize()
    assert not driver.flush(0)
    driver.submit(0, [b"x"], publish=False)
    assert driver.flush(0)
    assert not driver.flush(0)


def test_a_driver_that_is_not_up_asks_the_device_nothing() -> None:
    class Untouched(Loopback):
        def read_status(self) -> int:
            raise AssertionError("status")

    driver = Driver(Untouched(silent()))
    with pytest.raises(PeerTimeout):
        driver.run_until(lambda: False, "nothing", timeout=0.1)


def test_what_a_broken_device_never_does_did_not_come() -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: lambda _: 5}))  # pyright: ignore[reportArgumentType]
    driver = Driver(loopback)
    driver.initialize()
    lost = driver.submit(0, [b"x"], [4])
    with pytest.raises(PeerTimeout, match="a miracle"):
        driver.run_until(lambda: False, "a miracle", timeout=1)
    assert lost.done


def test_a_call_of_a_queue_that_is_not_there_is_nothing() -> None:
    loopback = Loopback(silent())
    driver = Driver(loopback)
    driver.initialize()
    for index in (1, 7, 1 << 20):
        loopback.bank.on_call(index)
    assert driver.live


@pytest.mark.parametrize("ring", [SPLIT, RING_FEATURES], ids=["split", "packed"])
def test_a_queue_that_is_reset_where_a_request_is_told_of_goes_on(ring: FeatureSet) -> None:
    """What its old self would write behind that lies in the new ring: an answer would come without its interrupt."""
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo}, queue_sizes=(16,))), wanted=ring, queue_size=16)
    driver.initialize()
    again: list[Request] = []

    def anew(_: Request) -> None:
        driver.reset_queue(0)
        again.append(driver.submit(0, [b"again"], [5]))

    for _ in range(3):
        driver.submit(0, [b"x"], [1], publish=False)
    driver.submit(0, [b"first"], [5], publish=False, on_done=anew)
    driver.flush(0)
    driver.run_until(lambda: bool(again), "the first answer")
    assert again[0].wait() == b"again"
    assert [driver.submit(0, [b"more"], [4]).wait() for _ in range(20)] == [b"more"] * 20


# --- the block driver --------------------------------------------------------------------------------------


def disk(**options: Any) -> tuple[BlkDevice, BlkDriver]:
    device = BlkDevice(bytearray(range(256)) * 4096)
    driver = BlkDriver(Loopback(device), **options)
    driver.initialize()
    return device, driver


def test_one_sector_may_be_all_that_is_transferred_and_none_may_be_asked_for() -> None:
    _, driver = disk(max_transfer=512)
    assert not driver.read_only
    assert driver.read(3, 2) == bytes(range(256)) * 4
    assert driver.read(driver.capacity, 0) == b""
    driver.write(driver.capacity, b"")
    with pytest.raises(InvalidArgument):
        disk(max_transfer=511)


def test_as_many_segments_as_the_device_takes() -> None:
    device, driver = disk()
    device.config.update(max_discard_seg=2, max_discard_sectors=4)
    driver.submit_discard([(0, 4), (8, 0)]).wait()
    for segments in ([], [(0, 5)], [(0, -1)], [(0, 1)] * 3):
        with pytest.raises(InvalidArgument, match="1 to 2 segments of at most 4 sectors"):
            driver.submit_discard(segments)


def test_memory_that_is_used_up_by_others_is_not_waited_for() -> None:
    _, driver = disk()
    while True:
        try:
            driver.arena.allocate(512)
        except StateError:
            break
    with pytest.raises(StateError, match="are left in"):
        driver.read(0, 8)


# --- the console driver ------------------------------------------------------------------------------------


def test_one_of_each_is_enough_for_a_console() -> None:
    device = ConsoleDevice(quiet)
    driver = ConsoleDriver(Loopback(device), buffers=1, buffer_size=1, max_received=1)
    driver.initialize()
    device.feed(b"abc")
    assert b"".join(driver.receive() for _ in range(3)) == b"abc"
    none: list[dict[str, Any]] = [{"buffers": 0}, {"buffer_size": 0}, {"max_received": 0}]
    for wrong in none:
        with pytest.raises(InvalidArgument):
            ConsoleDriver(Loopback(ConsoleDevice(quiet)), **wrong)


def test_many_control_messages_have_room_and_what_is_lost_is_no_message() -> None:
    device = ConsoleDevice(ports=[ConsolePort(quiet), ConsolePort(quiet)])
    driver = ConsoleDriver(Loopback(device))
    driver.initialize()
    driver.loop.run_pending()
    assert len([each for each in driver.in_flight if each.queue_index == 2]) == 32
    driver.reset()
    assert driver.findings == []


# --- the network driver ------------------------------------------------------------------------------------


class Wire(ChainDevice):
    """Puts into receive buffers what it is told to, and answers nothing else."""

    def __init__(self, *names: str, queues: int = 2) -> None:
        features = FeatureSet(*names, device=FEATURE_NAMES)
        config = ConfigSpace(ConfigLayout(*CONFIG_FIELDS))
        super().__init__(DeviceId.NET, chains={}, queue_sizes=(4,) * queues, features=features, config=config)

    def put(self, *buffers: bytes) -> None:
        queue = self.queue(0)
        for data in buffers:
            chain = queue.pop()
            assert chain is not None
            chain.write(data)
            queue.push(chain)
        queue.signal()


def wired(device: Wire, *, offered: FeatureSet | None = None, **options: Any) -> NetDriver:
    driver = NetDriver(Loopback(device, offered=offered), **options)
    driver.initialize()
    return driver


def header(count: int) -> bytes:
    return HEADER.pack(0, 0, 0, 0, 0, 0, count)


def test_a_frame_may_fill_all_of_the_ring_and_nothing_at_all() -> None:
    device = Wire("MRG_RXBUF")
    driver = wired(device, buffers=4, buffer_size=8)
    device.put(header(4) + b"a" * 8, *[b"b" * 20] * 2, b"c")
    assert driver.receive() == b"a" * 8 + b"b" * 40 + b"c"
    device.put(header(1))
    assert driver.receive() == b""
    assert driver.findings == []
    device.put(header(1)[:-1], header(5))
    driver.loop.run_pending()
    assert [each.rule for each in driver.findings] == ["HeaderTooShort", "BadNumBuffers"]


def test_queues_that_must_be_there() -> None:
    for device in (Wire(queues=1), Wire("CTRL_VQ", queues=2)):
        with pytest.raises(AnswerViolation) as found:
            wired(device)
        assert found.value.rule == "QueueMissing"


def test_a_command_needs_its_feature() -> None:
    driver = wired(Wire("CTRL_VQ", queues=3))
    with pytest.raises(NoFeature, match="CTRL_RX was not negotiated"):
        driver.set_promiscuous(on=True)
    with pytest.raises(NoFeature, match="CTRL_MAC_ADDR was not negotiated"):
        driver.set_mac(bytes(6))
    assert [each for each in driver.in_flight if each.queue_index == 2] == []


def test_a_frame_that_cannot_be_sent_waits_for_nothing() -> None:
    device = Wire()
    driver = wired(device, offered=device.features | SUSPEND)
    driver.send(b"in flight")
    driver.suspend()
    with pytest.raises(StateError, match="resume"):
        driver.send(b"suspended")
    driver = wired(Wire())
    while True:
        try:
            driver.arena.allocate(512)
        except StateError:
            break
    with pytest.raises(StateError, match="are left in"):
        driver.send(bytes(512))


# --- the driver of the test device -------------------------------------------------------------------------


def test_work_that_was_put_off_is_not_done_by_a_driver_that_is_down() -> None:
    lines: list[str] = []
    device = silent(config=ConfigSpace(TestDevice().config.layout), device_id=45)
    loopback = Loopback(device)
    driver = TestDriver(loopback, timer=True, console=lines.append)
    driver.initialize()
    driver.config_changed()
    driver.reset()
    device.config.update(num_pages=5)
    loopback.loop.run_pending()
    assert lines == ["virttest virttest_changed"]
    assert device.config["actual"] == 0


def test_only_the_timer_variant_answers_a_change() -> None:
    lines: list[str] = []
    device = silent(config=ConfigSpace(TestDevice().config.layout), device_id=45)
    loopback = Loopback(device)
    driver = TestDriver(loopback, console=lines.append)
    driver.initialize()
    device.config.update(num_pages=5)
    loopback.loop.run_pending()
    assert (lines, driver.in_flight, device.config["actual"]) == ([], [], 5)


def test_what_is_lost_or_too_short_is_not_acknowledged() -> None:
    lines: list[str] = []
    timer = silent(config=ConfigSpace(TestDevice().config.layout), device_id=45)
    can_print = TestDevice().features
    short = BaseDevice(45, handlers={0: lambda _: b"short"}, features=can_print, config=TestDevice().config)
    lost = silent(config=ConfigSpace(TestDevice().config.layout), features=can_print, device_id=45)
    driver = TestDriver(Loopback(timer), timer=True, console=lines.append)
    driver.initialize()
    timer.config.update(num_pages=5)
    driver.loop.run_pending()
    assert len(driver.in_flight) == 1
    driver.reset()
    assert lines == ["virttest virttest_changed", "virttest get config change"]
    for device in (short, lost):
        driver = TestDriver(Loopback(device), console=lines.append)
        driver.initialize()
        request = driver.submit_number(1)
        driver.loop.run_pending()
        driver.reset()
        assert request.done
        assert driver.acknowledged == 0
    assert len(lines) == 2


# --- virtio-mmio -------------------------------------------------------------------------------------------


def page(device: BaseDevice | None = None, *, size: int = 0x1000, **options: Any) -> MmioRegisters:
    return MmioRegisters(MmioLoopback(VirtioMmio(silent() if device is None else device, **options)), size=size)


def test_a_page_may_end_where_the_configuration_space_begins() -> None:
    registers = page(size=CONFIG)
    assert registers.config_size() == 0
    assert Driver(registers).initialize()
    with pytest.raises(InvalidArgument):
        page(size=CONFIG - 1)


@pytest.mark.parametrize(
    ("size", "packed", "rule"),
    [
        (0x8000, False, None),
        (0x8000, True, None),
        (0x8001, True, "QueueSizeMaxTooLarge"),
        (0x7FFF, True, None),
        (0x7FFF, False, "QueueSizeMaxNoPowerOfTwo"),
    ],
)
def test_the_largest_size_of_a_queue(size: int, packed: bool, rule: str | None) -> None:
    def shown(honest: int) -> int:
        return honest and size

    registers = page(registers={"QueueSizeMax": shown})
    registers.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    registers.write_driver_features((RING_FEATURES if packed else SPLIT).bits)
    if rule is None:
        assert registers.queue_max_sizes() == [size]
    else:
        with pytest.raises(QueueViolation) as found:
            registers.queue_max_sizes()
        assert found.value.rule == rule


def test_queues_without_an_end_are_asked_for_no_longer() -> None:
    asked: list[int] = []

    def endless(_: int) -> int:
        asked.append(0)
        assert len(asked) <= MAX_QUEUES + 1
        return 8

    with pytest.raises(StatusViolation, match="TooManyQueues"):
        page(registers={"QueueSizeMax": endless}).queue_max_sizes()
    assert len(asked) == MAX_QUEUES + 1


@pytest.mark.parametrize(
    ("address", "good"),
    [(0x1000, True), (0xFFFF_FFFF << 12, True), (0, False), (0x1001, False), (1 << 44, False), (0x1800, False)],
)
def test_a_legacy_queue_lies_at_a_page_with_a_number(address: int, good: bool) -> None:
    numbers: list[int] = []

    def last(_: int) -> int:
        return numbers[-1] if numbers else 0

    registers = page(version=1, registers={"QueuePFN": last}, writes={"QueuePFN": numbers.append})
    config = QueueConfig(8, desc=address, driver=address + 0x80, device=address + 0x1000)
    if good:
        registers.enable_queue(config)
        assert numbers == [address >> 12]
    else:
        with pytest.raises(InvalidArgument, match="at no page"):
            registers.enable_queue(config)
        assert numbers == []


@pytest.mark.parametrize(("low", "good"), [(0xFFFF_FFFE, True), (0xFFFF_FFFF, False)])
def test_shared_memory_may_end_with_the_address_space(low: int, good: bool) -> None:
    there = {"SHMBaseHigh": 0xFFFF_FFFF, "SHMBaseLow": low, "SHMLenHigh": 0, "SHMLenLow": 1}
    registers = page(registers=there)
    if good:
        assert registers.shared_memory(0) == (0xFFFF_FFFF_FFFF_FFFE, 1)
    else:
        with pytest.raises(StatusViolation, match="BadSharedMemory"):
            registers.shared_memory(0)

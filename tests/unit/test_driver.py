"""The guest driver model: bring-up, requests, interrupts, loss, and a device that breaks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from virtio_test._core import Notifier, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.registers import Registers
from virtio_test.driver.request import Request
from virtio_test.driver.test import TestDriver, build_request
from virtio_test.errors import (
    DeviceNeedsReset,
    InvalidArgument,
    NoFeature,
    PeerError,
    PeerTimeout,
    QueueFull,
    QueueViolation,
    StateError,
    StatusViolation,
    UsageError,
)
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.status import Status

RINGS = pytest.mark.parametrize("ring", ["split", "packed"])


def features(ring: str) -> FeatureSet:
    return RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")


def echo(request: bytes) -> bytes:
    return request


class Silent(BaseDevice):
    """Takes everything, answers nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__(7, handlers={0: kept(lambda _: None)}, queue_sizes=(16,))


class Recording(Loopback):
    """Writes down what the driver does to the registers, and can misbehave."""

    refuse: int = 0
    keep_status: bool = False

    def __init__(self, device: BaseDevice) -> None:
        self.log: list[str] = []
        super().__init__(device)

    def write_status(self, status: int) -> None:
        self.log.append(f"status {status:#x}")
        if not (status == 0 and self.keep_status):
            super().write_status(status)

    def read_status(self) -> int:
        self.log.append("read status")
        return super().read_status() & ~self.refuse

    def write_driver_features(self, features: int) -> None:
        self.log.append("features")
        super().write_driver_features(features)

    def enable_queue(self, config: QueueConfig) -> None:
        self.log.append(f"queue {config.index}")
        super().enable_queue(config)


# --- bring-up ----------------------------------------------------------------------------------------------


def test_the_sequence_of_3_1_1() -> None:
    registers = Recording(BaseDevice(7, handlers={0: echo, 1: echo}))
    driver = Driver(registers)
    assert driver.initialize() == registers.offered
    assert registers.log == [
        "status 0x0",
        "read status",
        "status 0x1",
        "read status",
        "status 0x3",
        "read status",
        "features",
        "status 0xb",
        "read status",
        "queue 0",
        "queue 1",
        "status 0xf",
        "read status",
    ]
    assert isinstance(registers, Registers)
    assert driver.live


@pytest.mark.row("G17")
@pytest.mark.parametrize(
    ("refuse", "rule"), [(Status.FEATURES_OK, "FeaturesRefused"), (Status.DRIVER, "StatusBitLost")]
)
def test_a_status_that_does_not_read_back_sets_failed(refuse: Status, rule: str) -> None:
    registers = Recording(BaseDevice(7, handlers={0: echo}))
    registers.refuse = refuse
    driver = Driver(registers)
    with pytest.raises(StatusViolation) as found:
        driver.initialize()
    assert found.value.rule == rule
    assert registers.status.value & Status.FAILED
    assert not driver.live
    with pytest.raises(StateError):
        driver.submit(0, [b"x"])
    registers.refuse = 0
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"x"


@pytest.mark.row("G17")
def test_features_it_cannot_do_without() -> None:
    needed = FeatureSet("MAGIC", device={"MAGIC": 3})
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})), required=needed)
    with pytest.raises(StatusViolation) as found:
        driver.initialize()
    assert found.value.rule == "RequiredFeatureMissing"
    rich = BaseDevice(7, handlers={0: echo}, features=needed)
    assert "MAGIC" in Driver(Loopback(rich), required=needed).initialize()


@pytest.mark.row("G19")
def test_a_reset_that_never_ends_is_bounded_and_frees_nothing() -> None:
    registers = Recording(BaseDevice(7, handlers={0: echo}))
    driver = Driver(registers, timeout=3)
    driver.initialize()
    used = driver.arena.used
    registers.keep_status = True
    with pytest.raises(PeerTimeout, match="reset"):
        driver.reset()
    assert registers.loop.clock.now() <= 3
    assert driver.arena.used == used, "the device may still write there"
    registers.keep_status = False
    driver.initialize()
    assert driver.arena.used == used


def test_no_device() -> None:
    class Nobody(Loopback):
        def device_id(self) -> int:
            return 0

    with pytest.raises(StateError, match="no device"):
        Driver(Nobody(BaseDevice(7, handlers={0: echo}))).initialize()


@pytest.mark.row("G16")
@RINGS
@pytest.mark.parametrize("limit", [1, 2, 5, 128, None])
def test_queue_sizes(ring: str, limit: int | None) -> None:
    device = BaseDevice(7, handlers={0: echo}, queue_sizes=(100,))
    driver = Driver(Loopback(device), wanted=features(ring), queue_size=limit)
    driver.initialize()
    wanted = min(limit or 100, 100)
    assert driver.queues[0].size == (wanted if ring == "packed" else 1 << wanted.bit_length() - 1)
    assert driver.submit(0, [b"abc"]).wait() == b""


def test_before_and_after_its_life_it_says_so() -> None:
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})))
    with pytest.raises(StateError, match="initialize"):
        driver.submit(0, [b"x"])
    driver.initialize()
    with pytest.raises(InvalidArgument, match="no queue 3"):
        driver.submit(3, [b"x"])
    driver.detach()
    with pytest.raises(StateError, match="initialize"):
        driver.flush(0)


def test_what_was_put_in_early_is_kicked_after_driver_ok_and_not_before() -> None:
    kicks: list[tuple[int, int]] = []

    class Counting(Loopback):
        def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002
            return Notifier.callback(lambda: kicks.append((index, self.read_status() & Status.DRIVER_OK)))

    class Early(Driver):
        def set_up(self) -> None:
            self.submit(0, [b"x"], [1])

    driver = Early(Counting(BaseDevice(7, handlers={0: echo})))
    driver.initialize()
    assert kicks == [(0, Status.DRIVER_OK)]


@pytest.mark.row("G18")
def test_a_request_ends_once() -> None:
    ends: list[Request] = []
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})))
    request = Request(driver, 0, [], [], ends.append)
    request.finish(data=b"first")
    request.finish(error=RuntimeError("second"))
    assert request.wait() == b"first"
    assert ends == [request]


# --- requests ----------------------------------------------------------------------------------------------


@pytest.mark.row("G18")
@RINGS
@pytest.mark.parametrize("indirect", [False, True])
def test_many_in_flight_each_with_its_own_buffer(ring: str, indirect: bool) -> None:
    lines: list[str] = []
    driver = TestDriver(
        Loopback(TestDevice(console=lambda _: None)), wanted=features(ring), indirect=indirect, console=lines.append
    )
    driver.initialize()
    requests = [driver.submit_number(number, publish=False) for number in range(60)]
    places = [place for request in requests for place in (*request.readable, *request.writable)]
    ends = sorted((address, address + length) for address, length in places)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    driver.flush(0)
    assert [driver.parse(each.wait()).ret for each in requests] == [(n + 1) % 256 + 100 for n in range(60)]
    assert lines.count("virtio test_request_done get ack") == 60, "none is stranded behind a shared interrupt"


@RINGS
@pytest.mark.parametrize("indirect", [False, True])
def test_more_than_the_queue_holds(ring: str, indirect: bool) -> None:
    driver = TestDriver(
        Loopback(TestDevice(console=lambda _: None)), wanted=features(ring), indirect=indirect, console=lambda _: None
    )
    driver.initialize()
    before = driver.arena.used
    answers = driver.request_many(number % 256 for number in range(1000))
    assert [each.arg2 for each in answers] == [(n % 256 + 3) % 256 + 100 for n in range(1000)]
    assert driver.arena.used == before
    assert driver.in_flight == []


def test_a_full_queue_says_so_and_loses_no_memory() -> None:
    driver = Driver(Loopback(Silent()))
    driver.initialize()
    before = driver.arena.used
    sent = [driver.submit(0, [b"x"]) for _ in range(16)]
    full = driver.arena.used
    with pytest.raises(QueueFull):
        driver.submit(0, [b"x"])
    assert driver.arena.used == full
    assert driver.reset() == sent
    assert driver.arena.used < before, "rings and buffers came back"


@pytest.mark.parametrize(("readable", "writable"), [([], []), ([b""], [1]), ([b"x"], [0])])
def test_impossible_chains_change_nothing(readable: list[bytes], writable: list[int]) -> None:
    driver = Driver(Loopback(Silent()))
    driver.initialize()
    used = driver.arena.used
    with pytest.raises(InvalidArgument):
        driver.submit(0, readable, writable)
    assert driver.arena.used == used
    assert driver.in_flight == []


@pytest.mark.row("G13")
def test_no_answer_is_bounded_and_the_request_stays_in_flight() -> None:
    device = Silent()
    loop = OwnerLoop(clock=VirtualClock())
    driver = Driver(Loopback(device, loop=loop), timeout=5)
    driver.initialize()
    request = driver.submit(0, [b"x"], [1])
    with pytest.raises(StateError, match="still in flight"):
        _ = request.response
    with pytest.raises(PeerTimeout, match="within 5 s"):
        request.wait()
    assert driver.in_flight == [request]
    device.complete(device.kept[0], b"y")
    assert request.wait() == b"y"


def test_waiting_inside_the_loop_is_refused_and_on_done_is_the_way() -> None:
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})))
    driver.initialize()
    second: list[Request] = []

    def first_done(_request: Request) -> None:
        second.append(driver.submit(0, [b"two"], [3]))
        with pytest.raises(StateError, match="re-entrant"):
            second[0].wait()

    assert driver.submit(0, [b"one"], [3], on_done=first_done).wait() == b"one"
    assert second[0].wait() == b"two"


def test_a_response_over_several_buffers() -> None:
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})))
    driver.initialize()
    request = driver.submit(0, [b"abc", b"defgh"], [1, 2, 3, 4])
    assert request.wait() == b"abcdefgh"
    assert request.written == 8


# --- loss --------------------------------------------------------------------------------------------------


@pytest.mark.row("G19")
@RINGS
def test_detach_returns_everything_once(ring: str) -> None:
    device = Silent()
    driver = Driver(Loopback(device), wanted=features(ring))
    driver.initialize()
    done: list[Request] = []
    sent = [driver.submit(0, [bytes([n])], [4], on_done=done.append) for n in range(6)]
    driver.loop.run_pending()
    device.complete(device.kept[1], b"one")
    driver.loop.run_pending()
    lost = driver.detach()
    assert lost == [sent[n] for n in (0, 2, 3, 4, 5)]
    assert sorted(each.token for each in done) == sorted(each.token for each in sent)
    assert sent[1].response == b"one"
    for request in lost:
        with pytest.raises(StateError, match="reset"):
            _ = request.response
    assert driver.arena.used == 0
    assert driver.detach() == []


@RINGS
def test_one_queue_is_reset_alone(ring: str) -> None:
    device = BaseDevice(7, handlers={0: kept(lambda _: None), 1: echo})
    driver = Driver(Loopback(device), wanted=features(ring))
    driver.initialize()
    lost = driver.submit(0, [b"x"], [1])
    driver.loop.run_pending()
    (chain,) = device.kept
    assert driver.reset_queue(0) == [lost]
    assert device.kept == []
    assert device.complete(chain, b"y") is False
    assert driver.submit(1, [b"other"], [5]).wait() == b"other"
    again = driver.submit(0, [b"y"], [1])
    driver.loop.run_pending()
    device.complete(device.kept[0], b"z")
    assert again.wait() == b"z"


def test_without_ring_reset_a_queue_is_not_reset_alone() -> None:
    driver = Driver(Loopback(Silent()), wanted=FeatureSet("VERSION_1"))
    driver.initialize()
    with pytest.raises(NoFeature, match="RING_RESET"):
        driver.reset_queue(0)


@pytest.mark.row("G14")
@RINGS
def test_a_broken_device_fails_everything_once_and_comes_back(ring: str) -> None:
    loopback = Loopback(device := Silent())
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    done: list[Request] = []
    sent = [driver.submit(0, [b"x"], [1], on_done=done.append) for _ in range(5)]
    driver.loop.run_pending()
    used = driver.arena.used
    loopback.bank.broken(RuntimeError("the device's own"))
    loopback.bank.broken(RuntimeError("and again"))
    driver.loop.run_pending()
    assert done == sent
    for request in sent:
        with pytest.raises(DeviceNeedsReset):
            request.wait()
    with pytest.raises(DeviceNeedsReset):
        driver.submit(0, [b"x"])
    assert isinstance(driver.broken, DeviceNeedsReset)
    assert driver.arena.used == used, "what the device may still hold is not given to others"
    driver.initialize()
    assert done == sent
    assert driver.broken is None
    again = driver.submit(0, [b"x"], [1])
    driver.loop.run_pending()
    device.complete(device.kept[0], b"y")
    assert again.wait() == b"y"
    driver.detach()
    assert driver.arena.used == 0


@RINGS
def test_a_used_ring_that_breaks_a_rule_fails_everything_once(ring: str) -> None:
    loopback = Loopback(device := Silent())
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    request = driver.submit(0, [b"x"], [4])
    driver.loop.run_pending()
    layout = driver.queues[0].layout()
    assert isinstance(layout, RingLayout)
    device.complete(device.kept[0], b"y")
    # The device "used" a buffer that it never got.
    if ring == "split":
        driver.memory.write(layout.at("used.ring.id", 0), (9).to_bytes(4, "little"))
    else:
        driver.memory.write(layout.at("desc.id", 0), (9).to_bytes(2, "little"))
    with pytest.raises(QueueViolation) as found:
        request.wait()
    assert driver.broken is found.value
    driver.initialize()
    assert request.error is found.value


def test_a_lost_config_interrupt_is_found_by_the_wait() -> None:
    loopback = Loopback(Silent())
    driver = Driver(loopback, timeout=1)
    driver.initialize()
    request = driver.submit(0, [b"x"])
    loopback.listen(call=lambda _: None, config_changed=lambda: None)
    loopback.bank.broken(RuntimeError("nobody hears it"))
    with pytest.raises(DeviceNeedsReset):
        request.wait()


# --- configuration space -----------------------------------------------------------------------------------

LAYOUT = ConfigLayout(("low", "le32"), ("high", "le32"), ("mine", "le32", "rw"))


def test_fields_by_name() -> None:
    device = BaseDevice(7, handlers={0: echo}, config=ConfigSpace(LAYOUT, low=1, high=2))
    driver = Driver(Loopback(device), layout=LAYOUT)
    driver.initialize()
    assert (driver.read_field("low"), driver.read_field("high")) == (1, 2)
    driver.write_field("mine", 9)
    assert device.config["mine"] == 9
    with pytest.raises(InvalidArgument):
        driver.write_field("mine", -1)
    with pytest.raises(InvalidArgument):
        driver.read_field("nothing")


@pytest.mark.row("T10", "G15")
def test_bytes_of_one_generation() -> None:
    device = BaseDevice(7, handlers={0: echo}, config=ConfigSpace(LAYOUT, low=1, high=1))

    class Moving(Loopback):
        times = 3

        def read_config(self, offset: int, length: int) -> bytes:
            data = super().read_config(offset, length)
            if self.times:
                self.times -= 1
                device.config.update(low=device.config["low"] + 1, high=device.config["high"] + 1)
            return data

    registers = Moving(device)
    driver = Driver(registers, layout=LAYOUT)
    driver.initialize()
    assert driver.read_config(0, 8) == (4).to_bytes(4, "little") * 2
    registers.times = 10**6
    with pytest.raises(StatusViolation) as found:
        driver.read_config(0, 8)
    assert found.value.rule == "ConfigNeverStable"


@pytest.mark.row("G15")
def test_a_space_that_is_too_short() -> None:
    driver = Driver(Loopback(BaseDevice(7, handlers={0: echo})), layout=LAYOUT)
    driver.initialize()
    with pytest.raises(StatusViolation) as found:
        driver.read_field("low")
    assert found.value.rule == "ConfigTooShort"


def test_a_change_before_driver_ok_is_kept_until_bring_up_ends() -> None:
    seen: list[bool] = []

    class Listener(Driver):
        def set_up(self) -> None:
            # As if the interrupt came while the driver is still being set up.
            self._config_interrupt()
            assert seen == []

        def config_changed(self) -> None:
            seen.append(self.live)

    Listener(Loopback(BaseDevice(7, handlers={0: echo}))).initialize()
    assert seen == [True]


# --- the driver of the test device -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 256, 10**9])
def test_numbers_are_bytes(number: int) -> None:
    driver = TestDriver(Loopback(TestDevice(console=lambda _: None)))
    driver.initialize()
    with pytest.raises(InvalidArgument, match="between 0 and 255"):
        driver.request(number)
    with pytest.raises(InvalidArgument):
        build_request(number)


def test_without_can_print_there_is_no_request_api() -> None:
    driver = TestDriver(Loopback(TestDevice(console=lambda _: None, can_print=False)))
    driver.initialize()
    with pytest.raises(NoFeature, match="CAN_PRINT"):
        driver.request(10)
    with pytest.raises(NoFeature, match="CAN_PRINT"):
        driver.request_many([10])
    assert issubclass(NoFeature, UsageError)
    timer = TestDriver(Loopback(TestDevice(timer=True)), timer=True)
    timer.initialize()
    with pytest.raises(NoFeature, match="timer"):
        timer.request(10)


def test_a_response_that_is_too_short_is_no_answer() -> None:
    device = BaseDevice(
        45,
        handlers={0: lambda _: b"\1\2\3"},
        features=FeatureSet("CAN_PRINT", device={"CAN_PRINT": 0}),
        config=TestDevice().config,
    )
    lines: list[str] = []
    driver = TestDriver(Loopback(device), console=lines.append)
    driver.initialize()
    with pytest.raises(PeerError, match="3 bytes"):
        driver.request(10)
    assert lines == []


def test_changes_that_come_together_make_one_answer() -> None:
    lines: list[str] = []
    device = TestDevice(timer=True, console=lines.append)
    loopback = Loopback(device)
    driver = TestDriver(loopback, timer=True, console=lines.append)
    driver.initialize()
    for number in range(1, 4):
        device.config.update(num_pages=number)
    loopback.loop.run_pending()
    assert lines == [
        "virttest virttest_changed",
        "virttest get config change",
        "=========get virtio num:1",
        "virttest get ack",
    ]
    assert device.config["actual"] == 3


def test_an_answer_that_found_the_queue_full_is_sent_later() -> None:
    lines: list[str] = []
    device = TestDevice(timer=True, console=lambda _: None)
    loopback = Loopback(device)
    driver = TestDriver(loopback, timer=True, console=lines.append, queue_size=2)
    driver.initialize()
    queue = loopback.queue(0)
    queue.stop()
    for number in range(1, 4):
        device.config.update(num_pages=number)
        loopback.loop.run_pending()
    assert len(driver.in_flight) == 2
    queue.resume()
    loopback.kick_notifier(0, lambda: 0).notify()
    loopback.loop.run_pending()
    assert driver.counter == driver.acknowledged == 3
    assert device.counters.counters == 3


def test_a_set_up_that_fails_half_way_leaks_nothing() -> None:
    class NoKick(Loopback):
        def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:
            if index == 1:
                raise StateError("no kick for this one")
            return super().kick_notifier(index, position)

    driver = Driver(NoKick(BaseDevice(7, handlers={0: bytes.upper, 1: bytes.upper})))
    for _ in range(3):
        with pytest.raises(StateError, match="no kick"):
            driver.initialize()
    driver.reset()
    assert driver.arena.used == 0

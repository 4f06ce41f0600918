"""A device that does all it can against its driver: rings, interrupts, resets and configuration spaces that lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test._core import Notifier, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import (
    InvalidArgument,
    PeerDisconnected,
    PeerTimeout,
    QueueViolation,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.spec.status import Status

SPLIT = RING_FEATURES - FeatureSet("RING_PACKED")
ENOUGH = 5000


def echo(request: bytes) -> bytes:
    return request


class Keeper(BaseDevice):
    """Two queues; everything is kept until it is told to answer."""

    def __init__(self) -> None:
        super().__init__(7, handlers={index: kept(lambda _: None) for index in (0, 1)}, queue_sizes=(16, 16))


def layout_of(driver: Driver, index: int = 0) -> RingLayout:
    layout = driver.queues[index].layout()
    assert isinstance(layout, RingLayout)
    return layout


def test_what_comes_after_the_device_broke_is_no_request_any_more() -> None:
    driver = Driver(Loopback(device := Keeper()), wanted=SPLIT)
    driver.initialize()
    done: list[Request] = []
    first = driver.submit(0, [b"x"], [4], on_done=done.append)
    second = driver.submit(1, [b"x"], [4], on_done=done.append)
    driver.loop.run_pending()
    for chain in list(device.kept):
        device.complete(chain, b"yyyy")
    # Queue 0 tells of a buffer that it never got; queue 1 is in order, and comes behind it.
    driver.memory.write(layout_of(driver).at("used.ring.id", 0), (9).to_bytes(4, "little"))
    driver.loop.run_pending()
    assert isinstance(driver.broken, QueueViolation)
    assert done == [first, second]
    assert first.error is second.error is driver.broken
    driver.initialize()
    assert driver.submit(1, [b"x"], [4]) is driver.in_flight[0]


def test_a_device_that_breaks_while_its_answers_are_told() -> None:
    driver = Driver(Loopback(device := Keeper()), wanted=SPLIT)
    driver.initialize()
    errors: list[Exception | None] = []

    def told(request: Request) -> None:
        errors.append(request.error)
        if len(errors) == 1:
            device.bus.broken(RuntimeError("the device's own"))
            # As when the notification of it comes first.
            driver._config_interrupt()  # pyright: ignore[reportPrivateUsage]

    for _ in range(3):
        driver.submit(0, [b"x"], [4], on_done=told)
    driver.loop.run_pending()
    for chain in list(device.kept):
        device.complete(chain, b"yyyy")
    driver.loop.run_pending()
    assert errors[0] is None
    assert errors[1:] == [driver.broken] * 2


def test_a_device_that_uses_what_it_gets_at_once_starves_nobody() -> None:
    driver = Driver(Loopback(device := BaseDevice(7, handlers={0: echo}, queue_sizes=(8,))), wanted=SPLIT)
    driver.initialize()
    count = 0
    turns: list[int] = []

    def again(_: Request) -> None:
        nonlocal count
        count += 1
        assert count < ENOUGH, "nobody else has had a turn"
        driver.submit(0, [b"x"], [1], on_done=again)
        device.kicked(0)

    driver.submit(0, [b"x"], [1], on_done=again)
    driver.loop.call_soon(lambda: driver.loop.call_soon(lambda: turns.append(count)))
    assert driver.loop.run(until=lambda: count > 100)
    assert turns
    assert count < 200


def test_a_reset_that_does_not_end_leaves_a_driver_that_is_not_live() -> None:
    class Deaf(Loopback):
        deaf = False

        def write_status(self, status: int) -> None:
            if status or not self.deaf:
                super().write_status(status)

    registers = Deaf(Keeper())
    driver = Driver(registers, timeout=3)
    driver.initialize()
    request = driver.submit(0, [b"x"], [4])
    used = driver.arena.used
    registers.deaf = True
    for _ in range(2):
        with pytest.raises(PeerTimeout, match="reset"):
            driver.reset()
    assert not driver.live
    assert isinstance(request.error, PeerTimeout)
    with pytest.raises(PeerTimeout):
        driver.submit(0, [b"x"])
    assert driver.arena.used == used, "the device may still write there"
    registers.deaf = False
    assert driver.reset() == []
    assert driver.arena.used == 0


@pytest.mark.parametrize("sizes", [[], [0]])
@pytest.mark.parametrize("wanted", [SPLIT, RING_FEATURES], ids=["split", "packed"])
def test_a_queue_that_does_not_come_back_from_its_reset(sizes: list[int], wanted: FeatureSet) -> None:
    class Fewer(Loopback):
        after: list[int] | None = None

        def queue_max_sizes(self) -> list[int]:
            return super().queue_max_sizes() if self.after is None else self.after

    registers = Fewer(BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(16,)))
    driver = Driver(registers, wanted=wanted)
    driver.initialize()
    request = driver.submit(0, [b"x"], [4])
    registers.after = sizes
    with pytest.raises(QueueViolation) as found:
        driver.reset_queue(0)
    assert (found.value.rule, found.value.queue) == ("QueueGone", 0)
    assert driver.broken is found.value
    assert isinstance(request.error, StateError)
    registers.after = None
    driver.initialize()
    assert driver.live


def test_a_device_that_leaves_at_the_first_kick_breaks_at_bring_up() -> None:
    def gone() -> None:
        raise PeerDisconnected("the bus has closed")

    class Leaving(Loopback):
        def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002 - not that far
            return Notifier.callback(gone)

    class Eager(Driver):
        def set_up(self) -> None:
            self.submit(0, [], [4])

    driver = Eager(Leaving(Keeper()), wanted=SPLIT)
    with pytest.raises(PeerDisconnected) as found:
        driver.initialize()
    assert driver.broken is found.value
    assert not driver.live
    assert driver.in_flight == []


def test_a_space_that_ends_before_the_field_is_the_devices_fault() -> None:
    class Short(Loopback):
        def config_size(self) -> int:
            return 6

    layout = ConfigLayout(("first", "le32"), ("second", "le32", "rw"))
    driver = Driver(Short(BaseDevice(7, handlers={0: echo}, config=ConfigSpace(layout))), layout=layout)
    driver.initialize()
    with pytest.raises(StatusViolation) as found:
        driver.write_field("second", 1)
    assert found.value.rule == "ConfigTooShort"


def test_a_configuration_change_that_cannot_be_read_breaks_the_device_and_not_the_loop() -> None:
    class Restless(Loopback):
        moved = 0

        def config_generation(self) -> int:
            self.moved += 1
            return self.moved

    class Curious(Driver):
        def config_changed(self) -> None:
            self.read_field("first")

    layout = ConfigLayout(("first", "le32"))
    device = BaseDevice(7, handlers={0: kept(lambda _: None)}, config=ConfigSpace(layout))
    driver = Curious(Restless(device), layout=layout)
    driver.initialize()
    request = driver.submit(0, [b"x"], [4])
    device.notify_config_changed()
    with pytest.raises(StatusViolation) as found:
        request.wait()
    assert found.value.rule == "ConfigNeverStable"
    assert driver.broken is found.value


def test_one_error_of_many_requests_keeps_no_trace_of_each_look() -> None:
    driver = Driver(Loopback(device := Keeper()))
    driver.initialize()
    requests = [driver.submit(0, [b"x"], [4]) for _ in range(8)]
    device.bus.broken(RuntimeError("the device's own"))
    driver.loop.run_pending()

    def depth() -> int:
        with pytest.raises(Exception, match="NEEDS_RESET") as found:
            _ = requests[-1].response
        return len(found.traceback)

    first = depth()
    for request in requests:
        assert request.error is driver.broken
        assert depth() == first


def test_more_buffers_than_a_queue_holds_look_for_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(Loopback(Keeper()))
    driver.initialize()
    assert not driver.submit(0, [b"x"], [1] * 15).done

    def allocate(size: int) -> int:
        raise AssertionError(size)

    monkeypatch.setattr(driver.arena, "allocate", allocate)
    for count in (17, 1_000_001):
        with pytest.raises(InvalidArgument, match=f"{count} buffers does not fit a queue of 16"):
            driver.submit(0, [b"x"], [1] * (count - 1))


def test_what_made_the_driver_give_up_is_what_is_said() -> None:
    class Mute(Loopback):
        def queue_max_sizes(self) -> list[int]:
            raise PeerTimeout("no reply to the read of a queue's size")

        def write_status(self, status: int) -> None:
            if status & Status.FAILED:
                raise PeerDisconnected("nobody listens any more")
            super().write_status(status)

    driver = Driver(Mute(Keeper()))
    with pytest.raises(PeerTimeout, match="no reply"):
        driver.initialize()
    assert not driver.live

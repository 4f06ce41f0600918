"""The entropy device and its driver: used lengths that are true, sources that fail, buffers that make no sense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test.carrier.loopback import Loopback
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.driver.rng import RngDriver
from virtio_test.errors import (
    AnswerViolation,
    DeviceNeedsReset,
    InvalidArgument,
    PeerTimeout,
    SavedStateError,
)
from virtio_test.spec.ids import DeviceId

from .class_world import RINGS, WAYS, errors, indirect, reach


def counting() -> Callable[[int], bytes]:
    """Bytes that count up, so that each is known wherever it ends up."""
    place = 0

    def source(count: int) -> bytes:
        nonlocal place
        place += count
        return bytes(each & 0xFF for each in range(place - count, place))

    return source


def expected(count: int) -> bytes:
    return bytes(each & 0xFF for each in range(count))


@WAYS
@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 100_000])
def test_what_the_source_gives_is_what_the_driver_reads(way: str, count: int) -> None:
    device = RngDevice(source=counting())
    registers = reach(device, way)
    driver = RngDriver(registers, wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    assert driver.read(count) == expected(count)
    assert device.delivered == count
    assert errors(registers) == []


def test_it_is_the_entropy_device() -> None:
    device = RngDevice()
    assert (device.device_id, list(device.queue_sizes), device.config.size) == (DeviceId.ENTROPY, [8], 0)
    assert "IN_ORDER" in device.features
    driver = RngDriver(Loopback(device))
    driver.initialize()
    one, other = driver.read(64), driver.read(64)
    assert one != other


def test_the_used_length_is_what_was_written_and_nothing_else_is() -> None:
    driver = RngDriver(Loopback(RngDevice(source=lambda count: b"\xaa" * min(count, 5))))
    driver.initialize()
    request = driver.submit(0, [], [3, 4, 100])
    places = list(request.writable)
    for address, length in places:
        driver.memory.write(address, b"." * length)
    assert request.wait() == b"\xaa" * 5
    assert request.written == 5
    got = b"".join(driver.memory.read(address, length) for address, length in places)
    assert got == b"\xaa" * 5 + b"." * 102


def test_a_slow_source_takes_more_requests() -> None:
    device = RngDevice(source=lambda count: b"\x55" * min(count, 7))
    driver = RngDriver(Loopback(device))
    driver.initialize()
    assert driver.read(100) == b"\x55" * 100
    assert device.delivered == 100


def test_one_buffer_gets_no_more_than_the_limit() -> None:
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    driver = RngDriver(Loopback(RngDevice(source=source, limit=1000)))
    driver.initialize()
    assert len(driver.submit(0, [], [100_000, 100_000]).wait()) == 1000
    assert asked == [1000]


@pytest.mark.parametrize("way", ["split", "packed"])
def test_buffers_that_make_no_sense_are_counted(way: str) -> None:
    device = RngDevice(source=counting())
    driver = RngDriver(Loopback(device), wanted=RINGS[way])
    driver.initialize()
    assert driver.submit(0, [b"what for"]).wait() == b""
    assert driver.submit(0, [b"what for"], [3]).wait() == expected(3)
    assert device.odd == 2
    assert driver.read(1) == b"\x03"


@pytest.mark.parametrize("given", [b"", b"x" * 11])
def test_a_source_that_gives_nothing_or_too_much_breaks_the_device(given: bytes) -> None:
    registers = Loopback(RngDevice(source=lambda _: given))
    driver = RngDriver(registers)
    driver.initialize()
    with pytest.raises(DeviceNeedsReset):
        driver.read(10)
    assert f"gave {len(given)} bytes, asked for 1 to 10" in str(registers.errors[0])


def test_a_source_that_fails_can_be_left_out() -> None:
    failing = [OSError("no entropy today")]

    def source(count: int) -> bytes:
        if failing:
            raise failing.pop()
        return b"\x11" * count

    device = RngDevice(source=source, on_handler_error="complete0")
    driver = RngDriver(Loopback(device))
    driver.initialize()
    with pytest.raises(AnswerViolation) as found:
        driver.read(4)
    assert (found.value.rule, found.value.clause) == ("NoRandomBytes", "5.4.6.2")
    assert driver.read(4) == b"\x11" * 4
    assert device.handler_errors == 1


def test_many_buffers_come_back_in_order() -> None:
    driver = RngDriver(Loopback(RngDevice(source=counting(), queue_size=64)))
    assert "IN_ORDER" in driver.initialize()
    requests = [driver.submit(0, [], [10], publish=False) for _ in range(60)]
    driver.flush(0)
    assert b"".join(request.wait() for request in requests) == expected(600)


def test_a_device_that_does_not_answer_is_waited_for_in_vain() -> None:
    driver = RngDriver(Loopback(BaseDevice(4, handlers={}, queue_sizes=(8,))), timeout=1.0)
    driver.initialize()
    with pytest.raises(PeerTimeout):
        driver.read(1)


def test_impossible_numbers() -> None:
    with pytest.raises(InvalidArgument):
        RngDevice(limit=0)
    driver = RngDriver(Loopback(RngDevice()))
    driver.initialize()
    with pytest.raises(InvalidArgument):
        driver.read(-1)
    with pytest.raises(InvalidArgument):
        driver.submit_read(0)


def test_state_goes_round() -> None:
    registers = Loopback(RngDevice(source=counting()))
    driver = RngDriver(registers)
    driver.initialize()
    assert driver.read(4) == expected(4)
    registers.restore(registers.save(), device=RngDevice(source=lambda count: b"\x77" * count))
    assert driver.read(4) == b"\x77" * 4
    with pytest.raises(SavedStateError):
        RngDevice(device_id=5).restore(RngDevice().save())

"""The block driver against devices that answer wrongly, and what it refuses to ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from virtio_test._core import Chain, GuestMemory, Policy
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.blk import BlkDevice
from virtio_test.driver.blk import BlkDriver, BlkRequest
from virtio_test.errors import (
    AnswerViolation,
    InvalidArgument,
    NoFeature,
    PeerTimeout,
    QueueFull,
    RequestFailed,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import CONFIG_FIELDS, FEATURE_NAMES, RequestStatus, RequestType

from .class_world import RINGS, reach

SIZE = 1 << 20
STRICT = Policy("interop", used_without_write=False)


class Lying(BlkDevice):
    """A block device whose every answer goes through `lie` first: it gets the chain, and says the used length."""

    def __init__(self, lie: Callable[[Chain], int], **options: Any) -> None:
        super().__init__(bytearray(SIZE), **options)
        self._lie = lie

    def answer(self, chain: Chain) -> int:
        return self._lie(chain)


def live(lie: Callable[[Chain], int], *, way: str = "split", **options: Any) -> BlkDriver:
    driver = BlkDriver(reach(Lying(lie), way), **options)
    driver.initialize()
    return driver


def says(status: int, used: int | None = None, *, data: bytes = b"") -> Callable[[Chain], int]:
    """Answers with `data`, the status byte and a used length; all of the buffer when None."""

    def lie(chain: Chain) -> int:
        chain.write(data)
        chain.write(bytes([status]), offset=chain.writable - 1)
        return chain.writable if used is None else min(used, chain.writable)

    return lie


# --- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy.interop, Policy.strict])
@pytest.mark.parametrize("used", [0, 1, 512])
def test_a_read_whose_length_leaves_something_out(policy: Policy, used: int) -> None:
    driver = live(says(0, used, data=bytes(512)), policy=policy)
    with pytest.raises(AnswerViolation) as found:
        driver.read(0, 1)
    assert (found.value.rule, found.value.clause, found.value.queue) == ("UsedLengthShort", "2.7.8.2", 0)
    assert f"{used} bytes are said to be written, data and status have 513" in str(found.value)


def test_a_refusal_that_counts_only_its_status_is_understood_by_default() -> None:
    driver = live(says(RequestStatus.IOERR, 1))
    with pytest.raises(RequestFailed, match="IN at sector 0 was answered IOERR"):
        driver.read(0, 1)
    strict = live(says(RequestStatus.IOERR, 1), policy=STRICT)
    with pytest.raises(AnswerViolation, match="UsedLengthShort"):
        strict.read(0, 1)


def test_a_write_that_says_nothing_was_written() -> None:
    live(says(0, 0)).write(0, bytes(512))
    with pytest.raises(AnswerViolation, match="UsedLengthShort"):
        live(says(0, 0), policy=STRICT).write(0, bytes(512))


@pytest.mark.parametrize("way", ["split", "packed", "legacy"])
def test_a_status_that_was_never_written(way: str) -> None:
    driver = live(lambda chain: chain.writable, way=way, wanted=RINGS[way])
    with pytest.raises(AnswerViolation) as found:
        driver.identify()
    assert (found.value.rule, found.value.clause) == ("StatusMissing", "5.2.6")


@pytest.mark.parametrize("status", [3, 0x7F, 0xFE])
def test_a_status_that_nobody_defined(status: int) -> None:
    driver = live(says(status))
    request = driver.submit_read(0, 1)
    with pytest.raises(AnswerViolation) as found:
        request.wait()
    assert (found.value.rule, found.value.clause) == ("StatusUnknown", "5.2.6")
    assert f"the status is {status}" in found.value.message
    assert request.status is None
    assert request.data == b""
    # One wrong answer is one wrong answer: the driver goes on.
    assert driver.live


def test_legacy_lengths_mean_nothing() -> None:
    driver = live(says(0, 0, data=b"\x17" * 512), way="legacy")
    assert driver.read(5, 1) == b"\x17" * 512
    request = driver.submit_read(5, 1)
    assert request.wait() == b"\x17" * 512
    assert request.request is not None
    assert request.request.written == 0


@pytest.mark.parametrize("status", [RequestStatus.IOERR, RequestStatus.UNSUPP])
def test_a_refusal_is_no_broken_rule(status: RequestStatus) -> None:
    request = live(says(status)).submit_flush()
    with pytest.raises(RequestFailed, match=f"FLUSH at sector 0 was answered {status.name}"):
        request.wait()
    assert request.status == status


@pytest.mark.parametrize("values", [b"\4\0\0\0\0\0", b"\0\0\x0c\0\0\0", b"\0\0\0\0\0\1"])
def test_reserved_lifetimes(values: bytes) -> None:
    device = Lying(says(0, data=values), lifetime=(0, 0, 0))
    driver = BlkDriver(Loopback(device))
    driver.initialize()
    with pytest.raises(AnswerViolation) as found:
        driver.get_lifetime()
    assert (found.value.rule, found.value.clause) == ("ReservedLifetime", "5.2.6.2")


def test_an_id_of_any_bytes_is_shown_harmlessly() -> None:
    assert live(says(0, data=b"\xff disk\x1b" + bytes(13))).identify() == r"\xff disk" + "\x1b"
    assert live(says(0, data=b"x" * 20)).identify() == "x" * 20


@pytest.mark.parametrize("shown", [0, 2, 65535])
def test_queues_that_are_not_there(shown: int) -> None:
    device = BlkDevice(bytearray(SIZE))
    device.features |= FeatureSet("MQ", device=FEATURE_NAMES)
    device.config.update(num_queues=shown)
    driver = BlkDriver(Loopback(device))
    with pytest.raises(AnswerViolation, match="BadNumQueues"):
        driver.initialize()
    assert not driver.live


def test_a_configuration_space_that_ends_early() -> None:
    device = BlkDevice(bytearray(SIZE))
    registers = Loopback(device)
    registers.config_size = lambda: 8
    driver = BlkDriver(registers, wanted=RING_FEATURES)
    driver.initialize()
    assert driver.capacity == SIZE // 512
    with pytest.raises(StatusViolation, match="ConfigTooShort"):
        BlkDriver(registers).initialize()


def test_a_device_that_keeps_a_request() -> None:
    device = BlkDevice(bytearray(SIZE))
    registers = Loopback(device)
    driver = BlkDriver(registers, timeout=2.0)
    driver.initialize()
    registers.queue(0).stop()
    request = driver.submit_read(0, 1)
    with pytest.raises(PeerTimeout, match="the answer to IN at sector 0"):
        request.wait()
    with pytest.raises(PeerTimeout):
        driver.read(0, 1)
    assert not request.done
    driver.reset()
    assert request.done
    with pytest.raises(StateError):
        request.wait()


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [{"size_max": 512, "seg_max": 1}, {"size_max": 1000, "seg_max": 4}, {"size_max": 4096}, {"seg_max": 1}, {}],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_requests_keep_within_the_limits_of_the_device(limits: Mapping[str, Any], indirect: bool) -> None:
    seen: list[list[int]] = []

    class Watching(BlkDevice):
        def answer(self, chain: Chain) -> int:
            segments = [length for _, length, _ in chain.segments]
            assert segments[0] == 16
            assert segments[-1] == 1
            seen.append(segments[1:-1])
            return super().answer(chain)

    image = bytearray(b"".join(number.to_bytes(4, "big") for number in range(SIZE // 4)))
    device = Watching(image, **limits)
    driver = BlkDriver(Loopback(device), indirect=indirect, max_transfer=40_000)
    driver.initialize()
    assert driver.read(1, 200) == image[512 : 201 * 512]
    driver.write(0, bytes(range(256)) * 200)
    assert image[: 256 * 200] == bytes(range(256)) * 200
    assert sum(sum(each) for each in seen) == 300 * 512
    assert all(len(each) <= limits.get("seg_max", 126) for each in seen)
    assert all(length <= limits.get("size_max", 40_000) for each in seen for length in each)
    assert all(sum(each) <= 40_000 for each in seen)


def test_more_than_fits_into_memory_at_once() -> None:
    image = bytearray(8 << 20)
    driver = BlkDriver(
        Loopback(BlkDevice(image), memory=GuestMemory([(0, 1 << 18)])), max_transfer=32 << 10, queue_size=16
    )
    driver.initialize()
    driver.write(0, b"\x3c" * (8 << 20))
    assert image == b"\x3c" * (8 << 20)
    assert driver.read(0, 16384) == image


def test_a_full_queue_says_so() -> None:
    device = BlkDevice(bytearray(SIZE))
    registers = Loopback(device)
    driver = BlkDriver(registers, queue_size=8)
    driver.initialize()
    registers.queue(0).stop()
    driver.submit_read(0, 1)
    driver.submit_read(0, 1)
    with pytest.raises(QueueFull):
        driver.submit_read(0, 1)


# --- what it does not ask for ------------------------------------------------------------------------------


IMPOSSIBLE: list[Callable[[BlkDriver], object]] = [
    lambda driver: driver.read(SIZE // 512, 1),
    lambda driver: driver.read(-1, 1),
    lambda driver: driver.read(0, -1),
    lambda driver: driver.write(0, bytes(511)),
    lambda driver: driver.write(SIZE // 512 - 1, bytes(1024)),
    lambda driver: driver.discard(0, 2**17),
    lambda driver: driver.discard(SIZE // 512, 1),
    lambda driver: driver.submit_discard([]),
    lambda driver: driver.submit_write_zeroes([(0, 1)] * 17),
    lambda driver: driver.submit_write_zeroes([(0, -1)]),
    lambda driver: driver.submit_read(0, 1, queue=1),
]
NOT_NEGOTIATED: list[Callable[[BlkDriver], object]] = [
    lambda driver: driver.flush_cache(),
    lambda driver: driver.discard(0, 1),
    lambda driver: driver.write_zeroes(0, 1),
    lambda driver: driver.get_lifetime(),
    lambda driver: setattr(driver, "writeback", False),
]


@pytest.mark.parametrize("ask", IMPOSSIBLE)
def test_what_cannot_be(ask: Callable[[BlkDriver], object]) -> None:
    driver = BlkDriver(Loopback(BlkDevice(bytearray(SIZE))))
    driver.initialize()
    with pytest.raises(InvalidArgument):
        ask(driver)
    assert driver.in_flight == []


@pytest.mark.parametrize("ask", NOT_NEGOTIATED)
def test_what_was_not_negotiated(ask: Callable[[BlkDriver], object]) -> None:
    driver = BlkDriver(Loopback(BlkDevice(bytearray(SIZE), lifetime=(0, 0, 0))), wanted=RING_FEATURES)
    driver.initialize()
    assert (driver.geometry, driver.field("blk_size"), driver.block_size, driver.writeback) == (None, None, 512, False)
    with pytest.raises(NoFeature):
        ask(driver)


def test_zoned_is_not_for_us() -> None:
    device = BlkDevice(bytearray(SIZE))
    device.features |= FeatureSet("ZONED", device=FEATURE_NAMES)
    for wanted in (None, FeatureSet("ZONED", "VERSION_1", device=FEATURE_NAMES)):
        assert "ZONED" not in BlkDriver(Loopback(device), wanted=wanted).initialize()


def test_the_rest() -> None:
    with pytest.raises(InvalidArgument):
        BlkDriver(Loopback(BlkDevice(bytearray(SIZE))), max_transfer=511)
    assert str(BlkRequest(RequestType.IN, 7)) == "IN at sector 7"
    assert str(BlkRequest(99, 7)) == "request type 99 at sector 7"
    with pytest.raises(StateError):
        BlkRequest(0, 0).wait()
    assert CONFIG_FIELDS[0][0] == "capacity"


def test_each_request_is_told_of_once() -> None:
    told: list[BlkRequest] = []
    driver = BlkDriver(Loopback(BlkDevice(bytearray(SIZE))))
    driver.initialize()
    requests = [driver.submit_read(at, 1, on_done=told.append) for at in range(5)]
    requests.append(driver.submit_write(0, bytes(512), on_done=told.append))
    driver.loop.run_pending()
    assert told == requests
    driver.submit_read(0, 1, on_done=told.append)
    driver.reset()
    assert len(told) == 7
    assert told[6].error is not None


def test_raw_chains_can_be_sent_beside() -> None:
    driver = BlkDriver(Loopback(BlkDevice(bytearray(SIZE))))
    driver.initialize()
    assert driver.submit(0, [b"short"], [1]).wait() == b"\1"
    assert driver.submit_request(77, 0, room=3).done is False

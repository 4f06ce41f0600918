"""What a back-end leaves in flight goes to the next one: every request is answered, once, wherever the first died."""

from __future__ import annotations

import os
import select
import struct
from functools import partial
from pathlib import Path

import pytest
from virtio_test.device import RING_FEATURES
from virtio_test.driver.request import Request as DriverRequest
from virtio_test.driver.test import TestDriver
from virtio_test.errors import MessageError, PeerDisconnected, PeerError
from virtio_test.transport.vhost_user.codec import OwnedFd
from virtio_test.transport.vhost_user.inflight import InflightQueue, InflightRegion
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .vhost_user_peer import PROTOCOL, memfd
from .vhost_user_recorder import PACKED_STEPS, SPLIT_STEPS, Killed, recorder
from .world import eventually, open_fds

SIZE = 16


@pytest.fixture(autouse=True)
def nothing_leaks() -> object:
    before = open_fds()
    yield
    assert eventually(lambda: open_fds() == before), f"{open_fds()} fds are open, {before} were"


def driving(path: Path, *, packed: bool) -> tuple[TestDriver, VhostUserRegisters, list[PeerError]]:
    lost: list[PeerError] = []
    registers = VhostUserRegisters(
        path, device_id=45, queue_size=SIZE, keep_in_flight=True, on_lost=lost.append, timeout=5.0
    )
    driver = TestDriver(registers, console=lambda _: None, wanted=RING_FEATURES, timeout=5.0)
    driver.initialize()
    assert ("RING_PACKED" in driver.features) == packed
    return driver, registers, lost


def check(numbers: dict[DriverRequest, int]) -> None:
    """Each request has its own answer."""
    for request, number in numbers.items():
        assert TestDriver.parse(request.wait()) == (number + 101, number + 102, number + 103)


def record_of(registers: VhostUserRegisters, driver: TestDriver) -> InflightQueue:
    """What the front-end reads out of the record that was left behind."""
    assert registers.inflight is not None
    layout = driver.queues[0].layout()

    def word(name: str, slot: int = 0) -> int:
        return int.from_bytes(driver.memory.read(layout.at(name, slot), 2), "little")

    if layout.packed:
        return registers.inflight.packed_queue(0, lambda slot: word("desc.flags", slot))
    return registers.inflight.split(0, word("used.idx"))


STEPS = [(packed, step) for packed in (False, True) for step in range(1, (PACKED_STEPS if packed else SPLIT_STEPS) + 1)]


@pytest.mark.parametrize(("packed", "step"), STEPS)
@pytest.mark.parametrize("rounds", [0, 9, 11])
def test_killed_anywhere_every_request_is_answered_once(tmp_path: Path, packed: bool, step: int, rounds: int) -> None:
    path = tmp_path / "s"
    answered: list[DriverRequest] = []
    numbers: dict[DriverRequest, int] = {}

    def submit(driver: TestDriver, *which: int) -> None:
        for number in which:
            request = driver.submit_number(number)
            request.on_done = answered.append
            numbers[request] = number

    with recorder(path, packed=packed) as first:
        driver, registers, lost = driving(path, packed=packed)
        # So far round the ring that the wrap counter is another one, or changes with what is in flight.
        for number in range(rounds):
            submit(driver, number)
            for entry in first.take():
                first.use(entry)
            check(numbers)
        submit(driver, 20, 21, 22, 23, 24, 25)
        taken = first.take()
        assert len(taken) == 6
        first.use(taken[4])
        first.use(taken[1])
        with pytest.raises(Killed):
            first.use(taken[3], killed_at=step)
    assert driver.loop.run(until=lambda: bool(lost), timeout=5.0)
    assert isinstance(registers.lost, PeerDisconnected)
    assert driver.live, "the driver has nothing to do with it"
    assert all(request.error is None for request in numbers)
    # Written into a ring that nobody looks at for now.
    submit(driver, 30)
    seen = record_of(registers, driver)
    assert registers.kick_notifier(0, lambda: 0).drain()
    with recorder(path, packed=packed) as second:
        assert registers.reconnect() is True
        assert registers.lost is None
        # The step in which the ring itself changes is the one behind which the request is done.
        done = step >= (4 if packed else 3)
        assert len(second.resubmitted) == (3 if done else 4)
        # What was written meanwhile needs a kick of its own.
        assert select.select([second.fds[Request.SET_VRING_KICK, 0]], [], [], 5.0)[0]
        assert seen.heads == tuple(second.resubmitted)
        if not packed:
            assert second.base == second.field("used.idx")
        for entry in reversed(second.resubmitted):
            second.use(entry)
        for entry in second.take():
            second.use(entry)
        check(numbers)
        submit(driver, 40, 41)
        for entry in second.take():
            second.use(entry)
        check(numbers)
        assert len(answered) == len(numbers) == len(set(answered))
        assert registers.errors == lost
        driver.detach()
        registers.close()


def test_a_second_death_is_no_other_than_the_first(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with recorder(path, packed=False) as first:
        driver, registers, lost = driving(path, packed=False)
        request = driver.submit_number(1)
        first.take()
    assert driver.loop.run(until=lambda: len(lost) == 1, timeout=5.0)
    for _ in range(2):
        with pytest.raises(PeerDisconnected):
            registers.reconnect()
    for deaths in (2, 3):
        with recorder(path, packed=False) as again:
            assert registers.reconnect()
            assert len(again.resubmitted) == 1
        assert driver.loop.run(until=lambda deaths=deaths: len(lost) == deaths, timeout=5.0)
    with recorder(path, packed=False) as last:
        assert registers.reconnect()
        last.use(last.resubmitted[0])
        check({request: 1})
        driver.detach()
        registers.close()


@pytest.mark.parametrize("lacks", ["record", "feature"])
def test_a_back_end_that_cannot_take_over_is_refused_and_another_one_can(tmp_path: Path, lacks: str) -> None:
    path = tmp_path / "s"
    with recorder(path, packed=True) as first:
        driver, registers, lost = driving(path, packed=True)
        request = driver.submit_number(1)
        first.take()
    assert driver.loop.run(until=lambda: bool(lost), timeout=5.0)
    protocol = PROTOCOL & ~ProtocolFeature.INFLIGHT_SHMFD if lacks == "record" else PROTOCOL
    why = "keeps no record" if lacks == "record" else "does not offer RING_PACKED"
    with recorder(path, packed=lacks == "record", protocol=protocol), pytest.raises(PeerError, match=why):
        registers.reconnect()
    assert not request.done
    with recorder(path, packed=True) as third:
        assert registers.reconnect()
        third.use(third.resubmitted[0])
        check({request: 1})
        driver.detach()
        registers.close()


def test_a_driver_that_resets_meanwhile_wants_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with recorder(path, packed=False) as first:
        driver, registers, lost = driving(path, packed=False)
        request = driver.submit_number(1)
        first.take()
    assert driver.loop.run(until=lambda: bool(lost), timeout=5.0)
    assert driver.reset() == [request]
    with recorder(path, packed=False) as second:
        assert registers.reconnect() is False
        driver.initialize()
        request = driver.submit_number(2)
        assert second.resubmitted == []
        for entry in second.take():
            second.use(entry)
        check({request: 2})
        driver.detach()
        registers.close()


def test_what_waits_for_a_lost_back_end_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with recorder(path, packed=False) as first:
        driver, registers, _ = driving(path, packed=False)
        request = driver.submit_number(1)
        first.take()
    with pytest.raises(PeerDisconnected):
        request.wait(timeout=0.2)
    registers.close()


def test_a_new_region_comes_with_each_reset(tmp_path: Path) -> None:
    with recorder(tmp_path / "s", packed=False) as device:
        driver, registers, _ = driving(tmp_path / "s", packed=False)
        driver.initialize()
        assert device.names().count("GET_INFLIGHT_FD") == device.names().count("SET_INFLIGHT_FD") == 2
        assert registers.inflight is not None
        assert registers.inflight.fits(1, SIZE, packed=False)
        driver.detach()
        assert registers.inflight is None
        registers.close()


@pytest.mark.row("R11")
def test_a_record_that_cannot_be_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with recorder(path, packed=True) as first:
        driver, registers, lost = driving(path, packed=True)
        driver.submit_number(1)
        first.take()
        first.set("used_idx", SIZE)
    assert driver.loop.run(until=lambda: bool(lost), timeout=5.0)
    with recorder(path, packed=True):
        with pytest.raises(MessageError) as caught:
            registers.reconnect()
        assert caught.value.rule == "InflightState"
    registers.close()


# --- the region alone -------------------------------------------------------------------------------------------


def region(content: bytes = b"", *, queues: int = 1, packed: bool = False, size: int | None = None) -> InflightRegion:
    total = queues * (32 + 32 * SIZE if packed else 16 + 16 * SIZE) if size is None else size
    fd = memfd(total)
    os.pwrite(fd, content, 0)
    return InflightRegion(OwnedFd(fd), total, 0, queues=queues, queue_size=SIZE, packed=packed)


def split_header(*, version: int = 1, desc_num: int = SIZE, last: int = 0, used: int = 0) -> bytes:
    return struct.pack("=QHHHH", 0, version, desc_num, last, used)


def packed_header(
    *, version: int = 1, desc_num: int = SIZE, free: int = 0, used: int = 0, old_used: int = 0, wrap: int = 1
) -> bytes:
    return struct.pack("=QHHHHHHBB10x", 0, version, desc_num, free, free, used, old_used, wrap, wrap)


def test_nothing_is_recorded_at_first() -> None:
    assert region().split(0, 7) == InflightQueue((), 0, 7)
    fresh = region(packed=True)
    assert fresh.packed_queue(0, lambda _: 0) == InflightQueue((), 0, 0x8000)
    assert fresh.packed_state(0, lambda _: 0).avail == 0x8000


@pytest.mark.row("R11", "qemu@bf21298c")
@pytest.mark.parametrize(
    ("content", "used"),
    [
        (split_header(version=2), 0),
        (split_header(desc_num=SIZE - 1), 0),
        (split_header(used=0), SIZE + 1),
        (split_header(used=5), 4),
        (split_header(last=SIZE), 1),
        (split_header(last=0xFFFF), SIZE),
    ],
)
def test_an_impossible_split_record(content: bytes, used: int) -> None:
    with pytest.raises(MessageError) as caught:
        region(content).split(0, used)
    assert (caught.value.rule, caught.value.queue) == ("InflightState", 0)


@pytest.mark.row("R11", "R09")
@pytest.mark.parametrize(
    "content",
    [
        packed_header(version=9),
        packed_header(desc_num=0),
        packed_header(used=SIZE),
        packed_header(old_used=0xFFFF),
        packed_header(wrap=2),
        # In flight without a descriptor, and with more than the ring has.
        packed_header(free=SIZE) + struct.pack("=BxHHHQHHIQ", 1, 0, 0, 0, 0, 0, 0, 0, 0),
        packed_header(free=SIZE) + struct.pack("=BxHHHQHHIQ", 1, 0, 0, SIZE + 1, 0, 0, 0, 0, 0),
    ],
)
def test_an_impossible_packed_record(content: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        region(content, packed=True).packed_state(0, lambda _: 0)
    assert (caught.value.rule, caught.value.queue) == ("InflightState", 0)


@pytest.mark.row("R11")
def test_a_free_list_in_a_circle_ends() -> None:
    circle = packed_header(free=3) + b"".join(
        struct.pack("=BxHHHQHHIQ", 0, (entry + 1) % 5, 0, 0, 0, 0, 0, 0, 0) for entry in range(SIZE)
    )
    assert region(circle, packed=True).packed_queue(0, lambda _: 0).heads == ()


@pytest.mark.row("R11", "qemu@b9d248df")
def test_a_list_of_used_buffers_in_a_circle_ends() -> None:
    circle = split_header(last=2) + struct.pack("=B5xHQ", 1, 2, 0) * SIZE
    assert len(region(circle).split(0, SIZE).heads) == SIZE - 1


@pytest.mark.row("R11", "qemu@fbdfdbb9")
@pytest.mark.parametrize(("queues", "packed"), [(1, False), (3, False), (1, True), (256, True)])
def test_a_region_is_large_enough_or_none(queues: int, packed: bool) -> None:
    least = queues * (32 + 32 * SIZE if packed else 16 + 16 * SIZE)
    assert region(queues=queues, packed=packed, size=least).fits(queues, SIZE, packed=packed)
    with pytest.raises(MessageError, match="InflightRegion"):
        region(queues=queues, packed=packed, size=least - 1)


def test_a_file_that_shrinks_kills_nobody() -> None:
    shrinking = region(split_header())
    os.truncate(shrinking.fileno(), 8)
    with pytest.raises(MessageError, match="has become shorter"):
        shrinking.split(0, 0)


def test_parts_lie_one_after_the_other() -> None:
    part = 16 + 16 * SIZE
    content = bytes(part) + split_header(used=3) + struct.pack("=B5xHQ", 1, 0, 9)
    two = region(content, queues=2)
    assert two.split(0, 5).heads == ()
    assert two.split(1, 3) == InflightQueue((0,), 1, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_region_that_may_only_be_written_is_refused_where_it_is_read(packed: bool) -> None:
    whole = memfd(1 << 16)
    fd = os.open(f"/proc/self/fd/{whole}", os.O_WRONLY)
    os.close(whole)
    region = InflightRegion(OwnedFd(fd), 1 << 16, 0, queues=1, queue_size=SIZE, packed=packed)
    look = partial(region.packed_state, 0, lambda _: 0) if packed else partial(region.split, 0, 0)
    with pytest.raises(MessageError) as caught:
        look()
    assert caught.value.rule == "InflightRegion"
    assert "cannot be read" in caught.value.message
    region.close()

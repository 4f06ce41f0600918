"""What hangs on the seam of memory, as Python has it: the dirty log, and the memory of an IOMMU."""

from __future__ import annotations

import os

import pytest
from virtio_test._core import (
    DeviceQueue,
    DirtyLog,
    DriverQueue,
    GuestMemory,
    Notifier,
    QueueConfig,
    RingLayout,
)
from virtio_test.errors import InvalidArgument, QueueViolation, RuleViolation, StaleMemory, StateError

PAGE = 4096


def test_a_log_names_the_pages_that_were_written() -> None:
    memory, log = GuestMemory([(0, 64 * PAGE)]), DirtyLog(8)
    assert (memory.log_size, log.size, repr(log)) == (0, 8, "DirtyLog(8)")
    memory.start_log(log.fd, log.size)
    assert memory.log_size == 8
    memory.write(PAGE - 1, b"xy")
    memory.fill(9 * PAGE, 2 * PAGE, 1)
    memory.copy(20 * PAGE, 0, 1)
    with memory.live_view(30 * PAGE, 1, writable=True) as view:
        view[0] = 1
    assert log.take() == [0, 1, 9, 10, 20], "a live view is nobody's write"
    assert log.take() == []
    other = DirtyLog(8)
    memory.start_log(other.fd, other.size, elsewhere=[(PAGE, PAGE, 40 * PAGE)])
    memory.write(PAGE, b"x")
    assert (log.take(), other.take()) == ([], [40])
    memory.stop_log()
    memory.write(PAGE, b"x")
    assert (memory.log_size, other.take()) == (0, [])


def test_a_log_that_cannot_be_leaves_the_one_there_was() -> None:
    memory, log = GuestMemory([(0, 64 * PAGE)]), DirtyLog(8)
    memory.start_log(log.fd, 8)
    for arguments in ((log.fd, 0, 0), (log.fd, 9, 0), (log.fd, 8, 1), (log.fd, 2**64 - 1, 8), (-1, 8, 0)):
        with pytest.raises(InvalidArgument):
            memory.start_log(arguments[0], arguments[1], offset=arguments[2])
    memory.write(5, b"x")
    assert log.take() == [0]


def test_a_log_that_is_cut_short_is_the_front_ends_rule() -> None:
    fd = os.memfd_create("log")
    try:
        os.truncate(fd, PAGE)
        memory = GuestMemory([(0, 64 * PAGE)])
        memory.start_log(fd, PAGE)
        os.truncate(fd, 0)
        with pytest.raises(RuleViolation) as caught:
            memory.write(PAGE, b"x")
        assert caught.value.rule == "MemoryLost"
        memory.stop_log()
        memory.write(PAGE, b"x")
    finally:
        os.close(fd)


def test_memory_of_an_iommu_shows_parts_of_another() -> None:
    real, shown = GuestMemory([(0, 16 * PAGE)]), GuestMemory()
    shown.translate(real)
    shown.translate(real, add=[(7 * PAGE, PAGE, 2 * PAGE, True, True), (9 * PAGE, PAGE, PAGE, True, False)])
    shown.write(7 * PAGE, b"here")
    assert real.read(2 * PAGE, 4) == b"here"
    assert [(each.address, each.writable) for each in shown.regions] == [(7 * PAGE, True), (9 * PAGE, False)]
    with pytest.raises(InvalidArgument, match="0x9000 has no translation to write"):
        shown.write(9 * PAGE, b"x")
    with pytest.raises(InvalidArgument, match="there is no memory at 0x100000"):
        shown.translate(real, add=[(0, PAGE, 1 << 20, True, True)])
    with pytest.raises(InvalidArgument, match="overlaps"):
        shown.translate(real, add=[(7 * PAGE + 8, 8, 0, True, True)])
    with pytest.raises(StateError, match="not both"):
        shown.add_region(0, PAGE)
    shown.translate(real, remove=[7 * PAGE])
    assert not shown.is_mapped(7 * PAGE, 1)
    shown.follow(real)
    assert shown.read(2 * PAGE, 4) == b"here"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.row("B16")
@pytest.mark.row("T12")
def test_a_queue_waits_for_translations(packed: bool) -> None:
    real, shown, told = GuestMemory([(0, 64 * PAGE)]), GuestMemory(), list[int]()
    shown.translate(real, add=[(0, 4 * PAGE, 0, True, True)])
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0, packed=packed), features=1 << 32)
    driver = DriverQueue(real, config)
    queue = DeviceQueue(shown, config, miss=Notifier.callback(lambda: told.append(1)))
    assert queue.missing is None
    token = driver.add([(40 * PAGE, 8)], [(41 * PAGE - 8, 16)])
    driver.publish()
    assert queue.has_work()
    for page, address, length, writable in ((40, 40 * PAGE, 8, False), (41, 41 * PAGE, 8, True)):
        assert queue.pop() is None
        assert len(queue.pop_many()) == 0
        missing = queue.missing
        assert missing is not None
        assert (missing.address, missing.length, missing.writable) == (address, length, writable)
        assert (missing.violation.rule, missing.violation.address) == ("UnmappedAddress", address)
        assert not queue.has_work()
        assert queue.process(lambda _: None) == 0
        shown.translate(real, add=[(page * PAGE, PAGE, page * PAGE, True, True)])
        assert queue.has_work()
    assert len(told) == 2, "once for each"
    chain = queue.pop()
    assert chain is not None
    assert chain.write(b"12345678abcdefgh") == 16
    # One that goes between pop and copy: nothing of the copy is done.
    shown.translate(real, remove=[41 * PAGE])
    with pytest.raises(StaleMemory, match="0x29000 has no translation to write"):
        chain.write(bytes(16))
    assert real.read(41 * PAGE - 8, 16) == b"12345678abcdefgh"
    assert queue.push(chain, 16)
    assert driver.get_used() == (token, 16)


@pytest.mark.row("B16")
def test_a_translation_that_is_refused_breaks_the_rule_that_waits() -> None:
    real, shown = GuestMemory([(0, 64 * PAGE)]), GuestMemory()
    shown.translate(real, add=[(0, 4 * PAGE, 0, True, True), (40 * PAGE, PAGE, 40 * PAGE, True, False)])
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0), features=1 << 32)
    driver, queue = DriverQueue(real, config), DeviceQueue(shown, config)
    driver.add([], [(40 * PAGE, 8)])
    driver.publish()
    assert queue.pop() is None, "what may only be read may be written yet"
    missing = queue.missing
    assert missing is not None
    assert missing.writable
    queue.latch(missing.violation)
    assert queue.latched == missing.violation
    assert isinstance(queue.latched, QueueViolation)
    shown.translate(real, remove=[40 * PAGE], add=[(40 * PAGE, PAGE, 40 * PAGE, True, True)])
    assert queue.pop() is None
    assert not queue.has_work()

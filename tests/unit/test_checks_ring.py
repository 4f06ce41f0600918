"""`Ring.check`: the lint as a method of what it judges, and of what a running queue stands at."""

from __future__ import annotations

import pytest
import virtio_test
from virtio_test import DeviceQueue, DriverQueue, GuestMemory, Policy, QueueConfig, QueueState, Ring, RingLayout
from virtio_test.checks import check_ring
from virtio_test.errors import InvalidArgument, QueueViolation

BUFFER = 0x8000


def ends(*, packed: bool, policy: Policy = Policy.interop) -> tuple[GuestMemory, DriverQueue, DeviceQueue]:
    memory = GuestMemory([(0, 1 << 16)])
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000, packed=packed), index=3, policy=policy)
    driver = DriverQueue(memory, config)
    for index in range(4):
        driver.add([(BUFFER + 16 * index, 16)])
    driver.publish()
    return memory, driver, DeviceQueue(memory, config)


@pytest.mark.parametrize("packed", [False, True])
def test_a_running_queue_shows_all_that_waits_for_it(packed: bool) -> None:
    memory, _, device = ends(packed=packed)
    assert Ring.of(device).check() == []
    at = device.layout().at
    first = device.pop()
    assert first is not None
    memory.write(at("desc.addr", 1), (1 << 40).to_bytes(8, "little"))
    memory.write(at("desc.len", 2), bytes(4))
    memory.write(at("desc.addr", 3), (1 << 41).to_bytes(8, "little"))
    before = memory.read(0, 1 << 16)
    assert [(each.rule, each.position) for each in Ring.of(device).check()] == [
        ("UnmappedAddress", 1),
        ("UnmappedAddress", 3),
    ]
    strict = Ring.of(device).check(policy=Policy.strict)
    assert [(each.rule, each.queue, each.position) for each in strict] == [
        ("UnmappedAddress", 3, 1),
        ("ZeroLength", 3, 2),
        ("UnmappedAddress", 3, 3),
    ]
    assert memory.read(0, 1 << 16) == before
    # The queue has not moved, and finds the first of them by itself.
    assert device.latched is None
    assert device.push(first)
    with pytest.raises(QueueViolation, match="UnmappedAddress"):
        device.pop()


def test_a_driver_queue_judges_what_was_used_behind_it() -> None:
    memory, driver, device = ends(packed=False)
    for _ in range(2):
        chain = device.pop()
        assert chain is not None
        device.push(chain)
    assert driver.get_used() is not None
    assert Ring.of(driver).check() == []
    memory.write(device.layout().at("used.ring.len", 1), (1).to_bytes(4, "little"))
    assert [(each.rule, each.position) for each in Ring.of(driver).check()] == [("UsedLenTooBig", 1)]


def test_a_packed_driver_queue_judges_its_own_chains() -> None:
    memory, driver, _ = ends(packed=True)
    assert Ring.of(driver).check() == []
    memory.write(driver.layout().at("desc.addr", 2), (1 << 40).to_bytes(8, "little"))
    assert [(each.rule, each.position) for each in Ring.of(driver).check()] == [("UnmappedAddress", 2)]


def test_it_is_check_ring_with_a_name() -> None:
    memory, _, device = ends(packed=False)
    memory.write(device.layout().at("avail.ring", 2), b"\xff\xff")
    ring = Ring(memory, device.config, QueueState(2))
    assert ring.check() == check_ring(memory, device.config, state=QueueState(2))
    assert [each.rule for each in ring.check()] == ["HeadOutOfRange"]
    assert virtio_test.Ring is Ring
    packed, _, _ = ends(packed=True)
    with pytest.raises(InvalidArgument, match="give no driver state"):
        Ring(
            packed, QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000, packed=True)), None, QueueState(0)
        ).check()

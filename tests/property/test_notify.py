"""Notifications: each end says what it wants to hear, and the model decides who must be told (VIRTIO 1.4, 2.7.10)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory

from tests.property.ends import (
    EVENT_IDX,
    IN_ORDER,
    CoreDeviceEnd,
    CoreDriverEnd,
    DeviceEnd,
    DriverEnd,
    ModelDeviceEnd,
    ModelDriverEnd,
    Setup,
)
from tests.property.model import FlatMemory, Memory, Plan, Segment
from tests.property.shapes import PAGE, setups

BUFFER = 1 << 40
Step = tuple[int, int, int, bool]
"""How many buffers go there and back; what is waited for, counted from here; the flags field; whether to signal."""


class Decision(NamedTuple):
    """Slots that had moved since the one before, and whether the other side was notified."""

    moved: int
    notified: bool


steps = st.lists(
    st.tuples(st.integers(0, 5), st.integers(-6, 3), st.sampled_from([2, 2, 0, 1, 3, 0xFFFC]), st.booleans()),
    min_size=1,
    max_size=20,
)
queues = setups(sizes=[1, 2, 4, 8, 256], features=st.sampled_from([EVENT_IDX, EVENT_IDX, 0]))


def regions(setup: Setup) -> list[tuple[int, int]]:
    return [(setup.base, -(-setup.layout.end // PAGE) * PAGE - setup.base), (BUFFER, PAGE)]


def suppress(setup: Setup, memory: Memory, area: str, moved: int, near: int, flags: int) -> None:
    """What the `area` (driver or device) says it wants: the place `near` steps from the one after `moved` steps."""
    if setup.packed:
        circle = 2 * setup.size
        begin = (setup.start & 0x7FFF) + (0 if setup.start >> 15 else setup.size)
        place = (begin + moved + near) % circle
        event = place % setup.size | (place < setup.size) << 15
        names = f"{area}_event.off_wrap", f"{area}_event.flags"
    else:
        event = setup.start + moved + near & 0xFFFF
        names = ("used_event", "avail.flags") if area == "driver" else ("avail_event", "used.flags")
    for name, value in zip(names, (event, flags), strict=True):
        memory.write(setup.layout.at(name), value.to_bytes(2, "little"))


def there_and_back(driver: DriverEnd, device: DeviceEnd, count: int) -> None:
    for _ in range(count):
        token = driver.add(Plan([Segment(BUFFER, 1, writable=True)]))
        driver.publish()
        number = device.pop()
        assert number is not None
        device.finish(number, b"x")
        assert driver.take() == [(token, 1)]


def decisions(
    setup: Setup, memory: Memory, driver: DriverEnd, device: DeviceEnd, asks: str, script: Iterable[Step]
) -> list[Decision]:
    """What is decided at each signal, while the side `asks` says what it wants."""
    found, moved, fresh = list[Decision](), 0, 0
    for count, near, flags, signals in script:
        there_and_back(driver, device, count)
        moved += count
        fresh += count
        suppress(setup, memory, asks, moved, near, flags)
        if signals:
            found.append(Decision(fresh, device.call() if asks == "driver" else driver.kick()))
            fresh = 0
    return found


def expected(setup: Setup, asks: str, script: Iterable[Step]) -> list[Decision]:
    memory = FlatMemory(regions(setup))
    setup.ring(memory).begin_at(setup.start)
    ends = ModelDriverEnd(setup, memory), ModelDeviceEnd(setup, memory)
    return decisions(setup, memory, *ends, asks, script)


def prepare(setup: Setup) -> GuestMemory:
    memory = GuestMemory(regions(setup))
    setup.ring(memory).begin_at(setup.start)
    return memory


@pytest.mark.row("N01", "N03", "N05", "N10")
@given(queues, steps)
def test_our_device_end_calls_exactly_when_the_driver_asked_for_it(setup: Setup, script: list[Step]) -> None:
    memory = prepare(setup)
    ends = ModelDriverEnd(setup, memory), CoreDeviceEnd(setup, memory)
    ours = decisions(setup, memory, *ends, "driver", script)
    model = expected(setup, "driver", script)
    # The first call may be one too many: a device that goes on from a state does not know what was said before (N03).
    first = next((index for index, decision in enumerate(model) if decision.moved), 0)
    assert ours[:first] == model[:first]
    compare(setup, ours[first + 1 :], model[first + 1 :])
    assert not model[first:] or ours[first].notified >= model[first].notified


def compare(setup: Setup, ours: list[Decision], model: list[Decision]) -> None:
    """Equal; but after more than a lap of a packed ring one notification more is allowed, never one less."""
    for core, judge in zip(ours, model, strict=True):
        assert core.moved == judge.moved
        if setup.packed and core.moved > setup.size:
            assert core.notified >= judge.notified
        else:
            assert core.notified == judge.notified


@pytest.mark.row("N01")
@given(queues, steps)
def test_our_driver_end_kicks_exactly_when_the_device_asked_for_it(setup: Setup, script: list[Step]) -> None:
    memory = prepare(setup)
    ends = CoreDriverEnd(setup, memory), ModelDeviceEnd(setup, memory)
    compare(setup, decisions(setup, memory, *ends, "device", script), expected(setup, "device", script))


def one_more(driver: DriverEnd, device: DeviceEnd) -> tuple[bool, bool]:
    """One buffer there and back, each end asked right after its own part: (device kicked, driver called)."""
    driver.add(Plan([Segment(BUFFER, 1, writable=True)]))
    driver.publish()
    kicked = driver.kick()
    number = device.pop()
    assert number is not None
    device.finish(number, b"x")
    called = device.call()
    assert len(driver.take()) == 1
    return kicked, called


@given(queues, st.integers(0, 3))
def test_whoever_enables_notifications_is_told_of_the_very_next_buffer(setup: Setup, count: int) -> None:
    memory = prepare(setup)
    driver, device = CoreDriverEnd(setup, memory), ModelDeviceEnd(setup, memory)
    for _ in range(count):
        one_more(driver, device)
    assert not driver.queue.enable_calls()
    assert one_more(driver, device)[1]

    memory = prepare(setup)
    model, ours = ModelDriverEnd(setup, memory), CoreDeviceEnd(setup, memory)
    for _ in range(count):
        one_more(model, ours)
    assert not ours.queue.enable_kicks()
    assert one_more(model, ours)[0]


@given(queues, st.integers(0, 3), st.integers(1, 3))
def test_whoever_disables_notifications_is_told_of_nothing_more(setup: Setup, before: int, after: int) -> None:
    """A split ring with EVENT_IDX has no word for "never": there the last event that was asked for may still come."""
    memory = prepare(setup)
    driver, device = CoreDriverEnd(setup, memory), ModelDeviceEnd(setup, memory)
    for _ in range(before):
        one_more(driver, device)
    driver.queue.disable_calls()
    told = [one_more(driver, device)[1] for _ in range(after)]
    assert sum(told) <= (setup.event_idx and not setup.packed)

    memory = prepare(setup)
    model, ours = ModelDriverEnd(setup, memory), CoreDeviceEnd(setup, memory)
    for _ in range(before):
        one_more(model, ours)
    ours.queue.disable_kicks()
    told = [one_more(model, ours)[0] for _ in range(after)]
    assert sum(told) <= (setup.event_idx and not setup.packed)


@pytest.mark.row("N06")
@given(queues)
def test_work_that_came_before_the_arming_is_seen_by_it(setup: Setup) -> None:
    """The race of 2.7.7.1: what arrives between the last look and the arming is reported by the arming (N06)."""
    memory = prepare(setup)
    driver, device = CoreDriverEnd(setup, memory), CoreDeviceEnd(setup, memory)
    driver.add(Plan([Segment(BUFFER, 1, writable=True)]))
    assert not device.queue.enable_kicks()
    driver.publish()
    assert device.queue.enable_kicks()
    number = device.pop()
    assert number is not None
    assert not driver.queue.enable_calls()
    device.finish(number, b"x")
    assert driver.queue.enable_calls()


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_65536_buffers_between_two_signals_are_not_none(features: int) -> None:
    """A split ring's indices are back where they were; whoever wants to hear of anything hears of it."""
    setup = Setup(packed=False, size=32768, base=0, start=0, features=IN_ORDER | features)
    memory = prepare(setup)
    driver, device = DriverQueue(memory, setup.config()), DeviceQueue(memory, setup.config())

    def lap() -> None:
        for _ in range(setup.size):
            driver.add([], [(BUFFER, 1)])
        driver.publish()
        while (chain := device.pop()) is not None:
            device.push(chain, 0)
        assert len(driver.get_used_many()) == setup.size

    lap()
    driver.signal()
    device.signal()
    driver.enable_calls()
    device.enable_kicks()
    lap()
    lap()
    assert driver.signal()
    assert device.signal()

"""Chains that are added many at once, from Python: the same tokens and the same memory as one by one."""

from __future__ import annotations

from typing import Any

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.errors import InvalidArgument, QueueFull

RAM = 0x10000
DATA = 0x8000

Span = tuple[int, int]


def ends(size: int, *, packed: bool) -> tuple[GuestMemory, DriverQueue, DeviceQueue]:
    memory = GuestMemory([(0, RAM)])
    config = QueueConfig.from_layout(RingLayout.contiguous(size, 0x1000, packed=packed))
    return memory, DriverQueue(memory, config), DeviceQueue(memory, config)


CHAINS: list[tuple[list[Span], list[Span]]] = [
    ([(DATA, 16)], [(DATA + 0x100, 12)]),
    ([], [(DATA + 0x200, 1)]),
    ([(DATA + 0x300, 2), (DATA + 0x310, 3)], []),
]


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_as_one_by_one(packed: bool) -> None:
    memory, driver, device = ends(8, packed=packed)
    other_memory, other, _ = ends(8, packed=packed)
    assert driver.add_many(CHAINS) == [0, 1, 2] == [other.add(*chain) for chain in CHAINS]
    assert driver.publish() == other.publish() == 3
    assert memory.read(0, RAM) == other_memory.read(0, RAM)
    assert device.process(lambda _: b"") == 3
    assert driver.get_used_many() == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("packed", [False, True])
def test_as_many_as_there_is_room_for(packed: bool) -> None:
    _, driver, _ = ends(4, packed=packed)
    assert driver.add_many(CHAINS) == [0, 1]
    assert driver.add_many(CHAINS[2:]) == []
    with pytest.raises(QueueFull):
        driver.add(*CHAINS[2])
    assert driver.add_many(CHAINS[1:]) == [2]
    assert driver.add_many([]) == []


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_none_is_told_of_when_it_is_the_first(packed: bool) -> None:
    memory, driver, _ = ends(8, packed=packed)
    bad = ([(DATA, 1)], [(DATA, 0)])
    assert driver.add_many([CHAINS[0], bad, CHAINS[1]]) == [0]
    before = memory.read(0, RAM)
    with pytest.raises(InvalidArgument, match="at least one byte"):
        driver.add_many([bad, CHAINS[1]])
    # What cannot be the length of a descriptor is seen before anything is added.
    with pytest.raises(InvalidArgument, match=f"a buffer of {2**32} bytes does not fit"):
        driver.add_many([CHAINS[0], ([(DATA, 2**32)], [])])
    assert memory.read(0, RAM) == before
    assert driver.add_many(CHAINS[1:]) == [1, 2]


WRONG: list[Any] = [None, 5, [5], [([], [], [])], [([(1, "x")], [])], [([(-1, 5)], [])]]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_list_of_chains(wrong: Any) -> None:
    _, driver, _ = ends(8, packed=False)
    with pytest.raises((TypeError, ValueError)):
        driver.add_many(wrong)
    assert driver.add_many(CHAINS) == [0, 1, 2]

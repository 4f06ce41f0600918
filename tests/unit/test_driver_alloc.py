"""The driver's allocator: pieces never overlap, stay inside, and come back whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import GuestMemory
from virtio_test.driver.alloc import Arena
from virtio_test.errors import InvalidArgument, StateError

PAGE = 4096


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory([(0x10000, 4 * PAGE), (0x80000, 2 * PAGE)])


def test_it_takes_the_largest_region(memory: GuestMemory) -> None:
    arena = Arena(memory)
    assert (arena.address, arena.size) == (0x10000, 4 * PAGE)
    assert arena.allocate(4 * PAGE) == 0x10000
    with pytest.raises(StateError, match="no 1 bytes are left"):
        arena.allocate(1)


def test_a_range_of_its_own(memory: GuestMemory) -> None:
    arena = Arena(memory, address=0x80010, size=32)
    assert arena.allocate(16) == 0x80010
    assert arena.allocate(16) == 0x80020
    assert arena.used == 32
    assert Arena(memory, address=0x80000 + PAGE).size == PAGE


@pytest.mark.parametrize(("address", "size"), [(0x10000, 0), (0, 16), (0x10000, 5 * PAGE), (0x80000, -1), (5, None)])
def test_what_is_not_mapped_is_refused(memory: GuestMemory, address: int, size: int | None) -> None:
    with pytest.raises(InvalidArgument):
        Arena(memory, address=address, size=size)


def test_without_regions_there_is_no_arena() -> None:
    with pytest.raises(InvalidArgument, match="no writable region"):
        Arena(GuestMemory())


@pytest.mark.parametrize(("size", "align"), [(0, 16), (-1, 16), (16, 0), (16, 3)])
def test_impossible_pieces(memory: GuestMemory, size: int, align: int) -> None:
    with pytest.raises(InvalidArgument):
        Arena(memory).allocate(size, align=align)


def test_a_piece_comes_back_once(memory: GuestMemory) -> None:
    arena = Arena(memory)
    piece = arena.allocate(10)
    with pytest.raises(InvalidArgument):
        arena.free(piece + 1)
    arena.free(piece)
    with pytest.raises(InvalidArgument):
        arena.free(piece)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 3000), st.sampled_from([1, 2, 4, 16, 256, 4096])),
            st.integers(0, 50),
        ),
        max_size=60,
    )
)
def test_pieces_never_overlap_and_all_come_back(steps: list[tuple[int, int] | int]) -> None:
    arena = Arena(MEMORY)
    taken: dict[int, int] = {}
    for step in steps:
        if isinstance(step, int):
            if taken:
                address = sorted(taken)[step % len(taken)]
                del taken[address]
                arena.free(address)
            continue
        size, align = step
        try:
            address = arena.allocate(size, align=align)
        except StateError:
            continue
        assert address % align == 0
        assert arena.address <= address <= arena.address + arena.size - size
        assert all(address + size <= other or other + length <= address for other, length in taken.items())
        taken[address] = size
    assert arena.used == sum(taken.values())
    for address in taken:
        arena.free(address)
    assert arena.allocate(arena.size, align=1) == arena.address, "the holes were merged"


MEMORY = GuestMemory([(0x10000, 4 * PAGE)])

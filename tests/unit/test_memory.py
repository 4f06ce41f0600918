"""Guest memory as Python sees it: regions, buffers of every kind, live views, and what is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import GuestMemory, Trace
from virtio_test.errors import InvalidArgument

from .world import mapped_files, open_fds

PAGE = 4096


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory([(0, 16 * PAGE), (16 * PAGE, PAGE)])


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def plain(array: np.ndarray[Any, Any]) -> Any:
    """The array itself; numpy's types say that it is a buffer only from Python 3.12 on."""
    return array


def test_repr_evaluates_back() -> None:
    for text in ("GuestMemory([])", "GuestMemory([(0, 65536), (131072, 4096)], backing='anonymous')"):
        assert repr(eval(text)) == text
    assert repr(GuestMemory([(0, PAGE)], trace=Trace())) == "GuestMemory([(0, 4096)], trace=Trace())"


def test_every_bytes_like_argument_is_written_and_filled(memory: GuestMemory) -> None:
    whole = b"\x01\x02\x03\x04"
    words = plain(np.frombuffer(whole, dtype="<u2"))
    for index, data in enumerate((whole, bytearray(whole), memoryview(whole), words, words.reshape(2, 1))):
        memory.fill(index * 8, 8, 0xFF)
        memory.write(index * 8, data)
        assert memory.read(index * 8, 5) == whole + b"\xff"
    target = plain(np.zeros((2, 2), dtype="<u2"))
    memory.read_into(0, target)
    assert target.tolist() == [[0x0201, 0x0403], [0xFFFF, 0xFFFF]]
    array = bytearray(3)
    memory.read_into(1, memoryview(array)[1:])
    assert array == b"\x00\x02\x03"
    memory.write(0, b"")
    assert memory.read(0, 0) == b""


def test_buffers_that_are_no_plain_bytes_in_a_row_are_refused(memory: GuestMemory) -> None:
    objects = plain(np.array([object()], dtype=object))
    records = plain(np.zeros(1, dtype=[("Offset", "<u4"), ("O", "<u4")]))
    for unfit in (plain(np.zeros((4, 4), dtype=np.uint8)[:, 1]), objects, memoryview(b"abcd")[::2]):
        with pytest.raises(InvalidArgument):
            memory.write(0, unfit)
        with pytest.raises(InvalidArgument):
            memory.read_into(0, unfit)
    memory.read_into(0, records)
    with pytest.raises(InvalidArgument, match="read-only"):
        memory.read_into(0, b"abcd")
    for unfit in ("text", 5, None):
        with pytest.raises(TypeError):
            memory.write(0, unfit)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("address", [-1, 2**64, 2**64 - 1, 17 * PAGE, 17 * PAGE - 3])
def test_impossible_ranges_change_nothing(memory: GuestMemory, address: int) -> None:
    memory.fill(0, 17 * PAGE, 0xA5)
    target = bytearray(4)
    calls = (
        lambda: memory.write(address, b"abcd"),
        lambda: memory.fill(address, 4),
        lambda: memory.copy(address, 0, 4),
        lambda: memory.copy(0, address, 4),
        lambda: memory.read(address, 4),
        lambda: memory.read_into(address, target),
        lambda: memory.live_view(address, 4),
    )
    for call in calls:
        with pytest.raises(InvalidArgument):
            call()
    assert memory.read(0, 17 * PAGE) == b"\xa5" * 17 * PAGE
    with pytest.raises(InvalidArgument):
        memory.read(0, 2**62)
    with pytest.raises(InvalidArgument):
        memory.fill(0, 1, 256)


def test_regions_are_added_and_removed_whole_or_not_at_all(memory: GuestMemory, file: int) -> None:
    os.pwrite(file, b"here", PAGE + 8)
    memory.add_region(1 << 20, PAGE, fd=file, offset=PAGE + 8)
    assert memory.read(1 << 20, 4) == b"here"
    region = memory.regions[2]
    assert (region.address, region.size, region.offset, region.writable) == (1 << 20, PAGE, PAGE + 8, True)
    assert region.fd is not None
    assert os.fstat(region.fd).st_ino == os.fstat(file).st_ino
    memory.add_region(2 << 20, PAGE, writable=False)
    with pytest.raises(InvalidArgument, match="read-only"):
        memory.write(2 << 20, b"x")
    refused = (
        lambda: memory.add_region(0, PAGE),
        lambda: memory.add_region(4 << 20, 0),
        lambda: memory.add_region(4 << 20, 100),
        lambda: memory.add_region(2**64 - PAGE, PAGE),
        lambda: memory.add_region(4 << 20, PAGE, offset=8),
        lambda: memory.add_region(4 << 20, PAGE, fd=-1),
        lambda: memory.add_region(4 << 20, PAGE, fd=99999),
        lambda: memory.add_region(4 << 20, 4 * PAGE, fd=file, offset=8),
        lambda: memory.remove_region(0, PAGE),
        lambda: memory.replace([(0, PAGE, file, 0), (PAGE - 8, PAGE, file, 0)]),
        lambda: memory.replace([(k * PAGE, PAGE, file, 0) for k in range(510)]),
    )
    for call in refused:
        with pytest.raises(InvalidArgument):
            call()
    assert (memory.epoch, len(memory.regions)) == (2, 4)
    memory.remove_region(1 << 20, PAGE)
    memory.replace([(0, PAGE, file, PAGE + 8)])
    assert (memory.epoch, memory.read(0, 4), memory.is_mapped(PAGE, 1)) == (4, b"here", False)


def test_fds_and_mappings_come_and_go_together(file: int) -> None:
    before = open_fds(), mapped_files()
    for _ in range(100):
        memory = GuestMemory([(0, PAGE)])
        memory.add_region(PAGE, PAGE, fd=file)
        with pytest.raises(InvalidArgument):
            memory.replace([(0, PAGE, file, 0), (0, PAGE, file, 0)])
        del memory
    assert (open_fds(), mapped_files()) == before


def test_a_live_view_shows_the_bytes_themselves_and_keeps_them_mapped(memory: GuestMemory) -> None:
    view = memory.live_view(8, 64)
    memory.write(8, b"live")
    assert bytes(view[:4]) == b"live"
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    words = memory.live_view(8, 64, writable=True).cast("I")
    words[0] = 0x01020304
    assert memory.read(8, 4) == b"\x04\x03\x02\x01"
    # Source and target are the same bytes.
    memory.write(10, view)
    memory.read_into(8, words)
    assert memory.read(8, 6) == b"\x04\x03\x04\x03\x02\x01"
    before = mapped_files()
    memory.remove_region(0, 16 * PAGE)
    assert mapped_files() == before
    assert (bytes(view[:4]), memory.is_mapped(8, 1)) == (b"\x04\x03\x04\x03", False)
    view.release()
    words.release()
    assert mapped_files() == before - 1
    with pytest.raises(InvalidArgument, match="one region"):
        GuestMemory([(0, PAGE), (PAGE, PAGE)]).live_view(PAGE - 1, 2)


@given(data=st.binary(min_size=1, max_size=300), where=st.integers(PAGE - 300, PAGE), move=st.integers(-300, 300))
def test_copy_is_as_if_read_whole_first(data: bytes, where: int, move: int) -> None:
    memory = GuestMemory([(0, PAGE), (PAGE, PAGE)], backing="anonymous")
    memory.write(where, data)
    memory.copy(where + move, where, len(data))
    assert memory.read(where + move, len(data)) == data


def test_copies_of_several_threads_run_while_the_table_changes() -> None:
    memory = GuestMemory([(0, 1 << 23)])
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            memory.add_region(1 << 30, PAGE)
            memory.remove_region(1 << 30, PAGE)

    def copy(start: int) -> None:
        data = bytes([start + 1]) * (1 << 20)
        for _ in range(20):
            memory.write(start << 20, data)
            assert memory.read(start << 20, 1 << 20) == data

    changer = threading.Thread(target=change)
    copiers = [threading.Thread(target=copy, args=(start,)) for start in range(4)]
    for thread in (changer, *copiers):
        thread.start()
    for thread in copiers:
        thread.join()
    done.set()
    changer.join()
    assert [memory.read(start << 20, 1) for start in range(4)] == [b"\x01", b"\x02", b"\x03", b"\x04"]
    assert memory.epoch > 2

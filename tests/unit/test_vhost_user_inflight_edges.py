"""Where a region of what is in flight begins and ends: for the back-end that keeps it, and the front-end."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Generator

import pytest
from virtio_test.errors import MessageError
from virtio_test.transport.vhost_user import records
from virtio_test.transport.vhost_user.codec import OwnedFd
from virtio_test.transport.vhost_user.inflight import InflightRegion
from virtio_test.transport.vhost_user.payloads import Inflight
from virtio_test.transport.vhost_user.records import Records

SIZE = 8
SPLIT = 16 + 16 * SIZE
PACKED = 32 + 32 * SIZE


@pytest.fixture
def file() -> Generator[OwnedFd]:
    fd = OwnedFd(os.memfd_create("region", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), 4096)
    yield fd
    fd.close()


@pytest.fixture
def no_file() -> Generator[OwnedFd]:
    one, other = socket.socketpair()
    other.close()
    fd = OwnedFd(one.detach())
    yield fd
    fd.close()


@pytest.mark.row("R11")
@pytest.mark.parametrize("packed", [False, True])
def test_records_fill_their_region_and_their_file(file: OwnedFd, *, packed: bool) -> None:
    size = PACKED if packed else SPLIT
    os.ftruncate(file.fileno(), 8 + 2 * size)
    found = Records.given(Inflight(2 * size, 8, 2, SIZE), file, queues=2, packed=packed)
    assert found.part(1, packed=packed).entries == SIZE
    with pytest.raises(MessageError, match="there are records of 2 queues") as caught:
        found.part(2, packed=packed)
    assert (caught.value.rule, caught.value.queue) == ("InflightRegion", 2)


@pytest.mark.row("R11")
@pytest.mark.parametrize(
    ("size", "offset", "message"),
    [
        (SPLIT - 8, 0, "need 0x90"),
        (SPLIT + 1, 0, "not 8-aligned"),
        (SPLIT, 4, "not 8-aligned"),
        (SPLIT, 4096 - SPLIT + 8, "of a file of 0x1000"),
    ],
)
def test_each_reason_against_a_region_is_its_own(file: OwnedFd, size: int, offset: int, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        Records.given(Inflight(size, offset, 1, SIZE), file, queues=1, packed=False)


@pytest.mark.row("R11")
def test_a_region_is_a_regular_file(no_file: OwnedFd) -> None:
    with pytest.raises(MessageError, match="no regular file"):
        Records.given(Inflight(SPLIT, 0, 1, SIZE), no_file, queues=1, packed=False)
    with pytest.raises(MessageError, match="no regular file"):
        InflightRegion(no_file, SPLIT, 0, queues=1, queue_size=SIZE, packed=False)


@pytest.mark.row("R11", "R02")
def test_a_file_that_is_cut_once_it_was_measured(file: OwnedFd, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = os.fstat

    def cut(fd: int) -> os.stat_result:
        status = measure(fd)
        os.ftruncate(fd, 8)
        return status

    monkeypatch.setattr(records.os, "fstat", cut)
    with pytest.raises(MessageError, match="become shorter"):
        Records.given(Inflight(SPLIT, 0, 1, SIZE), file, queues=1, packed=False)


@pytest.mark.row("R11")
def test_what_the_front_end_is_given_lies_in_its_file(file: OwnedFd) -> None:
    def region(offset: int) -> InflightRegion:
        return InflightRegion(file, PACKED, offset, queues=1, queue_size=SIZE, packed=True)

    with pytest.raises(MessageError, match="of a file of 0x1000"):
        region(4096 - PACKED + 1)
    last = region(4096 - PACKED)
    assert last.fits(1, SIZE, packed=True)
    assert not last.fits(2, SIZE, packed=True)
    assert not last.fits(1, 2 * SIZE, packed=True)
    assert not last.fits(1, SIZE, packed=False)


@pytest.mark.row("R11")
@pytest.mark.parametrize(("last", "legal"), [(1, True), (2, False), (0, False)])
def test_a_whole_packed_ring_and_no_more_can_be_in_flight(file: OwnedFd, last: int, *, legal: bool) -> None:
    header = struct.pack("=QHHHHHHBB10x", 0, 1, SIZE, SIZE, SIZE, 0, 0, 1, 1)
    counts = [1] * (SIZE - 1) + [last]
    states = [struct.pack("=BxHHHQHHIQ", 1, 0, 0, count, at, 0, 0, 0, 0) for at, count in enumerate(counts)]
    os.pwrite(file.fileno(), header + b"".join(states), 0)
    region = InflightRegion(file, PACKED, 0, queues=1, queue_size=SIZE, packed=True)
    if legal:
        found = region.packed_queue(0, lambda _: 0)
        assert (found.heads, found.descriptors, found.used) == (tuple(range(SIZE)), SIZE, 0x8000)
    else:
        with pytest.raises(MessageError, match=f"{SIZE - 1 + last} descriptors of a ring of {SIZE}"):
            region.packed_queue(0, lambda _: 0)


@pytest.mark.row("R11")
@pytest.mark.parametrize(
    ("header", "used", "reason"),
    [
        ((0, 1, SIZE, 0, 0), SIZE, ""),
        ((0, 1, SIZE, 0, 0), SIZE + 1, "9 buffers used since the last record of 0"),
        ((0, 1, SIZE, SIZE - 1, 0), 1, ""),
        ((0, 1, SIZE, SIZE, 0), 1, "descriptor 8 of 8 was used last"),
        ((0, 0, 3, 0, 0), 99, ""),
        ((0, 2, SIZE, 0, 0), 0, "version 2"),
        ((0, 1, SIZE + 1, 0, 0), 0, "states of 9 descriptors, not 8"),
    ],
)
def test_each_reason_against_the_record_of_a_split_queue(
    file: OwnedFd, header: tuple[int, ...], used: int, reason: str
) -> None:
    os.pwrite(file.fileno(), struct.pack("=QHHHH", *header), 0)
    region = InflightRegion(file, SPLIT, 0, queues=1, queue_size=SIZE, packed=False)
    if reason:
        with pytest.raises(MessageError, match=reason):
            region.split(0, used)
    else:
        assert region.split(0, used).used == used


@pytest.mark.row("R11", "R09")
@pytest.mark.parametrize(
    ("used", "old_used", "wrap", "old_wrap", "legal"),
    [
        (SIZE - 1, SIZE - 1, 1, 1, True),
        (SIZE, SIZE, 1, 1, False),
        (0, SIZE, 1, 1, False),
        (SIZE, 0, 1, 1, False),
        (0, 0, 2, 2, False),
        (0, 0, 0, 2, False),
        (0, 0, 2, 0, False),
        (0, 0, 0, 0, True),
    ],
)
def test_where_a_packed_queue_can_go_on(
    file: OwnedFd, used: int, old_used: int, wrap: int, old_wrap: int, *, legal: bool
) -> None:
    header = struct.pack("=QHHHHHHBB10x", 0, 1, SIZE, 0, 0, used, old_used, wrap, old_wrap)
    os.pwrite(file.fileno(), header, 0)
    region = InflightRegion(file, PACKED, 0, queues=1, queue_size=SIZE, packed=True)
    if legal:
        assert region.packed_queue(0, lambda _: 0).used == used | wrap << 15
    else:
        with pytest.raises(MessageError, match="used indices"):
            region.packed_queue(0, lambda _: 0)


@pytest.mark.row("R11")
def test_a_region_is_large_enough_and_stays_so(file: OwnedFd) -> None:
    with pytest.raises(MessageError, match="2 queues of 8 need"):
        InflightRegion(file, 2 * SPLIT - 1, 0, queues=2, queue_size=SIZE, packed=False)
    region = InflightRegion(file, 2 * SPLIT, 0, queues=2, queue_size=SIZE, packed=False)
    os.ftruncate(file.fileno(), 2 * SPLIT - 1)
    assert region.split(0, 0).heads == ()
    with pytest.raises(MessageError, match="has become shorter"):
        region.split(1, 0)

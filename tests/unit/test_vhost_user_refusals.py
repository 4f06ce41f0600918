"""Each reason for which a session refuses a message, one by one, and that it refuses nothing for less.

Each is asked for in one thread, where a refusal is one line of the log. What it does to a server is in
`test_vhost_user_hostile`.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory, RingLayout
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import OwnedFd, encode, encode_reply
from virtio_test.transport.vhost_user.dirtylog import LogFile
from virtio_test.transport.vhost_user.frontend import USER_OFFSET
from virtio_test.transport.vhost_user.memory import MAX_SLOTS
from virtio_test.transport.vhost_user.messages import VRING_LOG, BackendRequest, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Config,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringState,
)
from virtio_test.transport.vhost_user.records import Records
from virtio_test.transport.vhost_user.rings import MAX_SIZE, Kick, Ring

from .vhost_user_pair import MEMORY_BYTES, SIZE, Counting, Pair, R, file, misses, pair

END = 1 << 64
PAGE = 4096
F = ProtocolFeature
ALL = int(F.MQ | F.LOG_SHMFD | F.REPLY_ACK | F.CONFIG | F.INFLIGHT_SHMFD | F.CONFIGURE_MEM_SLOTS | F.STATUS)
LAYOUT = RingLayout.contiguous(SIZE, 0x1000)
AT = USER_OFFSET


@pytest.fixture
def p() -> Iterator[Pair]:
    """Everything is negotiated and shared, and a ring has its size."""
    with pair() as made:
        made.protocol(ALL)
        made.features()
        made.share()
        made.do(R.SET_VRING_NUM, VringState(0, SIZE))
        yield made


@pytest.fixture
def behind() -> Iterator[Pair]:
    device = Counting()
    with pair(device, features=device.features | FeatureSet("ACCESS_PLATFORM")) as made:
        made.features("ACCESS_PLATFORM")
        made.share()
        yield made


def address(*, flags: int = 0, log: int = 0, **at: int) -> VringAddress:
    places = {"descriptor": 0x1000, "available": 0x2000, "used": 0x3000, **at}
    return VringAddress(0, flags, log=log, **{name: (AT + place) % END for name, place in places.items()})


def entry(iova: int = 0, size: int = PAGE, user: int = AT, permissions: int = 3, type_: int = 2) -> Iotlb:
    return Iotlb(iova, size, user, permissions, type_)


# Done, and refused for the reason given: what stands at the edge and what lies one step beyond it.
ROWS: list[tuple[Request, Payload, str]] = [
    (R.SET_FEATURES, U64(1 << 32 | 1 << 30), ""),
    (R.SET_FEATURES, U64(1 << 32 | 1 << 30 | 1), "FeatureNotOffered"),
    (R.SET_PROTOCOL_FEATURES, U64(ALL), ""),
    (R.SET_PROTOCOL_FEATURES, U64(ALL | int(F.RARP)), "ProtocolFeatureNotOffered"),
    (R.SEND_RARP, U64(0), "NotNegotiated"),
    (R.SET_STATUS, U64(0xFF), ""),
    (R.SET_STATUS, U64(0x100), "StatusValue"),
    (R.SET_CONFIG, Config(0, 0, 1, b""), ""),
    (R.SET_CONFIG, Config(0, 0, 2, b""), "ConfigFlags"),
    (R.SET_CONFIG, Config(0, 1, 0, b"x"), "ConfigRange"),
    (R.SET_VRING_NUM, VringState(1, SIZE), ""),
    (R.SET_VRING_NUM, VringState(2, SIZE), "VringIndex"),
    (R.SET_VRING_NUM, VringState(0, 0), "VringSize"),
    (R.SET_VRING_NUM, VringState(0, MAX_SIZE), ""),
    (R.SET_VRING_NUM, VringState(0, 2 * MAX_SIZE), "VringSize"),
    (R.SET_VRING_NUM, VringState(0, 3), "VringSize"),
    (R.SET_VRING_ENABLE, VringState(0, 0), ""),
    (R.SET_VRING_ENABLE, VringState(0, 1), ""),
    (R.SET_VRING_ENABLE, VringState(0, 2), "VringValue"),
    (R.SET_VRING_CALL, U64(0x101), ""),
    (R.SET_VRING_CALL, U64(0x301), "VringValue"),
    (R.SET_VRING_ADDR, address(), ""),
    (R.SET_VRING_ADDR, address(flags=VRING_LOG), ""),
    (R.SET_VRING_ADDR, address(flags=2), "VringFlags"),
    (R.SET_VRING_ADDR, address(log=END - 1), ""),
    (R.SET_VRING_ADDR, address(flags=VRING_LOG, log=END - 1), "LogRange"),
    (R.SET_VRING_ADDR, address(used=MEMORY_BYTES), "not all in shared memory"),
    (R.SET_VRING_ADDR, address(descriptor=END - AT - 16), "an area wraps"),
    (R.SET_VRING_ADDR, address(available=END - AT - 2), "an area wraps"),
    (R.SET_VRING_ADDR, address(used=END - AT - 4), "an area wraps"),
    (R.SET_VRING_ADDR, VringAddress(1, 0, AT, AT + 0x1000, AT + 0x2000), "VringOrder"),
    (R.IOTLB_MSG, entry(), "NotNegotiated"),
]


@pytest.mark.row("M04", "M08", "M09")
@pytest.mark.parametrize(("request_", "payload", "reason"), ROWS)
def test_each_reason_is_its_own(
    p: Pair, caplog: pytest.LogCaptureFixture, request_: Request, payload: Payload, reason: str
) -> None:
    assert p.told(request_, payload) == int(bool(reason))
    told = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(told) == bool(reason)
    assert all(line.startswith("refused: ") and reason in line for line in told)


def test_the_flag_of_a_log_needs_logs(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    p.protocol(ALL & ~int(F.LOG_SHMFD))
    assert p.told(R.SET_VRING_ADDR, address(flags=VRING_LOG)) == 1
    assert "VringFlags" in caplog.text


@pytest.mark.row("M16")
def test_what_nobody_knows_is_refused_or_ignored(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    unknown = struct.pack("=III", 1000, 1, 0)
    p.mine.send(unknown)
    p.settle()
    assert "ignored: UnknownRequest" in caplog.text
    p.mine.send(struct.pack("=III", 1000, 9, 0))
    p.settle()
    assert struct.unpack("=IIIQ", p.mine.recv(64, socket.MSG_DONTWAIT)) == (1000, 5, 8, 1)
    p.do(R.SET_OWNER)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(R.GET_VRING_BASE, VringState(2)), (R.GET_QUEUE_NUM, None), (R.SET_STATUS, U64(0x100))],
)
def test_who_waits_for_what_cannot_be_given_is_left(p: Pair, request_: Request, payload: Payload | None) -> None:
    """A reply that there is none of, and a refusal that nobody asked for: the connection says so."""
    if request_ is R.GET_QUEUE_NUM:
        p.protocol(ALL & ~int(F.MQ))
    p.mine.send(encode(request_, payload))
    p.settle()
    assert p.mine.recv(64, socket.MSG_DONTWAIT) == b""
    assert p.backend.session is None


def test_a_configuration_space_that_ends_before_is_answered_with_nothing(p: Pair) -> None:
    for asked in (Config(0, 1, 0, b"\0"), Config(0, 0, 2, b"")):
        reply = p.ask(R.GET_CONFIG, asked)
        assert reply is not None
        assert not isinstance(reply.payload, Config)
    reply = p.ask(R.GET_CONFIG, Config(0, 0, 1, b""))
    assert reply is not None
    assert isinstance(reply.payload, Config)


# --- behind an IOMMU --------------------------------------------------------------------------------------------


@pytest.mark.row("M17")
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (entry(), ""),
        (entry(size=8), ""),
        (entry(size=0), "IotlbRange"),
        (entry(iova=END - PAGE + 8), "IotlbRange"),
        (entry(user=END - PAGE + 8), "IotlbRange"),
        (entry(iova=4), "IotlbRange"),
        (entry(size=12), "IotlbRange"),
        (entry(permissions=0), "IotlbPermission"),
        (entry(permissions=1), ""),
        (entry(permissions=4), "IotlbPermission"),
        (entry(user=AT + MEMORY_BYTES - PAGE), ""),
        (entry(user=AT + MEMORY_BYTES - PAGE + 8), "IotlbAddress"),
        (entry(type_=3), ""),
        (entry(iova=END - PAGE, type_=3), ""),
        (entry(iova=END - PAGE + 1, type_=3), "IotlbRange"),
        (entry(iova=1, size=0, type_=3), "IotlbRange"),
        (entry(size=0, type_=3), ""),
        (entry(type_=1), "IotlbType"),
        (entry(type_=4), "IotlbType"),
    ],
)
def test_each_reason_against_a_translation(
    behind: Pair, caplog: pytest.LogCaptureFixture, message: Iotlb, reason: str
) -> None:
    assert behind.told(R.IOTLB_MSG, message) == int(bool(reason))
    assert reason in caplog.text
    cache = behind.session.rings.memory.cache
    assert cache is not None
    assert len(cache) == int(message.type == 2 and not reason)


# --- memory and logs --------------------------------------------------------------------------------------------


def region(guest: int = 0, size: int = PAGE, user: int = 0, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset)


@pytest.mark.row("M05")
@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ((), "RegionCount"),
        ((region(),), ""),
        ((region(size=0),), "RegionSize"),
        ((region(offset=PAGE),), ""),
        ((region(offset=2 * PAGE),), "RegionBeyondFile"),
        ((region(offset=END - PAGE + 1),), "RegionWrap"),
        ((region(guest=END - PAGE + 1),), "RegionWrap"),
        ((region(user=END - PAGE + 1),), "RegionWrap"),
        ((region(), region(guest=PAGE, user=PAGE)), ""),
        ((region(guest=PAGE, user=PAGE), region()), ""),
        ((region(), region(guest=PAGE - 1, user=PAGE)), "RegionOverlap"),
        ((region(), region(guest=PAGE, user=PAGE - 1)), "RegionOverlap"),
        ((region(guest=PAGE - 1, user=PAGE), region()), "RegionOverlap"),
        ((region(guest=PAGE, user=PAGE - 1), region()), "RegionOverlap"),
    ],
)
def test_each_reason_against_a_table(
    p: Pair, caplog: pytest.LogCaptureFixture, table: tuple[MemoryRegion, ...], reason: str
) -> None:
    with file(2 * PAGE) as fd:
        assert p.told(R.SET_MEM_TABLE, MemoryTable(table), [fd.fileno()] * len(table)) == int(bool(reason))
    assert reason in caplog.text


@pytest.mark.row("M05", "M15")
def test_memory_and_its_log_are_files(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    one, other = socket.socketpair()
    with one, other:
        assert p.told(R.SET_MEM_TABLE, MemoryTable((region(),)), [one.fileno()]) == 1
        assert "RegionFile" in caplog.text
        with pytest.raises(MessageError, match="LogFile"):
            LogFile(OwnedFd(os.dup(one.fileno())), Log(1, 0))


@pytest.mark.row("M06")
def test_as_many_regions_as_there_are_slots(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with file(PAGE) as fd:
        for more in range(MAX_SLOTS):
            at = MEMORY_BYTES + more * PAGE
            added = SingleRegion(at, PAGE, AT + at, 0)
            assert p.told(R.ADD_MEM_REG, added, [fd.fileno()]) == int(more == MAX_SLOTS - 1)
    assert f"there are {MAX_SLOTS} regions already" in caplog.text


@pytest.mark.row("M15", "CVE-2020-10722")
@pytest.mark.parametrize(
    ("size", "offset", "legal"),
    [(PAGE, 0, True), (1, PAGE - 1, True), (PAGE, 1, False), (0, 0, False), (END - 1, PAGE, False)],
)
def test_a_log_fills_its_file_and_no_more(size: int, offset: int, *, legal: bool) -> None:
    with file(PAGE) as fd:
        if legal:
            LogFile(fd, Log(size, offset)).close()
        else:
            with pytest.raises(MessageError, match="LogRange"):
                LogFile(fd, Log(size, offset))


LOG_BYTES = MEMORY_BYTES // PAGE // 8


@pytest.mark.row("M15")
def test_a_log_covers_the_memory_and_where_a_used_ring_is_logged(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    last = MEMORY_BYTES - LAYOUT.device_bytes
    with file(PAGE) as fd:
        p.do(R.SET_LOG_BASE, Log(LOG_BYTES, 0), [fd.fileno()])
        p.do(R.SET_VRING_ADDR, address(flags=VRING_LOG, log=last))
        assert p.told(R.SET_VRING_ADDR, address(flags=VRING_LOG, log=last + 1)) == 1
        assert "LogTooSmall" in caplog.text
        p.do(R.SET_VRING_ADDR, address())
        # The number that answers it is no refusal, so there is no answer.
        assert p.ask(R.SET_LOG_BASE, Log(LOG_BYTES - 1, 0), [fd.fileno()]) is None
    assert p.backend.last_error is not None
    assert p.backend.last_error.rule == "LogTooSmall"


@pytest.mark.row("M15")
def test_memory_beyond_the_log_where_no_ring_runs(p: Pair) -> None:
    """The front-end is about to send a larger log."""
    p.do(R.SET_FEATURES, U64(1 << 32 | 1 << 30 | 1 << 26))
    with file(2 * PAGE) as fd:
        p.do(R.SET_LOG_BASE, Log(LOG_BYTES, 0), [fd.fileno()])
        p.do(R.ADD_MEM_REG, SingleRegion(MEMORY_BYTES, PAGE, AT + MEMORY_BYTES, 0), [fd.fileno()])
    assert p.session.rings.marking.log is None


# --- what is in flight ------------------------------------------------------------------------------------------


@pytest.mark.row("R11")
@pytest.mark.parametrize(
    ("queues", "queue_size", "reason"),
    [
        (1, SIZE, ""),
        (2, SIZE, ""),
        (0, SIZE, "0 queues, and the device has 2"),
        (3, SIZE, "3 queues, and the device has 2"),
        (1, 1, ""),
        (1, 0, "queues of 0 descriptors"),
        (1, MAX_SIZE, ""),
        (1, MAX_SIZE + 1, "queues of 32769 descriptors"),
    ],
)
def test_a_region_is_for_queues_that_can_be(queues: int, queue_size: int, reason: str) -> None:
    size = max(1, queues) * (16 + 16 * queue_size)
    with file(size) as fd:
        given = Inflight(size, 0, queues, queue_size)
        if reason:
            with pytest.raises(MessageError, match=reason):
                Records.given(given, fd, queues=2, packed=False)
        else:
            assert Records.given(given, fd, queues=2, packed=False).queue_size == queue_size


@pytest.mark.row("R11")
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ((0, 0, 0), ""),
        ((7, 0, 3), ""),
        ((0, 1, SIZE), ""),
        ((0, 2, SIZE), "version 2 with features 0x0"),
        ((1, 1, SIZE), "version 1 with features 0x1"),
        ((0, 1, SIZE - 1), "states of 7 descriptors, not 8"),
    ],
)
def test_each_reason_against_a_record(header: tuple[int, int, int], reason: str) -> None:
    size = 16 + 16 * SIZE
    with file(size) as fd:
        os.pwrite(fd.fileno(), struct.pack("=QHH", *header), 0)
        given = Inflight(size, 0, 1, SIZE)
        if reason:
            with pytest.raises(MessageError, match=reason):
                Records.given(given, fd, queues=1, packed=False)
        else:
            Records.given(given, fd, queues=1, packed=False)


@pytest.mark.row("R11")
def test_a_record_for_split_rings_is_none_for_packed_ones() -> None:
    size = 16 + 16 * SIZE
    with file(size) as fd:
        records = Records.given(Inflight(size, 0, 1, SIZE), fd, queues=1, packed=False)
        assert records.part(0, packed=False).entries == SIZE
        with pytest.raises(MessageError, match="and now needs"):
            records.part(0, packed=True)


# --- rings ------------------------------------------------------------------------------------------------------


@pytest.mark.row("M08")
def test_a_base_before_the_size_and_of_a_packed_ring() -> None:
    ring = Ring(0)
    ring.check_base(0x1_0000, packed=True)
    ring.check_base(0xFFFF, packed=True)
    with pytest.raises(MessageError, match="16 bits are legal"):
        ring.check_base(0x1_0000, packed=False)


@pytest.mark.row("M10")
def test_a_kick_counts_no_semaphore() -> None:
    semaphore = OwnedFd(os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC))
    with pytest.raises(MessageError, match="like a semaphore"):
        Kick(semaphore, 0)
    semaphore.close()
    one, other = socket.socketpair()
    with one, other, pytest.raises(MessageError, match="FdType"):
        Kick(OwnedFd(os.dup(one.fileno())), 0)


@pytest.mark.row("M10")
@pytest.mark.parametrize("request_", [R.SET_BACKEND_REQ_FD, R.SET_VRING_CALL, R.SET_VRING_KICK, R.SET_VRING_ERR])
def test_a_file_speaks_to_nobody(p: Pair, caplog: pytest.LogCaptureFixture, request_: Request) -> None:
    p.protocol(ALL | int(F.BACKEND_REQ))
    payload = None if request_ is R.SET_BACKEND_REQ_FD else U64(0)
    with file(PAGE) as fd:
        assert p.told(request_, payload, [fd.fileno()]) == 1
    assert "FdType" in caplog.text


@pytest.mark.row("M17")
def test_an_answer_to_no_question_closes_the_channel(behind: Pair) -> None:
    behind.protocol(int(F.BACKEND_REQ | F.REPLY_ACK))
    with behind.channel() as channel:
        channel.send(encode_reply(BackendRequest.IOTLB_MSG, U64(0)))
        behind.settle()
        assert channel.recv(1, socket.MSG_DONTWAIT) == b""


def test_a_back_end_offers_what_its_device_has(tmp_path: Path) -> None:
    device = Counting()
    with pytest.raises(InvalidArgument, match="does not have the features BIT_57"):
        Backend(device, path=tmp_path / "s", features=device.features | FeatureSet("BIT_57"))
    with pair(device, memory=GuestMemory()) as made:
        made.features()


# --- when a ring runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transitional", "version_1"), [(False, False), (False, True), (True, False), (True, True)])
def test_without_version_1_a_device_needs_legacy_rules(*, transitional: bool, version_1: bool) -> None:
    device = BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(SIZE,), transitional=transitional)
    with pair(device) as made:
        made.protocol(int(F.STATUS))
        made.do(R.SET_FEATURES, U64(1 << 30 | (1 << 32 if version_1 else 0)))
        made.share()
        made.setup(LAYOUT)
        runs = transitional or version_1
        assert made.rings[0].running == runs
        assert made.told(R.GET_STATUS) == (0 if runs else 0x40)
        made.do(R.SET_VRING_BASE, VringState(0, 0))
        assert made.told(R.GET_STATUS) == 0
        assert not made.rings[0].started


def test_a_ring_whose_memory_goes_stops_and_goes_on_with_it(p: Pair) -> None:
    queue = p.live()
    p.share((0, AT + MEMORY_BYTES, PAGE))
    assert (p.rings[0].running, p.rings[0].broken) == (False, None)
    p.share()
    assert p.rings[0].running
    token = p.post(queue)
    p.settle()
    assert queue.get_used() == (token, 5)


def test_nothing_is_asked_for_a_ring_that_is_not_to_run(behind: Pair) -> None:
    behind.protocol(int(F.BACKEND_REQ | F.REPLY_ACK))
    with behind.channel() as channel:
        behind.setup(LAYOUT, offset=0)
        assert misses(channel)
        behind.do(R.SET_VRING_ENABLE, VringState(0, 0))
        behind.do(R.SET_VRING_NUM, VringState(1, SIZE))
        behind.do(R.SET_VRING_ADDR, behind.address(RingLayout.contiguous(SIZE, 0x8000), 1, offset=0))
        behind.map(0x20000, PAGE)
        assert misses(channel) == []


def test_a_device_that_has_more_to_do_is_asked_again() -> None:
    class Slow(Counting):
        def kicked(self, queue_index: int) -> bool:
            super().kicked(queue_index)
            return self.asked["kick 0"] < 5

    with pair(Slow()) as made:
        made.live()
        made.settle()
        assert isinstance(made.device, Counting)
        assert made.device.asked["kick 0"] == 5

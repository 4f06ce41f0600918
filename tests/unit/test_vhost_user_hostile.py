"""What no front-end should send (rows M01 to M21 of the robustness catalogue), over a real socket.

After each, the server must be ready: the next front-end does a request, and not one fd is left behind.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio_test.errors import MessageError, PeerDisconnected
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.codec import encode
from virtio_test.transport.vhost_user.frontend import USER_OFFSET, FrontEnd
from virtio_test.transport.vhost_user.memory import MAX_SLOTS
from virtio_test.transport.vhost_user.messages import PROTOCOL_FEATURES_BIT, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Empty,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringState,
)

from .vhost_user_world import Guest, Server, guest, serving
from .world import eventually, open_fds

PAGE = 4096
U = USER_OFFSET
TOP = (1 << 64) - PAGE


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def gone(server: Server) -> None:
    """Wait until the session has ended, and what it held is let go of."""
    assert eventually(lambda: server.backend.session is None)
    server.settle()


def served(server: Server) -> None:
    """The server serves as if nothing had happened."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
    gone(server)


def a_file(size: int = PAGE) -> int:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


# --- malformed: the connection ends ---------------------------------------------------------------------------

RAW = [
    ("BadVersion", struct.pack("=III", 1, 0, 0), 0),
    ("ReservedFlags", struct.pack("=III", 1, 0x101, 0), 0),
    ("ReplyFlag", struct.pack("=III", 1, 5, 0), 0),
    ("MessageTooLong", struct.pack("=III", 1, 1, 5000), 0),
    ("MessageTooLong", struct.pack("=III", 1000, 9, 0xFFFF_FFFF), 0),
    ("PayloadSize", struct.pack("=IIII", 2, 9, 4, 0), 0),
    ("PayloadSize", encode(Request.SET_MEM_TABLE, MemoryTable(()))[:8] + struct.pack("=III", 8, 33, 0), 0),
    ("FdCount", encode(Request.SET_OWNER), 1),
    ("FdCount", encode(Request.SET_VRING_KICK, U64(0)), 0),
    ("FdCount", encode(Request.SET_VRING_KICK, U64(0)), 9),
    ("FdCount", encode(Request.SET_VRING_CALL, U64(0x100)), 32),
    ("FdCount", encode(Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, PAGE, U, 0),))), 253),
]


@pytest.mark.row("M01", "M03")
@pytest.mark.parametrize(("rule", "data", "count"), RAW)
def test_a_malformed_message_ends_its_connection_only(
    server: Server, caplog: pytest.LogCaptureFixture, rule: str, data: bytes, count: int
) -> None:
    served(server)
    before = open_fds()
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        fds = [a_file() for _ in range(count)]
        g.front.send_bytes(data, fds)
        for fd in fds:
            os.close(fd)
        with pytest.raises(PeerDisconnected):
            g.front.receive()
    gone(server)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == rule
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert rule in warnings[0]
    assert "\n" not in warnings[0]
    del g
    assert open_fds() == before
    served(server)


@pytest.mark.row("M02")
def test_a_message_may_come_byte_by_byte(server: Server) -> None:
    with FrontEnd(server.path) as front:
        for byte in encode(Request.SET_OWNER, need_reply=True) + encode(Request.GET_FEATURES):
            front.send_bytes(bytes([byte]))
            time.sleep(0.001)
        assert front.receive().payload == U64(0)
        assert front.receive().request == Request.GET_FEATURES


@pytest.mark.row("M02")
def test_a_connection_that_ends_in_a_message(server: Server) -> None:
    with FrontEnd(server.path) as front:
        front.send_bytes(encode(Request.SET_FEATURES, U64(0))[:-1], [0])
    assert eventually(lambda: server.backend.last_error is not None)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == "Truncated"
    # It must not hold what was on the stack when it was raised.
    assert server.backend.last_error.__traceback__ is None
    served(server)


def test_a_front_end_that_never_reads_is_disconnected(server: Server) -> None:
    many = encode(Request.GET_FEATURES) * 1_000_000
    with FrontEnd(server.path) as front, pytest.raises(PeerDisconnected):
        front.send_bytes(many)
    assert eventually(lambda: server.backend.last_error is not None)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == "RepliesUnread"
    served(server)


@pytest.mark.row("M21")
def test_ten_thousand_bad_messages_leave_no_fd(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server:
        served(server)
        before = open_fds()
        fd = a_file()
        bad = [
            (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 0, U, 0),))),
            (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 2 * PAGE, U, 0),))),
            (Request.ADD_MEM_REG, SingleRegion(0, PAGE, U, PAGE)),
            (Request.SET_VRING_KICK, U64(0)),
            (Request.SET_VRING_CALL, U64(7)),
            (Request.SET_BACKEND_REQ_FD, Empty()),
        ]
        with FrontEnd(server.path) as front:
            front.negotiate()
            connected = open_fds()
            for number in range(10_000):
                request, payload = bad[number % len(bad)]
                front.send(request, payload, [fd], need_reply=True)
                reply = front.receive().payload
                assert reply == U64(1)
            assert open_fds() == connected
        os.close(fd)
        gone(server)
        for _ in range(300):
            with FrontEnd(server.path) as front:
                front.send_bytes(encode(Request.SET_OWNER), [1, 2])
                with pytest.raises(PeerDisconnected):
                    front.receive()
        gone(server)
        assert open_fds() == before
        served(server)


# --- refused: nothing changes, and who asks is answered -------------------------------------------------------


def table(*regions: MemoryRegion) -> MemoryTable:
    return MemoryTable(regions)


REFUSED: list[tuple[str, str, Request, Payload, list[str]]] = [
    ("M04", "FeatureNotOffered", Request.SET_FEATURES, U64(1 << 63), []),
    ("M04", "FeatureNotOffered", Request.SET_FEATURES, U64(1 << 32 | 1 << 33), []),
    ("M04", "FeaturesRefused", Request.SET_FEATURES, U64(1 << 34), []),
    ("M04", "ProtocolFeatureNotOffered", Request.SET_PROTOCOL_FEATURES, U64(1 << 40), []),
    ("M05", "RegionCount", Request.SET_MEM_TABLE, table(), []),
    ("M05", "RegionSize", Request.SET_MEM_TABLE, table(MemoryRegion(0, 0, U, 0)), ["page"]),
    ("M05", "RegionWrap", Request.SET_MEM_TABLE, table(MemoryRegion(TOP, 2 * PAGE, U, 0)), ["page"]),
    ("M05", "RegionWrap", Request.SET_MEM_TABLE, table(MemoryRegion(0, 2 * PAGE, TOP, 0)), ["page"]),
    ("M05", "RegionWrap", Request.SET_MEM_TABLE, table(MemoryRegion(0, 2 * PAGE, U, TOP)), ["page"]),
    ("M05", "RegionBeyondFile", Request.SET_MEM_TABLE, table(MemoryRegion(0, 2 * PAGE, U, 0)), ["page"]),
    ("M05", "RegionBeyondFile", Request.SET_MEM_TABLE, table(MemoryRegion(0, PAGE, U, PAGE)), ["page"]),
    ("M05", "RegionFile", Request.SET_MEM_TABLE, table(MemoryRegion(0, PAGE, U, 0)), ["pipe"]),
    ("M05", "RegionFile", Request.SET_MEM_TABLE, table(MemoryRegion(0, PAGE, U, 0)), ["zero"]),
    ("M05", "RegionRefused", Request.SET_MEM_TABLE, table(MemoryRegion(3, PAGE - 8, U, 0)), ["page"]),
    (
        "M05",
        "RegionOverlap",
        Request.SET_MEM_TABLE,
        table(MemoryRegion(0, PAGE, U, 0), MemoryRegion(0, PAGE, 2 * U, 0)),
        ["page", "page"],
    ),
    (
        "M05",
        "RegionOverlap",
        Request.SET_MEM_TABLE,
        table(MemoryRegion(0, PAGE, U, 0), MemoryRegion(PAGE, PAGE, U, 0)),
        ["page", "page"],
    ),
    ("M06", "RegionOverlap", Request.ADD_MEM_REG, SingleRegion(0, PAGE, U, 0), ["page"]),
    ("M06", "RegionUnknown", Request.REM_MEM_REG, SingleRegion(0, PAGE, U, 0), []),
    ("M08", "VringBase", Request.SET_VRING_BASE, VringState(0, 0x1_0000), []),
    ("M09", "VringIndex", Request.SET_VRING_NUM, VringState(1, 128), []),
    ("M09", "VringSize", Request.SET_VRING_NUM, VringState(0, 0), []),
    ("M09", "VringSize", Request.SET_VRING_NUM, VringState(0, 100), []),
    ("M09", "VringSize", Request.SET_VRING_NUM, VringState(0, 0x1_0000), []),
    ("M09", "VringSize", Request.SET_VRING_NUM, VringState(0, 0x8000_0000), []),
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, U + 8, U + PAGE, U + PAGE), []),
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, U, U + PAGE + 2, U + PAGE), []),
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, U, U + PAGE, U + PAGE + 1), []),
    # A guest address where a front-end address belongs, and the very end of the address space.
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, 0x1000, U, U), []),
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, (1 << 64) - 16, U, U), []),
    ("M09", "VringAddress", Request.SET_VRING_ADDR, VringAddress(0, 0, U + (1 << 20) - 16, U, U), []),
    ("M09", "VringFlags", Request.SET_VRING_ADDR, VringAddress(0, 2, U, U, U), []),
    ("M09", "VringFlags", Request.SET_VRING_ADDR, VringAddress(0, 0x8000_0000, U, U, U), []),
    ("M10", "FdType", Request.SET_VRING_KICK, U64(0), ["page"]),
    ("M10", "FdType", Request.SET_VRING_KICK, U64(0), ["zero"]),
    ("M10", "FdType", Request.SET_VRING_CALL, U64(0), ["page"]),
    ("M10", "FdType", Request.SET_VRING_ERR, U64(0), ["folder"]),
    ("M10", "VringValue", Request.SET_VRING_KICK, U64(0x200), ["pipe"]),
    ("M11", "VringIndex", Request.SET_VRING_KICK, U64(0xFF), ["pipe"]),
    ("M11", "VringIndex", Request.SET_VRING_ENABLE, VringState(0xFFFF_FFFF, 1), []),
    ("M11", "VringValue", Request.SET_VRING_ENABLE, VringState(0, 2), []),
    ("M15", "FdType", Request.SET_LOG_FD, Empty(), ["page"]),
    ("M16", "NotNegotiated", Request.VRING_KICK, VringState(0), []),
    ("M16", "NotSupported", Request.GPU_SET_SOCKET, Empty(), ["pipe"]),
    ("M01", "StatusValue", Request.SET_STATUS, U64(0x100), []),
]


def open_kind(kind: str) -> int:
    if kind == "pipe":
        read, write = os.pipe()
        os.close(read)
        return write
    if kind == "page":
        return a_file()
    return os.open({"zero": "/dev/zero", "folder": tempfile.gettempdir()}[kind], os.O_RDONLY)


def ask(front: FrontEnd, request: Request, payload: Payload, kinds: list[str], *, need_reply: bool) -> None:
    fds = [open_kind(kind) for kind in kinds]
    front.send(request, payload, fds, need_reply=need_reply)
    for fd in fds:
        os.close(fd)


ALIKE = {"VringIndex": ("qemu@758ef96a",)}
"""By rule, what else is the same."""


@pytest.mark.parametrize(
    ("row", "rule", "request_", "payload", "kinds"),
    [pytest.param(*refused, marks=pytest.mark.row(refused[0], *ALIKE.get(refused[1], ()))) for refused in REFUSED],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    row: str,
    rule: str,
    request_: Request,
    payload: Payload,
    kinds: list[str],
) -> None:
    needs_quiet = request_ in (Request.SET_FEATURES, Request.SET_VRING_NUM)
    with guest(server.path) as g:
        g.front.request(Request.SET_VRING_NUM, VringState(0, 128))
        if not needs_quiet:
            g.setup()
            g.front.enable(0)
            g.request(1)
        before = open_fds()
        ask(g.front, request_, payload, kinds, need_reply=True)
        assert g.front.receive().payload == U64(1)
        assert open_fds() == before
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert rule in warning
        if needs_quiet:
            g.setup()
            g.front.enable(0)
        g.request(2)
        # The same without NEED_REPLY: nobody would learn of it, so the connection ends.
        ask(g.front, request_, payload, kinds, need_reply=False)
        with pytest.raises(PeerDisconnected):
            g.front.receive()
    gone(server)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == rule
    served(server)


@pytest.mark.row("M04")
def test_features_cannot_change_while_rings_run(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        with pytest.raises(MessageError, match="Refused"):
            g.front.set_features(g.front.features - FeatureSet("EVENT_IDX"))
        g.request(2)
        g.front.get_base(0)
        g.front.set_features(g.front.features)


def test_a_request_whose_reply_cannot_be_given_ends_the_connection(server: Server) -> None:
    for request, payload in (
        (Request.GET_VRING_BASE, VringState(9)),
        (Request.SET_LOG_BASE, Log(4096, 0)),
        (Request.GET_SHMEM_CONFIG, Empty()),
    ):
        with FrontEnd(server.path, timeout=5.0) as front:
            fds = [a_file()] if request is Request.SET_LOG_BASE else []
            front.send(request, payload, fds)
            for fd in fds:
                os.close(fd)
            with pytest.raises(PeerDisconnected):
                front.receive()
    served(server)


@pytest.mark.row("M04")
def test_in_band_notifications_alone_end_the_connection(tmp_path: Path) -> None:
    inband = ProtocolFeature.INBAND_NOTIFICATIONS
    with serving(tmp_path / "s", protocol_features=inband | ProtocolFeature.REPLY_ACK) as server:
        with FrontEnd(server.path) as front:
            front.send(Request.SET_PROTOCOL_FEATURES, U64(int(inband)), need_reply=True)
            with pytest.raises(PeerDisconnected):
                front.receive()
        assert server.backend.last_error is not None
        assert server.backend.last_error.rule == "InbandAlone"


@pytest.mark.row("M16")
def test_an_unknown_request_is_answered_or_ignored(server: Server) -> None:
    with FrontEnd(server.path) as front:
        front.send_bytes(struct.pack("=III", 200, 1, 4) + b"abcd", [0])
        front.send_bytes(struct.pack("=III", 201, 9, 0))
        assert front.receive().request == 201
        assert front.number(Request.GET_FEATURES)


@pytest.mark.row("M11")
def test_messages_in_any_order_do_no_harm(server: Server) -> None:
    """M11: nothing runs before it can, whatever comes first."""
    with guest(server.path) as g:
        g.front.request(Request.GET_VRING_BASE, VringState(0))
        g.front.enable(0)
        g.front.request(Request.SET_VRING_KICK, U64(0x100))
        g.front.request(Request.SET_VRING_BASE, VringState(0, 0))
        with pytest.raises(MessageError, match="Refused"):
            g.front.request(Request.SET_VRING_ADDR, VringAddress(0, 0, U, U, U))
        g.front.request(Request.RESET_OWNER)
        g.front.request(Request.RESET_DEVICE)
        g.front.enable(0)
        g.setup()
        g.request(1)


@pytest.mark.row("M09")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_addresses_before_the_size_are_refused_and_a_base_is_not(
    server: Server, caplog: pytest.LogCaptureFixture, *, packed: bool
) -> None:
    with guest(server.path, packed=packed) as g:
        g.front.request(Request.SET_VRING_BASE, VringState(0, 0x7000))
        with pytest.raises(MessageError, match="SET_VRING_ADDR was refused"):
            g.front.request(Request.SET_VRING_ADDR, VringAddress(0, 0, U, U + PAGE, U + 2 * PAGE))
        assert [record.getMessage().split()[1] for record in caplog.records] == ["VringOrder"]
        g.setup()
        g.front.enable(0)
        g.request(1)


@pytest.mark.row("M06")
def test_there_are_as_many_regions_as_slots_were_named(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with guest(server.path) as g:
        fd = a_file()
        regions = [SingleRegion((1 << 30) + at * PAGE, PAGE, (1 << 45) + at * PAGE, 0) for at in range(MAX_SLOTS)]
        for region in regions[:-1]:
            g.front.request(Request.ADD_MEM_REG, region, [fd])
        with pytest.raises(MessageError, match="ADD_MEM_REG was refused"):
            g.front.request(Request.ADD_MEM_REG, regions[-1], [fd])
        assert [record.getMessage().split()[1] for record in caplog.records] == ["RegionSlots"]
        g.front.request(Request.REM_MEM_REG, regions[0])
        g.front.request(Request.ADD_MEM_REG, regions[-1], [fd])
        os.close(fd)
        g.setup()
        g.front.enable(0)
        g.request(1)


@pytest.mark.row("M09")
def test_addresses_before_memory_are_refused(server: Server) -> None:
    with FrontEnd(server.path) as front:
        front.negotiate()
        front.request(Request.SET_VRING_NUM, VringState(0, 128))
        with pytest.raises(MessageError, match="Refused"):
            front.request(Request.SET_VRING_ADDR, VringAddress(0, 0, U, U, U))


@pytest.mark.row("M08")
@pytest.mark.parametrize("base", [1, 200, 0x7FFF], ids=["one too few", "beyond the size", "far away"])
def test_a_base_that_does_not_fit_the_used_ring_stops_the_ring(server: Server, base: int) -> None:
    with guest(server.path) as g:
        g.setup()
        assert g.queue is not None
        g.front.request(Request.SET_VRING_BASE, VringState(0, base))
        used = base + 1 if base == 1 else 0
        g.memory.write(g.queue.layout().at("used.idx"), struct.pack("<H", used))
        g.front.request(Request.SET_VRING_KICK, U64(0x100))
        g.front.enable(0)
        assert g.front.get_status() == 0x40
        session = server.backend.session
        assert session is not None
        assert "StateOutOfRange" in str(session.rings.rings[0].broken)
        g.memory.write(g.queue.layout().at("used.idx"), bytes(2))
        g.front.get_base(0)
        g.setup()
        assert g.front.get_status() == 0
        g.request(1)


def hang_up_pipe(g: Guest) -> None:
    read, write = os.pipe()
    g.front.request(Request.SET_VRING_KICK, U64(0), [read])
    os.close(write)
    os.close(read)


def writing_end(g: Guest) -> None:
    read, write = os.pipe()
    g.front.request(Request.SET_VRING_KICK, U64(0), [write])
    os.close(read)
    os.close(write)


@pytest.mark.row("M10")
@pytest.mark.parametrize("hang_up", [hang_up_pipe, writing_end])
def test_a_kick_fd_whose_other_end_is_gone_does_not_spin(server: Server, hang_up: Callable[[Guest], None]) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        hang_up(g)
        g.front.number(Request.GET_FEATURES)
        time.sleep(0.05)
        start = time.thread_time_ns(), time.process_time_ns()
        time.sleep(0.2)
        assert time.process_time_ns() - start[1] < 50_000_000
        g.front.setup_ring(g.config, base=1)
        assert g.ring is not None
        g.ring = g.front.rings[0]
        g.post(2)
        g.kick()
        assert g.used() == [2]


@pytest.mark.row("M10", "N11")
@pytest.mark.parametrize("end", ["reading end of a pipe", "closed pipe", "closed socket"])
def test_call_and_err_fds_that_do_not_work_harm_nobody_else(server: Server, end: str) -> None:
    read, write = os.pipe()
    fd = read
    keep = [write]
    if end == "closed pipe":
        os.close(read)
        fd, keep = write, []
    elif end == "closed socket":
        os.close(read)
        os.close(write)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        other.close()
        fd, keep = one.detach(), []
    with guest(server.path) as g:
        g.setup()
        g.front.request(Request.SET_VRING_CALL, U64(0), [fd])
        g.front.request(Request.SET_VRING_ERR, U64(0), [fd])
        g.front.enable(0)
        g.request(1)
        g.request(2)
    for each in (fd, *keep):
        os.close(each)
    assert server.failure is None


@pytest.mark.row("M10")
def test_a_kick_fd_replaced_while_it_is_waited_on(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        for number in range(50):
            g.kick()
            assert g.ring is not None
            g.front.request(Request.SET_VRING_KICK, U64(0), [g.ring.kick.fileno()])
            g.request(number)


@pytest.mark.row("M20")
def test_disconnecting_in_the_middle_of_anything(server: Server) -> None:
    stream = [
        (encode(Request.SET_OWNER), 0),
        (encode(Request.SET_FEATURES, U64(1 << 32 | 1 << PROTOCOL_FEATURES_BIT)), 0),
        (encode(Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, PAGE, U, 0),))), 1),
        (encode(Request.SET_VRING_NUM, VringState(0, 16)), 0),
        (encode(Request.SET_VRING_ADDR, VringAddress(0, 0, U, U + 2048, U + 1024)), 0),
    ]
    served(server)
    before = open_fds()
    fd = a_file()
    for stop in range(len(stream) + 1):
        for cut in (0, 1, 11, 12, 13):
            with FrontEnd(server.path) as front:
                for data, count in stream[:stop]:
                    front.send_bytes(data, [fd] * count)
                if stop < len(stream) and cut:
                    front.send_bytes(stream[stop][0][:cut], [fd] * stream[stop][1])
    os.close(fd)
    served(server)
    assert open_fds() == before
    assert server.failure is None

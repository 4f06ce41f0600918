"""What has been found in back-ends of vhost-user, done to ours over a real socket, each by its id."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import MessageError, PeerDisconnected
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import encode
from virtio_test.transport.vhost_user.frontend import FrontEnd, ring_address
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.payloads import U64, Config, Empty, Payload, SingleRegion, VringState

from tests.unit.vhost_user_world import SIZE, Server, guest, serving
from tests.unit.world import PATIENCE, ServerThread, eventually, mapped_files, open_fds

PAGE = 4096


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def served(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
    assert eventually(lambda: server.backend.session is None)


@pytest.mark.row("CVE-2018-1118")
def test_no_reply_shows_what_nobody_wrote(tmp_path: Path) -> None:
    """Every byte of every reply is accounted for, before and after others were sent that were full of a pattern."""
    config = ConfigSpace(ConfigLayout(("word", "le32", "rw"), ("bytes", "bytes(60)", "rw")))
    device = BaseDevice(45, handlers={0: bytes.upper}, queue_sizes=(SIZE,), config=config)
    with_server = ServerThread(tmp_path / "s", Backend(device, path=tmp_path / "s"))
    try:
        with FrontEnd(with_server.path, timeout=PATIENCE) as front:
            front.negotiate()

            def reply(request: Request, payload: Payload | None = None) -> bytes:
                front.send(request, payload)
                message = front.receive()
                return struct.pack("=III", message.request, 5, len(message.payload.pack())) + message.payload.pack()

            plain = {each: reply(each) for each in (Request.GET_FEATURES, Request.GET_QUEUE_NUM, Request.GET_STATUS)}
            front.set_config(0, b"\xa5" * 64)
            assert reply(Request.GET_CONFIG, Config(0, 64, 0, bytes(64)))[24:] == b"\xa5" * 64
            front.set_config(0, bytes(64))
            assert {each: reply(each) for each in plain} == plain
            assert plain[Request.GET_QUEUE_NUM] == struct.pack("=IIIQ", Request.GET_QUEUE_NUM, 5, 8, 1)
            # A packed ring's fresh position: both wrap counters are 1.
            assert reply(Request.GET_VRING_BASE, VringState(0))[12:] == struct.pack("=II", 0, 0x8000_8000)
            # What it sends back of a space is what stands there, not what the request carried.
            answer = reply(Request.GET_CONFIG, Config(0, 64, 0, b"\x5a" * 64))
            assert answer == struct.pack("=IIIIII", Request.GET_CONFIG, 5, 76, 0, 64, 0) + bytes(64)
    finally:
        with_server.close()


@pytest.mark.row("CVE-2019-14818", "CVE-2020-10726", "M03", "M21")
def test_no_request_keeps_fds_that_it_does_not_take(server: Server) -> None:
    """Each request with eight fds, a few times over: whether it is refused or ends the connection, none stays."""
    served(server)
    before = open_fds(), mapped_files()
    fds = [os.memfd_create("x", os.MFD_CLOEXEC) for _ in range(8)]
    for request in Request:
        for _ in range(3):
            with FrontEnd(server.path, timeout=PATIENCE) as front:
                front.negotiate()
                front.send_bytes(encode(request, U64(0), need_reply=True), fds)
                with suppress(PeerDisconnected, MessageError):
                    front.receive()
            del front
    for fd in fds:
        os.close(fd)
    assert eventually(lambda: server.backend.session is None)
    assert eventually(lambda: (open_fds(), mapped_files()) == before)
    served(server)


@pytest.mark.row("CVE-2020-10723", "M09")
@pytest.mark.parametrize("index", [1, 0x100, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF])
def test_an_index_of_32_bits_is_compared_whole(server: Server, index: int) -> None:
    """Cut to 8 or 16 bits each of these would be queue 0, or none."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        for request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
            g.front.send(request, VringState(index, 1), need_reply=True)
            assert g.front.receive().payload == U64(1)
        g.front.send(Request.SET_VRING_CALL, U64(0x100 | index << 9), need_reply=True)
        assert g.front.receive().payload == U64(1)
        g.request(1)


@pytest.mark.row("qemu@733a98a5", "CVE-2020-10723", "M09")
@pytest.mark.parametrize("size", [0, 3, 0x8001, 0x1_0000, 0x1_0080, 0xFFFF_FFFF])
def test_a_size_that_no_queue_has(server: Server, size: int) -> None:
    with guest(server.path) as g:
        g.front.request(Request.SET_VRING_NUM, VringState(0, SIZE))
        g.front.send(Request.SET_VRING_NUM, VringState(0, size), need_reply=True)
        assert g.front.receive().payload == U64(1)
        # It is as large as it was: the ring goes round.
        g.setup()
        g.front.enable(0)
        for number in range(SIZE + 3):
            g.request(number)


@pytest.mark.row("qemu@27806d2d", "A13")
def test_a_ring_that_cannot_be_mapped(server: Server) -> None:
    """Its memory is taken away before it starts, and while it runs: it does not run, and comes back with its memory."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        region = g.memory.regions[0]
        g.front.remove_region(region)
        g.kick()
        assert g.front.number(Request.GET_FEATURES)
        # Nowhere at all now, and it is started all the same.
        g.front.send(Request.SET_VRING_ADDR, ring_address(g.config), need_reply=True)
        assert g.front.receive().payload == U64(1)
        g.front.add_region(region)
        g.request(2)
        nowhere = QueueConfig.from_layout(RingLayout.contiguous(SIZE, 1 << 40))
        g.front.send(Request.SET_VRING_ADDR, ring_address(nowhere), need_reply=True)
        assert g.front.receive().payload == U64(1)
        g.request(3)
    served(server)


@pytest.mark.row("openvmm#2986", "M05")
@pytest.mark.parametrize(
    ("guest_address", "user", "offset"),
    [(2**64 - PAGE, 0, 0), (0, 2**64 - PAGE, 0), (0, 0, 2**64 - PAGE), (2**64 - PAGE, 2**64 - PAGE, 2**64 - PAGE)],
)
def test_a_region_that_overflows(server: Server, guest_address: int, user: int, offset: int) -> None:
    before = mapped_files()
    fd = os.memfd_create("x", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * PAGE)
    with FrontEnd(server.path, timeout=PATIENCE) as front:
        front.negotiate()
        region = SingleRegion(guest_address, 2 * PAGE, user, offset)
        front.send(Request.ADD_MEM_REG, region, [fd], need_reply=True)
        assert front.receive().payload == U64(1)
        assert mapped_files() == before
        assert front.number(Request.GET_FEATURES)
        front.send(Request.RESET_DEVICE, Empty(), need_reply=True)
        assert front.receive().payload == U64(0)
    os.close(fd)
    served(server)

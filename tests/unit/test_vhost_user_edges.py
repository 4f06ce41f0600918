"""Where what the vhost-user ends take begins and ends, beside the messages: each number, and the next one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory
from virtio_test.devices.test import TestDevice
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected, PeerError
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import OwnedFd
from virtio_test.transport.vhost_user.link import MAX_ERRORS, note
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import U64, Config
from virtio_test.transport.vhost_user.registers import VhostUserRegisters
from virtio_test.transport.vhost_user.rings import MAX_SIZE, Kick, Ring

from .vhost_user_world import guest, serving


@pytest.mark.row("M09")
@pytest.mark.parametrize(("size", "packed"), [(1, False), (1, True), (MAX_SIZE, False), (MAX_SIZE, True), (3, True)])
def test_the_least_and_the_largest_ring(size: int, *, packed: bool) -> None:
    ring = Ring(0)
    ring.set_size(size, packed=packed)
    assert ring.size == size


@pytest.mark.row("M08")
@pytest.mark.parametrize(
    ("base", "packed", "legal"),
    [(0xFFFF, False, True), (0x1_0000, False, False), (0x8007, True, True), (8, True, False), (0x8008, True, False)],
)
def test_a_base_lies_in_its_ring(base: int, *, packed: bool, legal: bool) -> None:
    ring = Ring(0)
    ring.set_size(8, packed=packed)
    if legal:
        ring.check_base(base, packed=packed)
    else:
        with pytest.raises(MessageError) as caught:
            ring.check_base(base, packed=packed)
        assert caught.value.rule == "VringBase"


def test_as_many_errors_are_kept_as_it_says() -> None:
    errors = list[PeerError]()
    assert all(note(errors, PeerError("one")) for _ in range(MAX_ERRORS))
    assert not note(errors, PeerError("one more"))
    assert len(errors) == MAX_ERRORS


@pytest.mark.parametrize(
    ("queues", "queue_size", "possible"),
    [
        (1, 128, True),
        (256, 128, True),
        (0, 128, False),
        (257, 128, False),
        (1, 1, True),
        (1, MAX_SIZE, True),
        (1, 0, False),
        (1, MAX_SIZE + 1, False),
    ],
)
def test_queues_that_cannot_be_are_refused_before_anybody_is_asked(
    tmp_path: Path, queues: int, queue_size: int, *, possible: bool
) -> None:
    with pytest.raises(PeerDisconnected if possible else InvalidArgument):
        VhostUserRegisters(tmp_path / "nobody", device_id=45, queues=queues, queue_size=queue_size)


def test_a_back_end_brings_no_memory_and_serves_what_it_says(tmp_path: Path) -> None:
    device = TestDevice(console=lambda _: None)
    with pytest.raises(InvalidArgument, match="regions of its own"):
        Backend(device, path=tmp_path / "s", memory=GuestMemory([(0, 4096)]))
    with pytest.raises(InvalidArgument, match="are not served here"):
        Backend(device, path=tmp_path / "s", protocol_features=ProtocolFeature.MQ | ProtocolFeature.CRYPTO_SESSION)
    assert not (tmp_path / "s").exists()


def test_the_last_status_and_the_last_kind_of_configuration_are_taken(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, guest(server.path) as g:
        g.front.request(Request.SET_STATUS, U64(0xFF))
        reply = g.front.request(Request.GET_CONFIG, Config(0, 4, 1, bytes(4)))
        assert reply is not None
        assert isinstance(reply.payload, Config)
        assert (reply.payload.size, reply.payload.flags) == (4, 1)


@pytest.mark.row("M04")
@pytest.mark.parametrize("with_", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
def test_in_band_notifications_need_a_channel_and_answers(tmp_path: Path, with_: ProtocolFeature) -> None:
    chosen = int(ProtocolFeature.INBAND_NOTIFICATIONS | with_)
    with (
        serving(tmp_path / "s", protocol_features=ProtocolFeature(chosen)) as server,
        guest(server.path, protocol_features=ProtocolFeature(0)) as g,
    ):
        g.front.send(Request.SET_PROTOCOL_FEATURES, U64(chosen), need_reply=True)
        with pytest.raises(PeerDisconnected):
            g.front.receive()


@pytest.mark.parametrize("old", [False, True], ids=["as it is", "before Linux 6.4"])
def test_a_pipe_wakes_by_what_is_in_it_and_hangs_up_once(monkeypatch: pytest.MonkeyPatch, *, old: bool) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no such read of a pipe")

    if old:
        monkeypatch.setattr(os, "preadv", refuse)
    read, write = os.pipe()
    kick = Kick(OwnedFd(read), 0)
    assert not kick.drain()
    os.write(write, b"kick")
    assert kick.drain()
    assert not kick.drain()
    assert not kick.hung_up()
    os.close(write)
    assert not kick.drain()
    assert kick.hung_up()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EIO])
def test_a_kick_that_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, "it fails")

    event, (read, write) = Kick(OwnedFd(os.eventfd(1)), 0), os.pipe()
    pipe = Kick(OwnedFd(read), 0)
    os.write(write, b"kick")
    monkeypatch.setattr(os, "preadv", fail)
    assert not event.drain()
    assert pipe.drain() == (number == errno.EOPNOTSUPP)
    os.close(write)

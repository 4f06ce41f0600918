"""The vhost-user back-end over a real socket, driven by our front-end and a real driver queue."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import Notifier
from virtio_test.devices.test import TestDevice
from virtio_test.errors import MessageError, PeerDisconnected
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.frontend import FrontEnd, ring_address
from virtio_test.transport.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import U64, VringState
from virtio_test.transport.vhost_user.session import SUPPORTED

from .vhost_user_world import Server, guest, serving
from .world import eventually, open_fds

F = ProtocolFeature
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def signalled(notifier: Notifier, seconds: float = 5.0) -> bool:
    return bool(select.select([notifier.fileno()], [], [], seconds)[0])


# --- requests -----------------------------------------------------------------------------------------------


@BOTH
def test_a_request_goes_there_and_back(server: Server, *, packed: bool) -> None:
    with guest(server.path, packed=packed) as g:
        g.setup()
        g.front.enable(0)
        assert g.ring is not None
        g.request(10)
        assert signalled(g.ring.call)
        assert server.lines[:2] == [
            "QEMU_BACK_END: >>> get type [ 10 ] form the front end <<<",
            "QEMU_BACK_END: >>> get arg1 [ 11 ] form the front end <<<",
        ]
        for number in range(11, 11 + 400):
            g.request(number)


@BOTH
def test_many_in_flight(server: Server, *, packed: bool) -> None:
    with guest(server.path, packed=packed) as g:
        g.setup()
        g.front.enable(0)
        for round_ in range(5):
            numbers = [round_ * 64 + each for each in range(64)]
            for number in numbers:
                g.post(number)
            g.kick()
            assert sorted(g.used(64)) == numbers


def test_buffers_that_lie_there_before_the_ring_starts_need_no_kick(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.post(5)
        g.front.enable(0)
        assert g.used() == [5]


@pytest.mark.parametrize("kind", ["eventfd", "pipe", "socket"])
def test_call_fds_of_every_kind(server: Server, kind: str) -> None:
    ends: list[int] = []
    if kind == "pipe":
        ends = list(os.pipe())
    elif kind == "socket":
        ends = [each.detach() for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
    with guest(server.path) as g:
        call = Notifier.from_fd(ends[1]) if ends else Notifier.eventfd()
        read = ends[0] if ends else call.fileno()
        g.setup(call=call)
        g.front.enable(0)
        g.request(1)
        assert select.select([read], [], [], 5.0)[0]
        assert os.read(read, 64) == struct.pack("=Q", 1)
    for fd in ends:
        os.close(fd)


def test_the_call_fd_can_change_while_the_ring_runs(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        other = Notifier.eventfd()
        g.front.request(Request.SET_VRING_CALL, U64(0), [other.fileno()])
        g.request(2)
        assert signalled(other)
        g.front.request(Request.SET_VRING_CALL, U64(0x100))
        other.drain()
        g.request(3)
        assert not signalled(other, 0.05)


def test_without_a_kick_fd_the_ring_is_polled(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.request(Request.SET_VRING_KICK, U64(0x100))
        g.front.enable(0)
        for number in range(3):
            g.post(number)
            assert g.used() == [number]


# --- ring states --------------------------------------------------------------------------------------------


def test_a_ring_runs_only_while_it_is_enabled(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.post(1)
        g.kick()
        g.front.number(Request.GET_FEATURES)
        assert g.queue is not None
        assert not eventually(g.queue.has_used, patience=0.05)
        g.front.enable(0)
        assert g.used() == [1]
        g.front.enable(0, on=False)
        g.post(2)
        g.kick()
        g.front.number(Request.GET_FEATURES)
        assert not eventually(g.queue.has_used, patience=0.05)
        g.front.enable(0)
        assert g.used() == [2]


def test_without_protocol_features_a_ring_is_enabled_at_once(server: Server) -> None:
    with guest(server.path, protocol_bit=False) as g:
        g.setup()
        g.request(1)


@pytest.mark.row("M12")
@BOTH
def test_the_base_comes_back_and_the_ring_goes_on_there(server: Server, *, packed: bool) -> None:
    with guest(server.path, packed=packed) as g:
        g.setup()
        g.front.enable(0)
        for number in range(130):
            g.request(number)
        base = g.front.get_base(0)
        if packed:
            # 130 chains of two descriptors: 260 = 2 * 128 + 4, the wrap counter has turned twice.
            assert base == 0x8004_8004
        else:
            assert base == 130
        # Stopped: kicks mean nothing any more, a second question gets the same answer.
        g.post(200)
        g.kick()
        assert g.front.get_base(0) == base
        assert g.queue is not None
        assert not eventually(g.queue.has_used, patience=0.05)
        assert g.ring is not None
        g.front.setup_ring(g.config, base=base & 0xFFFF)
        assert g.used() == [200]


@pytest.mark.parametrize("base", [0, 0x8000], ids=["UML sends 0", "DPDK sends the wrap bit"])
def test_a_fresh_packed_ring(server: Server, base: int) -> None:
    with guest(server.path, packed=True) as g:
        g.setup(base=base)
        g.front.enable(0)
        g.request(1)


def test_base_0_after_it_was_read_back_is_meant_literally(server: Server) -> None:
    with guest(server.path, packed=True) as g:
        g.setup()
        assert g.front.get_base(0) == 0x8000_8000
        # Wrap counter 0: what a fresh driver makes available is, for such a ring, still the last round's.
        g.front.setup_ring(g.config, base=0)
        g.front.enable(0)
        g.post(1)
        g.kick()
        assert g.queue is not None
        assert not eventually(g.queue.has_used, patience=0.05)


def test_a_ring_that_never_ran_has_the_base_that_was_set(server: Server) -> None:
    with guest(server.path) as g:
        assert g.front.get_base(0) == 0
        g.front.request(Request.SET_VRING_NUM, VringState(0, 128))
        g.front.request(Request.SET_VRING_BASE, VringState(0, 77))
        assert g.front.get_base(0) == 77


def test_set_up_anew_without_a_word_as_uml_does(server: Server) -> None:
    with guest(server.path, protocol_bit=False) as g:
        g.setup()
        g.request(1)
        for round_ in range(3):
            g.front.set_features(g.front.features, protocol_bit=False)
            g.front.share(g.memory)
            g.setup()
            g.request(round_)


def test_disabled_and_set_up_anew(server: Server) -> None:
    with guest(server.path) as g:
        for round_ in range(3):
            g.setup()
            g.front.enable(0)
            g.request(round_)
            g.front.enable(0, on=False)


# --- broken rules -------------------------------------------------------------------------------------------


def break_ring(g: object) -> None:
    """An avail ring that names a descriptor beyond the table."""
    from .vhost_user_world import Guest

    assert isinstance(g, Guest)
    assert g.queue is not None
    layout = g.queue.layout()
    idx = struct.unpack("<H", g.memory.read(layout.at("avail.idx"), 2))[0]
    g.memory.write(layout.at("avail.ring", idx % 128), struct.pack("<H", 999))
    g.memory.write(layout.at("avail.idx"), struct.pack("<H", (idx + 1) & 0xFFFF))
    g.kick()


def test_one_broken_rule_is_one_change_of_state(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.front.set_status(0x0F)
        g.request(1)
        assert g.ring is not None
        break_ring(g)
        assert signalled(g.ring.error)
        assert g.ring.error.drain() == 1
        assert g.front.get_status() == 0x4F
        for _ in range(3):
            g.kick()
        g.front.number(Request.GET_FEATURES)
        assert not signalled(g.ring.error, 0.05)
        # No configuration change is sent, not even if the device has one to tell.
        server.loop.call_soon(lambda: server.device.config.update(num_pages=5))
        g.front.number(Request.GET_FEATURES)
        assert g.front.backend_requests(timeout=0.05) == []
        assert [record.getMessage() for record in caplog.records if "stopped" in record.getMessage()] != []
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
        # A new cycle after GET_VRING_BASE clears it.
        g.front.get_base(0)
        assert g.front.get_status() == 0x4F
        g.setup()
        assert g.front.get_status() == 0x0F
        g.request(2)


@pytest.mark.row("M13")
def test_device_reset_clears_a_broken_ring(server: Server) -> None:
    for clear in ("RESET_DEVICE", "status 0"):
        with guest(server.path) as g:
            g.setup()
            g.front.enable(0)
            break_ring(g)
            assert g.ring is not None
            assert signalled(g.ring.error)
            assert g.front.get_status() == 0x40
            if clear == "RESET_DEVICE":
                g.front.request(Request.RESET_DEVICE)
            else:
                g.front.set_status(0)
            assert g.front.get_status() == 0
            g.setup()
            g.front.enable(0)
            g.request(3)


def test_uml_clears_a_broken_ring_by_setting_it_up_anew(server: Server) -> None:
    with guest(server.path, protocol_bit=False) as g:
        g.setup()
        break_ring(g)
        assert g.ring is not None
        assert signalled(g.ring.error)
        g.front.set_features(g.front.features, protocol_bit=False)
        g.setup()
        g.request(4)


def test_a_handler_that_raises_is_one_log_entry_and_the_server_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def console(line: str) -> None:
        if "[ 13 ]" in line:
            raise RuntimeError("the console is gone")

    with serving(tmp_path / "s", TestDevice(console=console)) as server:
        with guest(server.path) as g:
            g.setup()
            g.front.enable(0)
            g.request(1)
            g.post(13)
            g.kick()
            assert g.ring is not None
            assert signalled(g.ring.error)
            assert g.front.get_status() == 0x40
        entries = [record for record in caplog.records if record.levelno >= 30]
        assert len(entries) == 1
        assert entries[0].exc_info is not None
        with guest(server.path) as g:
            g.setup()
            g.front.enable(0)
            g.request(2)


class Stubborn(TestDevice):
    """Fails wherever a transport reaches its own code."""

    def reset(self) -> None:
        super().reset()
        raise RuntimeError("no reset")

    def activate(self, features: FeatureSet) -> None:
        raise RuntimeError(f"not active with {features}")


def test_a_device_that_fails_everywhere_does_not_take_the_server_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Stubborn(console=lambda _: None)

    def refuse(_: object) -> None:
        raise RuntimeError("no write")

    device.config.on_driver_write = refuse
    with serving(tmp_path / "s", device) as server:
        for _ in range(3):
            with guest(server.path) as g:
                with pytest.raises(MessageError, match="Refused"):
                    g.front.set_config(4, b"1234")
                g.setup()
                g.front.enable(0)
                assert g.front.get_status() == 0x40
                g.front.request(Request.RESET_DEVICE)
                assert g.front.get_status() == 0
    assert {record.exc_info[0] for record in caplog.records if record.exc_info} == {RuntimeError}


# --- configuration space ------------------------------------------------------------------------------------


def test_configuration_space(server: Server) -> None:
    with guest(server.path) as g:
        assert g.front.get_config(0, 12) == bytes(12)
        g.front.set_config(4, struct.pack("<I", 7))
        assert g.front.get_config(0, 12) == struct.pack("<III", 0, 7, 0)
        # QEMU writes the whole space back for one field: the read-only one stays as it is.
        g.front.set_config(0, struct.pack("<III", 99, 8, 9))
        assert g.front.get_config(0, 12) == struct.pack("<III", 0, 8, 9)
        for offset, size in ((0, 13), (12, 1), (0xFFFF_FFFF, 1)):
            with pytest.raises(MessageError, match="Refused"):
                g.front.get_config(offset, size)
        with pytest.raises(MessageError, match="Refused"):
            g.front.set_config(8, bytes(5))
        with pytest.raises(MessageError, match="Refused"):
            g.front.set_config(8, bytes(4), flags=2)
        assert g.front.get_config(0, 12) == struct.pack("<III", 0, 8, 9)


def change_config(server: Server, value: int) -> None:
    server.loop.call_soon(lambda: server.device.config.update(num_pages=value))


def test_a_configuration_change_is_told_only_while_rings_run(server: Server) -> None:
    with guest(server.path) as g:
        change_config(server, 1)
        g.setup()
        g.front.number(Request.GET_FEATURES)
        change_config(server, 2)
        g.front.number(Request.GET_FEATURES)
        # Before the driver has started its rings QEMU 11.1 would crash.
        assert g.front.backend_requests(timeout=0.05) == []
        # All that QEMU's generic device ever says of the status.
        g.front.set_status(0x08)
        g.front.enable(0)
        g.request(1)
        change_config(server, 4)
        (message,) = g.front.backend_requests(timeout=5.0)
        assert message.request == BackendRequest.CONFIG_CHANGE_MSG
        assert g.front.get_config(0, 4) == struct.pack("<I", 4)
        g.front.get_base(0)
        change_config(server, 5)
        g.front.number(Request.GET_FEATURES)
        assert g.front.backend_requests(timeout=0.05) == []


def test_configuration_changes_that_nobody_reads_hold_nothing_up(server: Server) -> None:
    with guest(server.path, protocol_features=F.CONFIG | F.BACKEND_REQ | F.REPLY_ACK) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)

        def many() -> None:
            for value in range(5000):
                server.device.config.update(num_pages=value)

        server.loop.call_soon(many)
        g.request(2)
        messages = g.front.backend_requests(timeout=1.0)
        assert messages
        assert all(message.request == BackendRequest.CONFIG_CHANGE_MSG for message in messages)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.row("T12")
def test_memory_can_be_changed_under_a_running_ring(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        g.front.share(g.memory)
        g.request(2)
        (region,) = g.memory.regions
        g.front.remove_region(region)
        g.post(3)
        g.kick()
        g.front.number(Request.GET_FEATURES)
        assert g.queue is not None
        assert not eventually(g.queue.has_used, patience=0.05)
        g.front.add_region(region)
        assert g.used() == [3]
        g.request(4)


@pytest.mark.row("M06")
def test_memory_slots(server: Server) -> None:
    with guest(server.path) as g:
        assert g.front.number(Request.GET_MAX_MEM_SLOTS) == 509


# --- in-band notifications ----------------------------------------------------------------------------------


def test_in_band_notifications(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", protocol_features=SUPPORTED) as server,
        guest(server.path, protocol_features=SUPPORTED) as g,
    ):
        g.setup()
        g.front.request(Request.SET_VRING_KICK, U64(0x100))
        g.front.request(Request.SET_VRING_CALL, U64(0x100))
        g.front.request(Request.SET_VRING_ERR, U64(0x100))
        g.front.enable(0)
        for number in range(3):
            g.post(number)
            g.front.kick_inband(0)
            assert g.used() == [number]
            (message,) = g.front.backend_requests(timeout=5.0)
            assert (message.request, message.payload) == (BackendRequest.VRING_CALL, VringState(0))
            assert message.need_reply
        break_ring(g)
        g.front.kick_inband(0)
        (message,) = g.front.backend_requests(timeout=5.0)
        assert (message.request, message.payload) == (BackendRequest.VRING_ERR, VringState(0))


def test_in_band_an_enabled_ring_runs_without_a_kick(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", protocol_features=SUPPORTED) as server,
        guest(server.path, protocol_features=SUPPORTED) as g,
    ):
        # As UML: nothing is said of a kick fd.
        g.front.request(Request.SET_VRING_NUM, VringState(0, g.config.size))
        g.front.request(Request.SET_VRING_ADDR, ring_address(g.config))
        g.front.enable(0)
        change_config(server, 1)
        (message,) = g.front.backend_requests(timeout=5.0)
        assert message.request == BackendRequest.CONFIG_CHANGE_MSG


# --- connections --------------------------------------------------------------------------------------------


@pytest.mark.row("U12")
def test_front_ends_come_and_go_without_a_leak(server: Server) -> None:
    def once(number: int) -> None:
        with guest(server.path, packed=bool(number % 2)) as g:
            g.setup()
            g.front.enable(0)
            g.request(number)
        assert eventually(lambda: server.backend.session is None)

    once(0)
    before = open_fds()
    for number in range(50):
        once(number)
    assert open_fds() == before
    assert server.backend.sessions == 51
    assert server.backend.memory.regions == []
    assert server.failure is None


@pytest.mark.row("M20")
def test_a_second_front_end_waits_and_disturbs_nobody(server: Server) -> None:
    with guest(server.path) as first:
        first.setup()
        first.front.enable(0)
        second = FrontEnd(server.path)
        second.send(Request.GET_FEATURES)
        for number in range(5):
            first.request(number)
        assert not select.select([second.socket], [], [], 0.05)[0]
    assert second.receive().request == Request.GET_FEATURES
    second.close()


@pytest.mark.row("M20")
def test_the_configuration_of_one_front_end_does_not_reach_the_rings_of_the_next(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        g.post(2)
    with guest(server.path) as g:
        assert g.front.get_status() == 0
        assert g.front.get_base(0) == 0
        g.setup()
        g.front.enable(0)
        g.request(3)


def test_a_given_connection_is_served_and_then_it_is_over(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    backend = Backend(TestDevice(console=lambda _: None), fd=theirs.detach())
    with FrontEnd(connection=ours) as front:
        front.send(Request.GET_FEATURES)
        backend.loop.run(until=lambda: bool(select.select([ours], [], [], 0)[0]), timeout=5.0)
        assert front.receive().request == Request.GET_FEATURES
        assert not backend.finished
    assert backend.loop.run(timeout=5.0) is False
    assert backend.finished
    backend.close()


def test_offered_features_can_be_chosen(tmp_path: Path) -> None:
    device = TestDevice(console=lambda _: None)
    offered = FeatureSet.parse("-RING_PACKED,-IN_ORDER", base=device.features)
    with serving(tmp_path / "s", device, features=offered) as server, FrontEnd(server.path) as front:
        assert front.number(Request.GET_FEATURES) == offered.bits | 1 << 30 | 1 << 26
    with pytest.raises(ValueError, match="does not have"):
        Backend(device, path=tmp_path / "t", features=offered | FeatureSet("SR_IOV"))
    assert not (tmp_path / "t").exists()


def test_a_front_end_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerDisconnected, match="no back-end at"):
        FrontEnd(tmp_path / "nobody")


def test_without_version_1_a_transitional_device_is_served(server: Server) -> None:
    with guest(server.path, wanted=FeatureSet("INDIRECT_DESC")) as g:
        assert "VERSION_1" not in g.front.features
        g.setup()
        g.front.enable(0)
        g.request(10)


def test_without_version_1_another_device_refuses(tmp_path: Path) -> None:
    device = TestDevice(console=lambda _: None)
    device.transitional = False
    with serving(tmp_path / "s", device) as server:
        with pytest.raises(MessageError, match="Refused"), guest(server.path, wanted=FeatureSet("INDIRECT_DESC")):
            pass
        # No features at all are what a front-end begins with; a ring does not run with them.
        with guest(server.path, wanted=FeatureSet()) as g:
            g.setup()
            g.front.enable(0)
            assert g.ring is not None
            assert signalled(g.ring.error)
        with guest(server.path) as g:
            g.setup()
            g.front.enable(0)
            g.request(10)

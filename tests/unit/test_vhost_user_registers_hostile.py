"""Back-ends that hang, leave, lie or speak nonsense at any message: one typed error, in time, nothing leaked."""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
from virtio_test.driver.test import TestDriver
from virtio_test.errors import (
    InvalidArgument,
    MessageError,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.codec import encode, encode_reply
from virtio_test.transport.vhost_user.link import MAX_ERRORS
from virtio_test.transport.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import U64, Config, Inflight, Iotlb, Payload, VringState
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from . import vhost_user_peer as peers
from .vhost_user_peer import FEATURES, PROTOCOL, Fault, Peer, peer
from .world import eventually, open_fds

R = Request
TIMEOUT = 10.0
SHORT = 0.3
"""For those of whom nothing is expected: a machine that is busy makes no difference to them."""
PATH = [
    R.SET_OWNER, R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.SET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM,
    R.SET_BACKEND_REQ_FD, R.SET_STATUS, R.GET_STATUS, R.SET_FEATURES, R.GET_CONFIG, R.GET_MAX_MEM_SLOTS,
    R.ADD_MEM_REG, R.GET_INFLIGHT_FD, R.SET_INFLIGHT_FD, R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ADDR,
    R.SET_VRING_ERR, R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ENABLE, R.GET_VRING_BASE, R.RESET_DEVICE,
]  # fmt: skip
"""Every message that a driver's life sends where everything is offered."""

# What each fault is found to be. A reply to a message that wanted none is found at the next one.
FAULTS: dict[Fault, tuple[type[PeerError], set[str]]] = {
    peers.close: (PeerDisconnected, set()),
    peers.hang: (PeerTimeout, set()),
    peers.hang_inside: (PeerTimeout, set()),
    peers.dribble: (PeerError, set()),
    peers.cut: (MessageError, {"Truncated"}),
    peers.other_request: (MessageError, {"UnexpectedReply"}),
    peers.unknown_request: (MessageError, {"UnexpectedReply"}),
    peers.no_reply_flag: (MessageError, {"ReplyFlag"}),
    peers.other_version: (MessageError, {"BadVersion"}),
    peers.reserved_flag: (MessageError, {"ReservedFlags"}),
    peers.too_long: (MessageError, {"MessageTooLong"}),
    peers.too_short: (MessageError, {"PayloadSize"}),
    peers.with_fds: (MessageError, {"FdCount"}),
}


@pytest.fixture(autouse=True)
def nothing_leaks() -> object:
    before = open_fds()
    yield
    assert eventually(lambda: open_fds() == before), f"{open_fds()} fds are open, {before} were"


def life(path: Path, *, timeout: float = TIMEOUT) -> list[PeerError]:
    """Bring a driver up, read a field, go down again; the errors that it noted."""
    registers = VhostUserRegisters(path, device_id=45, timeout=timeout)
    try:
        driver = TestDriver(registers, console=lambda _: None, timeout=timeout)
        driver.initialize()
        driver.detach()
    finally:
        registers.close()
    return registers.errors


def test_a_good_back_end_is_driven_and_asked_everything(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as good:
        assert life(good.path) == []
        assert set(good.names()) == {request.name for request in PATH}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("request_", PATH, ids=lambda request: request.name)
def test_a_fault_at_any_message_is_one_typed_error_in_time(tmp_path: Path, request_: Request, fault: Fault) -> None:
    kind, rules = FAULTS[fault]
    timeout = SHORT if kind is PeerTimeout or fault is peers.dribble else TIMEOUT
    with peer(tmp_path / "s", faults={request_: fault}) as bad:
        started = time.monotonic()
        with pytest.raises(kind) as caught:
            life(bad.path, timeout=timeout)
        assert time.monotonic() - started < timeout + 5.0
        if isinstance(caught.value, MessageError) and fault is not peers.dribble:
            unasked = request_ in {R.SET_OWNER, R.SET_PROTOCOL_FEATURES}
            assert caught.value.rule in rules | ({"UnexpectedReply", "PayloadSize"} if unasked else set())


@pytest.mark.parametrize("request_", [each for each in PATH if not each.name.startswith(("GET_", "SET_OWNER"))])
def test_a_refusal_is_an_answer(tmp_path: Path, request_: Request) -> None:
    with peer(tmp_path / "s", faults={request_: peers.refuse}) as bad:
        with pytest.raises(MessageError) as caught:
            life(bad.path)
        assert caught.value.rule in {"Refused", "UnexpectedReply"}
        if request_ is not R.SET_PROTOCOL_FEATURES:
            assert request_.name in str(caught.value)
        # What was refused once may be taken the next time.
        bad.faults.clear()
        assert life(bad.path) == []


@pytest.mark.parametrize(
    ("request_", "reply", "rule"),
    [
        (R.GET_QUEUE_NUM, U64(0), "QueueCount"),
        (R.GET_QUEUE_NUM, U64(257), "QueueCount"),
        (R.GET_QUEUE_NUM, U64((1 << 64) - 1), "QueueCount"),
        (R.GET_MAX_MEM_SLOTS, U64(0), "RegionSlots"),
        (R.GET_STATUS, U64(0x100), "StatusValue"),
        (R.GET_CONFIG, None, "Refused"),
        (R.GET_CONFIG, Config(0, 3, 0, b"abc"), "ConfigSize"),
        (R.GET_CONFIG, Config(0, 300, 0, bytes(300)), "ConfigSize"),
        (R.GET_VRING_BASE, VringState(1, 0), "UnexpectedReply"),
        (R.GET_VRING_BASE, VringState(0, 0x1_0000), "VringBase"),
        (R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128), "Refused"),
        (R.GET_INFLIGHT_FD, Inflight(100, 0, 1, 128), "InflightRegion"),
        (R.GET_INFLIGHT_FD, Inflight(1 << 20, 0, 1, 128), "InflightRegion"),
        (R.GET_INFLIGHT_FD, Inflight(8192, 1, 1, 128), "InflightRegion"),
        (R.GET_INFLIGHT_FD, Inflight(8192, (1 << 64) - 1, 1, 128), "InflightRegion"),
    ],
)
def test_a_reply_is_judged(tmp_path: Path, request_: Request, reply: Payload | None, rule: str) -> None:
    with peer(tmp_path / "s", answers={request_: reply}) as bad:
        with pytest.raises(MessageError) as caught:
            life(bad.path)
        assert caught.value.rule == rule
        assert caught.value.clause.startswith("vhost-user, ")


def test_a_status_that_does_not_read_back_is_a_finding(tmp_path: Path) -> None:
    def without_features_ok(bad: Peer, message: peers.Message, good: bytes) -> None:
        assert bad.connection is not None
        bad.connection.send(encode_reply(R.GET_STATUS, U64(bad.status & ~8)))

    with peer(tmp_path / "s", faults={R.GET_STATUS: without_features_ok}) as bad:
        with pytest.raises(StatusViolation) as caught:
            life(bad.path)
        assert caught.value.rule == "FeaturesRefused"


def test_a_region_must_be_a_file(tmp_path: Path) -> None:
    def socket_for_a_region(bad: Peer, message: peers.Message, good: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert bad.connection is not None
            socket.send_fds(bad.connection, [good], [theirs.fileno()])

    def no_region(bad: Peer, message: peers.Message, good: bytes) -> None:
        assert bad.connection is not None
        bad.connection.send(good)

    for fault, rule in ((socket_for_a_region, "InflightRegion"), (no_region, "Refused")):
        with peer(tmp_path / rule, faults={R.GET_INFLIGHT_FD: fault}) as bad:
            with pytest.raises(MessageError) as caught:
                life(bad.path)
            assert caught.value.rule == rule


# --- between messages -------------------------------------------------------------------------------------------


def up(path: Path, *, wanted: FeatureSet | None = None, **options: object) -> TestDriver:
    registers = VhostUserRegisters(path, device_id=45, timeout=TIMEOUT, **options)  # type: ignore[arg-type]
    driver = TestDriver(registers, wanted=wanted, console=lambda _: None, timeout=TIMEOUT)
    driver.initialize()
    return driver


def registers_of(driver: TestDriver) -> VhostUserRegisters:
    assert isinstance(driver.registers, VhostUserRegisters)
    return driver.registers


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (encode_reply(R.GET_FEATURES, U64(1)), 0),
        (encode(BackendRequest.CONFIG_CHANGE_MSG), 0),
        (b"x", 0),
        (b"\xff" * 4000, 2),
    ],
)
def test_what_nobody_asked_for_ends_the_connection(tmp_path: Path, data: bytes, fds: int) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        request = driver.submit_number(1)
        assert bad.connection is not None
        socket.send_fds(bad.connection, [data], [0] * fds)
        with pytest.raises(MessageError) as caught:
            request.wait()
        assert caught.value.rule == "UnexpectedReply"
        assert driver.broken is caught.value
        registers_of(driver).close()


def test_what_nobody_asked_for_is_no_answer_to_the_next_question(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        assert bad.connection is not None
        bad.connection.send(encode_reply(R.GET_CONFIG, Config(0, 4, 0, b"evil")))
        with pytest.raises(MessageError) as caught:
            driver.read_field("num_pages")
        assert caught.value.rule == "UnexpectedReply"
        registers_of(driver).close()


def test_a_back_end_that_leaves_finishes_everything_once(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        lost: list[PeerError] = []
        driver = up(bad.path, on_lost=lost.append)
        finished: list[object] = []
        requests = [driver.submit(0, [b"x"], [12], on_done=finished.append) for _ in range(5)]
        bad.hang_up()
        with pytest.raises(PeerDisconnected):
            requests[0].wait()
        assert finished == requests
        assert all(isinstance(each.error, PeerDisconnected) for each in requests)
        registers = registers_of(driver)
        driver.loop.run_pending()
        assert lost == [registers.lost] == registers.errors
        with pytest.raises(PeerDisconnected):
            driver.submit_number(1)
        with pytest.raises(PeerDisconnected):
            registers.read_config(0, 4)
        # A reset has nobody to wait for, and what was lost gives its memory back.
        driver.reset()
        assert driver.arena.used == 0
        with pytest.raises(PeerDisconnected):
            driver.initialize()
        registers.close()


def test_a_back_end_that_leaves_and_comes_back_is_initialized_anew(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        request = driver.submit_number(1)
        registers = registers_of(driver)
        bad.hang_up()
        # Nobody has run the loop yet: the driver learns of it here, not by a ring that will never move.
        assert registers.reconnect() is False
        assert isinstance(request.error, PeerDisconnected)
        bad.seen.clear()
        driver.initialize()
        assert driver.live
        assert {"ADD_MEM_REG", "SET_VRING_KICK", "GET_INFLIGHT_FD"} <= set(bad.names())
        driver.detach()
        registers.close()


def test_nobody_there_when_reconnecting(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        bad.hang_up()
        assert driver.loop.run(until=lambda: driver.broken is not None, timeout=5.0)
    (tmp_path / "s").unlink()
    with pytest.raises(PeerDisconnected, match="no back-end at"):
        registers.reconnect()
    assert registers.lost is not None
    registers.close()


@pytest.mark.parametrize(
    ("data", "lost"),
    [
        (encode(BackendRequest.IOTLB_MSG, Iotlb(0, 0, 0, 0, 1), need_reply=True), None),
        (encode(BackendRequest.VRING_CALL, VringState(0), need_reply=True), None),
        (struct.pack("=III", 77, 0x9, 0), None),
        (struct.pack("=III", 2, 0x2, 0), "BadVersion"),
        (struct.pack("=III", 2, 0x5, 0), "ReplyFlag"),
        (struct.pack("=III", 2, 0x1, 99999), "MessageTooLong"),
        (struct.pack("=III", 2, 0x1, 8) + bytes(8), "PayloadSize"),
    ],
)
def test_requests_of_the_back_end_are_judged(tmp_path: Path, data: bytes, lost: str | None) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        assert bad.channel is not None
        bad.channel.send(data)
        assert driver.loop.run(until=lambda: bool(registers.errors), timeout=5.0)
        (error,) = registers.errors
        assert isinstance(error, MessageError)
        if lost is None:
            assert error.rule == "NotNegotiated"
            bad.channel.settimeout(5.0)
            assert struct.unpack("=IIIQ", bad.channel.recv(64))[1:] == (5, 8, 1)
            assert driver.live
            driver.detach()
        else:
            assert error.rule == lost
            assert registers.lost is error
        registers.close()


def test_configuration_changes_are_told_and_a_flood_of_them_starves_nobody(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        told: list[int] = []
        driver = up(bad.path)
        registers = registers_of(driver)
        driver.config_changed = lambda: told.append(registers.config_generation())
        assert bad.channel is not None
        bad.channel.sendall(encode(BackendRequest.CONFIG_CHANGE_MSG) * 1000)
        ticks: list[int] = []
        driver.loop.call_soon(lambda: ticks.append(1))
        assert driver.loop.run(until=lambda: registers.config_generation() == 1000, timeout=5.0)
        driver.loop.run_pending()
        assert 2 <= len(told) < 100, "many changes at once are one, but the loop turns between"
        assert ticks
        driver.detach()
        registers.close()


def test_a_channel_whose_answers_nobody_reads(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        assert bad.channel is not None
        bad.channel.settimeout(0.0)
        message = encode(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True)

        def more() -> bool:
            assert bad.channel is not None
            try:
                for _ in range(50):
                    bad.channel.send(message)
            except OSError:
                pass
            return bool(registers.errors)

        assert driver.loop.run(until=more, timeout=20.0)
        assert [getattr(error, "rule", "") for error in registers.errors] == ["RepliesUnread"]
        registers.close()


def test_a_closed_channel_ends_only_the_channel(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        assert bad.channel is not None
        bad.channel.close()
        driver.loop.run(until=lambda: registers.front.channel is None, timeout=5.0)
        assert registers.front.channel is None
        assert driver.live
        assert registers.errors == []
        driver.detach()
        registers.close()


# --- what is not offered, and what we ask wrongly ---------------------------------------------------------------


@pytest.mark.parametrize("left_out", [*PROTOCOL, ~ProtocolFeature(0)], ids=str)
def test_what_is_not_offered_is_done_without(tmp_path: Path, left_out: ProtocolFeature) -> None:
    needs = {
        ProtocolFeature.MQ: "GET_QUEUE_NUM",
        ProtocolFeature.BACKEND_REQ: "SET_BACKEND_REQ_FD",
        ProtocolFeature.INFLIGHT_SHMFD: "GET_INFLIGHT_FD",
        ProtocolFeature.RESET_DEVICE: "RESET_DEVICE",
        ProtocolFeature.CONFIGURE_MEM_SLOTS: "ADD_MEM_REG",
        ProtocolFeature.STATUS: "SET_STATUS",
    }
    with peer(tmp_path / "s", protocol=PROTOCOL & ~left_out) as less:
        if ProtocolFeature.CONFIG in left_out:
            with pytest.raises(StatusViolation, match="of a space of 0"):
                life(less.path)
            assert "GET_CONFIG" not in less.names()
        else:
            assert life(less.path) == []
            assert needs.get(left_out) not in less.names()
            assert ("SET_MEM_TABLE" in less.names()) == (left_out is ProtocolFeature.CONFIGURE_MEM_SLOTS)


def test_a_back_end_without_protocol_features_has_its_rings_enabled_at_once(tmp_path: Path) -> None:
    with peer(tmp_path / "s", features=1 << 32) as old:
        with VhostUserRegisters(old.path, device_id=4, timeout=TIMEOUT) as registers:
            assert registers.protocol == ProtocolFeature(0)
            assert registers.queue_max_sizes() == [128]
            assert registers.config_size() == 0
            from virtio_test.driver.base import Driver

            driver = Driver(registers, timeout=TIMEOUT)
            driver.initialize()
            assert driver.live
            driver.detach()
        assert not {"GET_PROTOCOL_FEATURES", "SET_VRING_ENABLE", "SET_STATUS"} & set(old.names())
        assert {"SET_MEM_TABLE", "GET_VRING_BASE"} <= set(old.names())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"queues": 0}, "counts them from 1 to 256"),
        ({"queues": 257}, "counts them from 1 to 256"),
        ({"queues": 2}, "2 queues are wanted, and the back-end has 1"),
        ({"queue_size": 0}, "1 to 32768"),
        ({"queue_size": 1 << 16}, "1 to 32768"),
    ],
)
def test_impossible_queues_are_our_own_mistake(tmp_path: Path, options: dict[str, int], match: str) -> None:
    with peer(tmp_path / "s") as good, pytest.raises(InvalidArgument, match=match):
        VhostUserRegisters(good.path, device_id=45, timeout=TIMEOUT, **options)  # type: ignore[arg-type]


def test_sending_what_no_driver_would_is_as_easy_as_before(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as good, VhostUserRegisters(good.path, device_id=45, timeout=TIMEOUT) as registers:
        registers.front.send(R.SET_VRING_NUM, VringState(200, 3), need_reply=True)
        assert registers.front.receive().request is R.SET_VRING_NUM
        registers.front.send_bytes(b"\0" * 5)


# --- an IOTLB ---------------------------------------------------------------------------------------------------


@pytest.mark.row("M17")
def test_a_back_end_that_asks_for_what_the_iommu_has_not(tmp_path: Path) -> None:
    """It gets no translation of what is not there, and one that does more than ask is not listened to any longer."""
    offered = FEATURES | 1 << 33
    with peer(tmp_path / "s", features=offered, answers={R.IOTLB_MSG: U64(0)}) as bad:
        driver = up(bad.path, iommu=True, wanted=FeatureSet("VERSION_1", "ACCESS_PLATFORM"))
        registers = registers_of(driver)
        assert "ACCESS_PLATFORM" in driver.features

        def ask(entry: Iotlb) -> int:
            assert bad.channel is not None
            bad.channel.settimeout(0.0)
            bad.channel.sendall(encode(BackendRequest.IOTLB_MSG, entry, need_reply=True))
            found = list[bytes]()

            def answered() -> bool:
                assert bad.channel is not None
                with suppress(BlockingIOError):
                    found.append(bad.channel.recv(64))
                return bool(found)

            assert driver.loop.run(until=answered, timeout=5.0)
            return int(struct.unpack("=IIIQ", found[0])[3])

        page = 0x3000
        assert ask(Iotlb(page + 5, 0, 0, 1, 1)) == 0
        (update,) = [each.payload for each in bad.seen if each.request is R.IOTLB_MSG]
        assert isinstance(update, Iotlb)
        assert (update.iova, update.size, update.permissions, update.type) == (page, 4096, 1, 2)
        for wrong in (Iotlb(1 << 40, 0, 0, 1, 1), Iotlb((1 << 64) - 1, 0, 0, 3, 1), Iotlb(page, 0, 0, 0, 1)):
            assert ask(wrong) == 1
        assert ask(Iotlb(page, 0, 0, 0xFF, 1)) == 1
        assert len([each for each in bad.seen if each.request is R.IOTLB_MSG]) == 1
        assert bad.channel is not None
        bad.channel.sendall(encode(BackendRequest.IOTLB_MSG, Iotlb(0, 4096, 0, 3, 2)))
        assert driver.loop.run(until=lambda: registers.lost is not None, timeout=5.0)
        assert isinstance(registers.lost, MessageError)
        assert registers.lost.rule == "IotlbType"
        registers.close()


# --- for ever ---------------------------------------------------------------------------------------------------


def test_rules_broken_for_ever_are_kept_and_logged_up_to_a_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        assert bad.channel is not None
        wrong = encode(BackendRequest.VRING_CALL, VringState(0))
        sent = 0

        def enough() -> bool:
            nonlocal sent
            assert bad.channel is not None
            bad.channel.sendall(wrong * 64)
            sent += 64
            return sent >= MAX_ERRORS + 1000

        assert driver.loop.run(until=enough, timeout=20.0)
        driver.loop.run_pending()
        assert len(registers.errors) == MAX_ERRORS
        assert len(caplog.records) == MAX_ERRORS
        # The end of the connection is told all the same.
        bad.hang_up()
        assert driver.loop.run(until=lambda: driver.broken is not None, timeout=5.0)
        assert isinstance(registers.lost, PeerDisconnected)
        assert len(registers.errors) == MAX_ERRORS
        registers.close()


def test_a_queue_that_is_given_up_for_ever_is_so_up_to_a_number(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as bad:
        driver = up(bad.path)
        registers = registers_of(driver)
        count = 0

        def enough() -> bool:
            nonlocal count
            os.eventfd_write(bad.fds[R.SET_VRING_ERR, 0], 1)
            count += 1
            return count > MAX_ERRORS + 100

        assert driver.loop.run(until=enough, timeout=20.0)
        driver.loop.run_pending()
        assert len(registers.errors) == MAX_ERRORS
        registers.close()


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_a_refused_region_is_closed_while_its_error_is_kept(tmp_path: Path, size: int) -> None:
    with peer(tmp_path / "s", answers={R.GET_INFLIGHT_FD: Inflight(size, 0, 1, 128)}) as bad:
        registers = VhostUserRegisters(bad.path, device_id=45, timeout=TIMEOUT)
        kept: list[Exception] = []
        for _ in range(4):
            driver = TestDriver(registers, console=lambda _: None, timeout=TIMEOUT)
            with pytest.raises(MessageError) as caught:
                driver.initialize()
            kept.append(caught.value)
            if registers.lost is not None:
                assert registers.reconnect() is False
            assert eventually(lambda: len(regions_here()) == 0), regions_here()
        assert len(kept) == 4
        registers.close()


def regions_here() -> list[str]:
    """The regions of a peer that are open here; the peer, in this process, closes its own when they are sent."""
    found: list[str] = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(each.readlink()))
    return [each for each in found if each.startswith("/memfd:peer")]

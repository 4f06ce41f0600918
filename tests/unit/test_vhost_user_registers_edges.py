"""Where what a front-end takes of its back-end begins and ends, and what it asks of one that has gone or knows less."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory, QueueConfig, RingLayout
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected, PeerError, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.status import Status
from virtio_test.transport.vhost_user.codec import Decoder, Message, encode, encode_reply
from virtio_test.transport.vhost_user.messages import (
    BACKEND_REQUESTS,
    BackendRequest,
    IotlbType,
    Permission,
    ProtocolFeature,
    Request,
)
from virtio_test.transport.vhost_user.payloads import (
    MAX_TABLE_REGIONS,
    U64,
    Config,
    Inflight,
    Iotlb,
    Payload,
    VringState,
)
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .vhost_user_peer import FEATURES, PROTOCOL, Peer, peer
from .world import PATIENCE, eventually, open_fds

F, R, S = ProtocolFeature, Request, Status
SIZE = 8
UP = int(S.ACKNOWLEDGE | S.DRIVER)
READY = UP | int(S.FEATURES_OK)
LIVE = READY | int(S.DRIVER_OK)
PACKED = 1 << 34
WITHOUT_SLOTS = PROTOCOL & ~F.CONFIGURE_MEM_SLOTS


@pytest.fixture(autouse=True)
def nothing_leaks(caplog: pytest.LogCaptureFixture) -> object:
    before = open_fds()
    yield
    caplog.get_records("call").clear()
    assert eventually(lambda: open_fds() == before), f"{open_fds()} fds are open, {before} were"


def to(back: Peer, **options: object) -> VhostUserRegisters:
    return VhostUserRegisters(back.path, device_id=45, timeout=PATIENCE, **options)  # type: ignore[arg-type]


def config(index: int = 0, *, packed: bool = False) -> QueueConfig:
    layout = RingLayout.contiguous(SIZE, 0x1000 * (index + 1), packed=packed)
    features = FeatureSet("VERSION_1", *(["RING_PACKED"] if packed else []))
    return QueueConfig.from_layout(layout, index=index, features=features.bits)


def up(registers: VhostUserRegisters, *queues: QueueConfig, features: int = 1 << 32) -> None:
    """Everything that a driver does until its device is live."""
    registers.write_status(0)
    registers.write_status(UP)
    registers.write_driver_features(features)
    registers.write_status(READY)
    for each in queues:
        registers.enable_queue(each)
    registers.write_status(LIVE)


def memory_of(regions: int) -> GuestMemory:
    """Regions that do not adjoin."""
    return GuestMemory([(number << 20, 1 << 16) for number in range(regions)])


# --- how many ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "wanted", "taken"), [(256, None, 256), (1, None, 1), (2, 2, 2), (2, 1, 1), (256, 256, 256), (2, 3, 0)]
)
def test_as_many_queues_as_there_are(tmp_path: Path, there: int, wanted: int | None, taken: int) -> None:
    with peer(tmp_path / "s", answers={R.GET_QUEUE_NUM: U64(there)}) as back:
        if taken:
            with to(back, queues=wanted) as registers:
                assert len(registers.queue_max_sizes()) == taken
        else:
            with pytest.raises(InvalidArgument, match="3 queues are wanted, and the back-end has 2"):
                to(back, queues=wanted)


@pytest.mark.parametrize(("slots", "enough"), [(1, False), (2, True)])
def test_as_many_regions_as_there_are_slots(tmp_path: Path, slots: int, *, enough: bool) -> None:
    with peer(tmp_path / "s", answers={R.GET_MAX_MEM_SLOTS: U64(slots)}) as back:
        with to(back, memory=memory_of(2)) as registers:
            if enough:
                registers.share_memory()
            else:
                with pytest.raises(MessageError, match="RegionSlots"):
                    registers.share_memory()
        assert back.names().count("ADD_MEM_REG") == (2 if enough else 0)


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_regions_as_a_table_holds(tmp_path: Path, more: int) -> None:
    with peer(tmp_path / "s", protocol=WITHOUT_SLOTS) as back:
        with to(back, memory=memory_of(MAX_TABLE_REGIONS + more)) as registers:
            if more:
                with pytest.raises(StateError, match="a table holds"):
                    registers.share_memory()
            else:
                registers.share_memory()
        assert back.names().count("SET_MEM_TABLE") == 1 - more


def test_only_what_has_changed_of_the_memory_is_told(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back, memory=memory_of(2)) as registers:
        registers.share_memory()
        before = back.names()
        registers.share_memory()
        assert back.names() == before
        registers.memory.remove_region(1 << 20, 1 << 16)
        registers.share_memory()
        assert back.names()[len(before) :] == ["GET_MAX_MEM_SLOTS", "REM_MEM_REG"]


# --- rings ------------------------------------------------------------------------------------------------------


def test_nothing_is_recorded_for_a_driver_without_queues(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        up(registers)
        assert registers.inflight is None
        assert "GET_INFLIGHT_FD" not in back.names()


def test_a_queue_that_does_not_run_is_not_stopped(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        registers.enable_queue(config())
        registers.reset_queue(0)
        registers.enable_queue(config())
        assert not {"GET_VRING_BASE", "SET_VRING_ENABLE"} & set(back.names())


def test_a_queue_is_enabled_once_and_reset_when_it_is(tmp_path: Path) -> None:
    with peer(tmp_path / "s", protocol=PROTOCOL & ~F.INFLIGHT_SHMFD) as back, to(back) as registers:
        with pytest.raises(InvalidArgument, match="queue 0 is not enabled"):
            registers.reset_queue(0)
        up(registers, config())
        with pytest.raises(StateError, match="queue 0 is enabled already"):
            registers.enable_queue(config())
        assert "GET_INFLIGHT_FD" not in back.names()
        assert registers.inflight is None


@pytest.mark.parametrize(
    ("packed", "base", "legal"),
    [
        (False, 0xFFFF, True),
        (False, 0x1_0000, False),
        (True, SIZE - 1 | SIZE - 1 << 16, True),
        (True, 0x8000 | SIZE - 1 | 0x8000_0000, True),
        (True, SIZE, False),
        (True, SIZE << 16, False),
        (True, 0x8000 | SIZE, False),
        (True, 0x8000_0000 | SIZE << 16, False),
    ],
)
def test_where_a_ring_can_have_stopped(tmp_path: Path, base: int, *, packed: bool, legal: bool) -> None:
    answers = {R.GET_VRING_BASE: VringState(0, base)}
    with peer(tmp_path / "s", answers=answers, features=FEATURES | PACKED) as back, to(back) as registers:
        up(registers, config(packed=packed), features=1 << 32 | (PACKED if packed else 0))
        if legal:
            registers.reset_queue(0)
        else:
            with pytest.raises(MessageError, match="VringBase") as caught:
                registers.reset_queue(0)
            assert caught.value.queue == 0


# --- the status -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0x40, 0xFF])
def test_the_status_is_the_back_ends(tmp_path: Path, status: int) -> None:
    """Before the driver has written one, too."""
    with peer(tmp_path / "s", answers={R.GET_STATUS: U64(status)}) as back, to(back) as registers:
        assert registers.read_status() == status


def test_who_gives_up_sets_nothing_up(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        registers.write_status(UP)
        registers.write_status(LIVE | S.FAILED)
        assert not {"SET_FEATURES", "SET_MEM_TABLE", "ADD_MEM_REG"} & set(back.names())
        assert back.names()[-1] == "SET_STATUS"
        assert back.status & S.FAILED


def test_without_a_connection_only_resets_and_giving_up_have_an_effect(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        registers.write_status(UP)
        back.hang_up()
        assert registers.loop.run(until=lambda: registers.lost is not None, timeout=PATIENCE)
        lost = registers.lost
        assert isinstance(lost, PeerDisconnected)
        for ask in (
            registers.read_status,
            registers.device_features,
            lambda: registers.write_status(READY),
            lambda: registers.invalidate(0, 4096),
        ):
            with pytest.raises(PeerDisconnected) as caught:
                ask()
            assert caught.value is lost
        registers.write_status(UP | S.FAILED)
        registers.write_status(0)
        assert registers.read_status() == 0
        with pytest.raises(PeerDisconnected):
            registers.device_features()
        lost.__traceback__ = None
        del lost, caught


# --- another back-end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 2])
def test_a_new_back_end_has_the_queues_that_are_in_use(tmp_path: Path, queues: int) -> None:
    two = {R.GET_QUEUE_NUM: U64(2)}
    with (
        peer(tmp_path / "one", answers=two) as one,
        peer(tmp_path / "other", answers={R.GET_QUEUE_NUM: U64(queues)}) as other,
        to(one, keep_in_flight=True) as registers,
    ):
        up(registers, config(1))
        if queues == 2:
            assert registers.reconnect(other.path)
        else:
            with pytest.raises(PeerError, match="has 1 queues, and queue 1 is in use"):
                registers.reconnect(other.path)


def test_a_path_or_a_connection_to_go_on_with(tmp_path: Path) -> None:
    def connection(back: Peer) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(back.path))
        return made

    with (
        peer(tmp_path / "one") as one,
        peer(tmp_path / "other") as other,
        VhostUserRegisters(connection=connection(one), device_id=45, timeout=PATIENCE) as registers,
    ):
        with pytest.raises(StateError, match="no path to connect to"):
            registers.reconnect()
        assert registers.lost is None
        assert not registers.reconnect(connection=connection(other))
        with pytest.raises(StateError, match="no path to connect to"):
            registers.reconnect()
        assert not registers.reconnect(one.path)
        assert not registers.reconnect()
        assert registers.read_status() == 0


# --- what a back-end asks for -----------------------------------------------------------------------------------


def sent(back: Peer, *messages: bytes) -> None:
    """The back-end says so over its channel."""
    assert back.channel is not None
    for each in messages:
        back.channel.send(each)


def replies(back: Peer, count: int) -> Sequence[int]:
    """The numbers that the next `count` of its requests were answered with."""
    assert back.channel is not None
    back.channel.settimeout(PATIENCE)
    decoder, found = Decoder(BACKEND_REQUESTS, replies=True), list[int]()
    while len(found) < count:
        for message in decoder.feed(back.channel.recv(decoder.wanted)):
            assert isinstance(message.payload, U64)
            found.append(message.payload.value)
    return found


@pytest.mark.parametrize("iommu", [False, True])
@pytest.mark.parametrize("request_", [BackendRequest.CONFIG_CHANGE_MSG, BackendRequest.VRING_CALL])
def test_what_was_not_negotiated_is_not_asked_for(tmp_path: Path, request_: BackendRequest, *, iommu: bool) -> None:
    platform = 1 << 33 if iommu else 0
    with (
        peer(tmp_path / "s", protocol=PROTOCOL & ~F.CONFIG, features=FEATURES | platform) as back,
        to(back, iommu=iommu) as registers,
    ):
        changes: list[None] = []
        registers.listen(call=lambda _: None, config_changed=lambda: changes.append(None))
        registers.write_driver_features(1 << 32 | platform)
        registers.write_status(READY)
        assert registers.front.translated == iommu
        payload = VringState(0) if request_ is BackendRequest.VRING_CALL else None
        sent(back, encode(request_, payload, need_reply=True))
        assert registers.loop.run(until=lambda: bool(registers.errors), timeout=PATIENCE)
        registers.loop.run_pending()
        assert [getattr(each, "rule", "") for each in registers.errors] == ["NotNegotiated"]
        assert replies(back, 1) == [1]
        assert (changes, registers.lost) == ([], None)


def test_what_was_asked_before_the_channel_was_closed_is_heard(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        sent(back, encode(BackendRequest.CONFIG_CHANGE_MSG), encode(BackendRequest.CONFIG_CHANGE_MSG))
        assert back.channel is not None
        back.channel.close()
        heard = registers.front.backend_requests(timeout=PATIENCE)
        assert [each.request for each in heard] == [BackendRequest.CONFIG_CHANGE_MSG] * 2
        with pytest.raises(PeerDisconnected):
            registers.front.backend_requests()


@pytest.mark.parametrize(("less", "why"), [("features", "does not offer"), ("record", "keeps no record")])
def test_a_new_back_end_has_what_is_in_use(tmp_path: Path, less: str, why: str) -> None:
    features = FEATURES & ~(1 << 28) if less == "features" else FEATURES
    protocol = PROTOCOL & ~F.INFLIGHT_SHMFD if less == "record" else PROTOCOL
    with (
        peer(tmp_path / "one") as one,
        peer(tmp_path / "other", features=features, protocol=protocol) as other,
        to(one, keep_in_flight=True) as registers,
    ):
        up(registers, config(), features=1 << 32 | 1 << 28)
        with pytest.raises(PeerError, match=why):
            registers.reconnect(other.path)
        assert "SET_FEATURES" not in other.names()


def test_there_is_no_log_where_none_can_be(tmp_path: Path) -> None:
    with peer(tmp_path / "s") as back, to(back) as registers:
        with pytest.raises(StateError, match="keeps no dirty log"):
            registers.start_log()
        with pytest.raises(StateError, match="there is no dirty log"):
            registers.dirty_pages()


@pytest.mark.parametrize("wide", [False, True])
def test_a_network_device_without_a_configuration_space(tmp_path: Path, *, wide: bool) -> None:
    protocol = PROTOCOL if wide else PROTOCOL & ~F.CONFIG
    with (
        peer(tmp_path / "s", protocol=protocol, features=FEATURES | 1 << 22) as back,
        VhostUserRegisters(back.path, device_id=1, timeout=PATIENCE) as registers,
    ):
        assert registers.device_features() & 1 << 32
        assert ("GET_CONFIG" in back.names()) == wide


def test_a_page_that_there_is_none_of_is_refused(tmp_path: Path) -> None:
    with (
        peer(tmp_path / "s", features=FEATURES | 1 << 33, answers={R.IOTLB_MSG: U64(0)}) as back,
        to(back, iommu=True, memory=GuestMemory([(0, 1 << 16)])) as registers,
    ):
        registers.write_driver_features(1 << 32 | 1 << 33)
        registers.write_status(READY)
        for address, permissions in ((0, 3), (1 << 16, 3), (0, 0), (0, 4)):
            miss = Iotlb(address, 4096, 0, permissions, int(IotlbType.MISS))
            sent(back, encode(BackendRequest.IOTLB_MSG, miss, need_reply=True))
        found = list[int]()

        def answered() -> bool:
            while waiting(back):
                found.extend(replies(back, 1))
            return len(found) == 4

        assert registers.loop.run(until=answered, timeout=PATIENCE)
        assert found == [0, 1, 1, 1]


def waiting(back: Peer) -> bool:
    assert back.channel is not None
    return bool(select.select([back.channel], [], [], 0.001)[0])


ANSWERS: list[tuple[Request, Payload | None, str]] = [
    (R.GET_STATUS, U64(0x100), "StatusValue"),
    (R.GET_VRING_BASE, VringState(1, 0), "UnexpectedReply"),
    (R.GET_CONFIG, None, "Refused"),
    (R.GET_CONFIG, Config(0, 3, 0, b"abc"), "ConfigSize"),
    (R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128), "Refused"),
    (R.SET_STATUS, U64(1), "Refused"),
    (R.IOTLB_MSG, U64(1), "Refused"),
]


@pytest.mark.parametrize(("request_", "reply", "rule"), ANSWERS)
def test_each_answer_is_judged(tmp_path: Path, request_: Request, reply: Payload | None, rule: str) -> None:
    with peer(tmp_path / "s", answers={request_: reply}) as back, to(back) as registers:
        front = registers.front
        ask: dict[Request, Callable[[], object]] = {
            R.GET_STATUS: registers.read_status,
            R.GET_VRING_BASE: lambda: front.get_base(0),
            R.GET_CONFIG: lambda: front.get_config(0, 4),
            R.GET_INFLIGHT_FD: lambda: front.get_inflight(1, 128, packed=False),
            R.SET_STATUS: lambda: front.set_status(1),
            R.IOTLB_MSG: lambda: front.update_iotlb(0, 4096, 0, Permission.READ),
        }
        with pytest.raises(MessageError) as caught:
            ask[request_]()
        assert caught.value.rule == rule


def test_a_region_comes_with_its_file(tmp_path: Path) -> None:
    def without(back: Peer, _: Message, good: bytes) -> None:
        assert back.connection is not None
        back.connection.send(good)

    with (
        peer(tmp_path / "s", faults={R.GET_INFLIGHT_FD: without}) as back,
        to(back) as registers,
        pytest.raises(MessageError, match="Refused"),
    ):
        registers.front.get_inflight(1, 128, packed=False)


def test_an_answer_to_something_else_is_none(tmp_path: Path) -> None:
    def other(back: Peer, _: Message, __: bytes) -> None:
        assert back.connection is not None
        back.connection.send(encode_reply(R.GET_QUEUE_NUM, U64(1)))

    with (
        peer(tmp_path / "s", faults={R.GET_STATUS: other}) as back,
        to(back) as registers,
        pytest.raises(MessageError, match="UnexpectedReply"),
    ):
        registers.read_status()


def test_a_back_end_that_knows_no_protocol_features_is_asked_for_none(tmp_path: Path) -> None:
    with peer(tmp_path / "s", features=1 << 32) as back, to(back) as registers:
        up(registers, config())
        registers.reset_queue(0)
        assert not {"GET_PROTOCOL_FEATURES", "SET_VRING_ENABLE"} & set(back.names())

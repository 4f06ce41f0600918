"""Where what a session takes begins and ends, message by message: each number, and the next one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.errors import MessageError
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.frontend import USER_OFFSET
from virtio_test.transport.vhost_user.memory import SharedMemory
from virtio_test.transport.vhost_user.messages import VRING_LOG, ProtocolFeature
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    SingleRegion,
    VringAddress,
    VringState,
)
from virtio_test.transport.vhost_user.rings import Ring, checked_notifier

from .vhost_user_pair import MEMORY_BYTES, SIZE, Counting, Pair, R, answer, file, misses, pair

END = 1 << 64
PAGE = 4096
F = ProtocolFeature


@pytest.fixture
def p() -> Iterator[Pair]:
    with pair() as made:
        yield made


# --- what is served, and when ----------------------------------------------------------------------------------


def test_what_is_known_and_not_served_is_refused_as_such(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with file(PAGE) as fd:
        assert p.told(R.GPU_SET_SOCKET, fds=[fd.fileno()]) == 1
    assert "GPU_SET_SOCKET is not served here" in caplog.text


def test_a_ring_may_be_set_up_before_the_features(p: Pair) -> None:
    p.do(R.SET_VRING_NUM, VringState(0, SIZE))
    p.do(R.SET_VRING_BASE, VringState(0, 0))
    assert not p.session.rings.packed
    p.live()


@pytest.mark.row("M04")
@pytest.mark.parametrize("protocol_bit", [True, False])
def test_other_features_while_rings_run(p: Pair, caplog: pytest.LogCaptureFixture, *, protocol_bit: bool) -> None:
    """Who can stop a ring has to; who cannot begins anew with them."""
    p.live(protocol_bit=protocol_bit)
    other = FeatureSet("VERSION_1", "EVENT_IDX").bits | (1 << 30 if protocol_bit else 0)
    assert p.told(R.SET_FEATURES, U64(other)) == int(protocol_bit)
    assert ("FeaturesWhileRunning" in caplog.text) == protocol_bit
    assert p.rings[0].running == protocol_bit


def test_an_in_band_kick_carries_nothing(p: Pair) -> None:
    p.protocol(int(F.INBAND_NOTIFICATIONS | F.BACKEND_REQ | F.REPLY_ACK))
    assert p.told(R.VRING_KICK, VringState(0, 1)) == 1
    assert not p.rings[0].started
    p.do(R.VRING_KICK, VringState(0, 0))
    assert p.rings[0].started


@pytest.mark.row("R11")
def test_a_region_for_what_is_in_flight_comes_before_rings_run(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    p.protocol(int(F.INFLIGHT_SHMFD))
    p.live()
    with file(PAGE) as fd:
        assert p.told(R.SET_INFLIGHT_FD, Inflight(PAGE, 0, 1, SIZE), [fd.fileno()]) == 1
    assert "InflightWhileRunning" in caplog.text
    assert p.session.rings.records is None


# --- the addresses of a ring -----------------------------------------------------------------------------------


@pytest.mark.row("M09")
@pytest.mark.parametrize(
    ("packed", "area", "off"),
    [
        (False, "descriptor", 8),
        (False, "available", 1),
        (False, "used", 2),
        (True, "descriptor", 8),
        (True, "available", 2),
        (True, "used", 2),
    ],
)
def test_an_area_lies_as_its_kind_has_to(
    p: Pair, caplog: pytest.LogCaptureFixture, area: str, off: int, *, packed: bool
) -> None:
    p.features(*(["RING_PACKED"] if packed else []))
    p.share()
    p.do(R.SET_VRING_NUM, VringState(0, SIZE))
    places = {"descriptor": 0x1000, "available": 0x2000, "used": 0x3000}
    good = {name: at + USER_OFFSET for name, at in places.items()}
    p.do(R.SET_VRING_ADDR, VringAddress(0, 0, **good))
    if not packed:
        p.do(R.SET_VRING_ADDR, VringAddress(0, 0, **{**good, "available": good["available"] + 2}))
    assert p.told(R.SET_VRING_ADDR, VringAddress(0, 0, **{**good, area: good[area] + off})) == 1
    assert f"{area} address {good[area] + off:#x} is not" in caplog.text


@pytest.mark.row("M09")
@pytest.mark.parametrize("area", ["desc", "driver", "device"])
def test_an_area_may_end_where_addresses_do(p: Pair, area: str) -> None:
    top = END - PAGE
    p.features("RING_PACKED")
    p.share((0, 0, PAGE), (PAGE, top, PAGE))
    p.do(R.SET_VRING_NUM, VringState(0, SIZE))
    places = {"desc": 0, "driver": 0x400, "device": 0x800}
    places[area] = END - (16 * SIZE if area == "desc" else 4)
    p.do(R.SET_VRING_ADDR, VringAddress(0, 0, places["desc"], places["device"], places["driver"]))
    address = p.rings[0].address
    assert address is not None
    assert (address.descriptor, address.available, address.used) == tuple(places.values())


@pytest.mark.row("M09")
@pytest.mark.parametrize("area", ["desc", "driver", "device"])
def test_every_area_of_a_ring_is_shared(p: Pair, area: str) -> None:
    p.features("RING_PACKED")
    p.share((0, USER_OFFSET, PAGE))
    places = {"desc": 0, "driver": 0x400, "device": 0x800}

    def layout() -> RingLayout:
        return RingLayout(SIZE, packed=True, **{name: at + USER_OFFSET for name, at in places.items()})

    assert p.session.rings.translate(layout()) is not None
    places[area] += 2 * PAGE
    assert p.session.rings.translate(layout()) is None


@pytest.mark.row("M09")
def test_a_used_ring_may_be_logged_up_to_where_addresses_end(p: Pair, caplog: pytest.LogCaptureFixture) -> None:
    p.protocol(int(F.LOG_SHMFD))
    p.features("RING_PACKED")
    p.share()
    p.do(R.SET_VRING_NUM, VringState(0, SIZE))
    layout = RingLayout.contiguous(SIZE, 0x1000, packed=True)
    log = END - layout.device_bytes
    p.do(R.SET_VRING_ADDR, p.address(layout, flags=VRING_LOG, log=log))
    assert p.told(R.SET_VRING_ADDR, p.address(layout, flags=VRING_LOG, log=log + 1)) == 1
    assert "LogRange" in caplog.text


# --- memory and its log ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [False, True])
def test_memory_beyond_the_log_while_rings_run(p: Pair, *, on: bool) -> None:
    """A log that nothing is marked in does not hold the front-end up: it is forgotten."""
    p.protocol(int(F.LOG_SHMFD | F.CONFIGURE_MEM_SLOTS))
    p.live()
    if on:
        p.do(R.SET_FEATURES, U64(FeatureSet("VERSION_1").bits | 1 << 30 | 1 << 26))
    log_bytes = MEMORY_BYTES // PAGE // 8
    with file(2 * PAGE) as fd:
        p.do(R.SET_LOG_BASE, Log(log_bytes, 0), [fd.fileno()])
        beyond = SingleRegion(MEMORY_BYTES, PAGE, USER_OFFSET + MEMORY_BYTES, 0)
        assert p.told(R.ADD_MEM_REG, beyond, [fd.fileno()]) == int(on)
    assert (p.session.rings.marking.log is None) == (not on)
    assert p.rings[0].running


@pytest.mark.row("M05")
def test_a_region_may_end_where_addresses_do() -> None:
    with file(PAGE) as fd:
        memory = SharedMemory(GuestMemory())
        memory.check_table([MemoryRegion(END - PAGE, PAGE, END - PAGE, 0)], [fd])
        for guest, user in ((END - PAGE + 1, 0), (0, END - PAGE + 1)):
            with pytest.raises(MessageError, match="RegionWrap"):
                memory.check_table([MemoryRegion(guest, PAGE, user, 0)], [fd])


def test_a_range_goes_on_in_the_next_region_in_both_address_spaces() -> None:
    memory = SharedMemory(GuestMemory())
    first = MemoryRegion(0x10000, PAGE, 0, 0)
    for guest, found in ((0x10000 + PAGE, 0x10000 + PAGE - 8), (0x20000, None)):
        regions = (first, MemoryRegion(guest, PAGE, PAGE, 0))
        assert memory.guest_address(PAGE - 8, 16, regions) == found
        assert memory.guest_address(PAGE - 8, 8, regions) == 0x10000 + PAGE - 8
        assert memory.guest_address(2 * PAGE - 8, 16, regions) is None


# --- rings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", ["started", "enabled", "broken", "address", "nothing"])
def test_a_ring_is_wanted_when_messages_have_said_all(lacks: str) -> None:
    ring = Ring(0)
    ring.started = lacks != "started"
    ring.enabled = lacks != "enabled"
    ring.broken = ValueError("broken") if lacks == "broken" else None
    ring.address = None if lacks == "address" else VringAddress(0, 0, 0, 0, 0)
    assert ring.wanted == (lacks == "nothing")


def test_nobody_is_woken_by_a_file() -> None:
    with file(PAGE) as fd, pytest.raises(MessageError, match="the fd is") as caught:
        checked_notifier(fd, 3)
    assert (caught.value.rule, caught.value.queue) == ("FdType", 3)


def test_a_ring_with_nothing_more_to_do_is_let_be(p: Pair) -> None:
    queue = p.live()
    token = p.post(queue)
    p.settle()
    assert queue.get_used() == (token, 5)
    assert p.memory.read(0x9000, 5) == b"HELLO"


# --- fds of other connections ----------------------------------------------------------------------------------


def test_a_call_by_a_socket_of_somebody_else(p: Pair, tmp_path: Path) -> None:
    """Only those of this server are refused: not one without a name, and not one of another server."""
    ours, theirs = socket.socketpair()
    listener, caller = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with ours, theirs, listener, caller:
        p.do(R.SET_VRING_CALL, U64(0), [theirs.fileno()])
        listener.bind(str(tmp_path / "other"))
        listener.listen(1)
        caller.connect(str(tmp_path / "other"))
        p.do(R.SET_VRING_CALL, U64(0), [caller.fileno()])


# --- rings behind an IOMMU -------------------------------------------------------------------------------------


@pytest.fixture
def behind() -> Iterator[Pair]:
    device = Counting()
    with pair(device, features=device.features | FeatureSet("ACCESS_PLATFORM")) as made:
        made.protocol(int(F.BACKEND_REQ | F.REPLY_ACK))
        made.features("ACCESS_PLATFORM")
        made.share()
        yield made


@pytest.mark.row("M17")
@pytest.mark.parametrize("refused", [0, 1])
def test_a_refused_page_breaks_the_rings_that_wait_for_it(behind: Pair, refused: int) -> None:
    """Two descriptor areas on both sides of the end of a page; a third ring part has all that it needs."""
    border = 0x5000
    with behind.channel() as channel:
        behind.map(0x2000, PAGE)
        for index, desc in enumerate((border - 16 * SIZE, border)):
            layout = RingLayout(SIZE, desc=desc, driver=0x2000 + 0x400 * index, device=0x2200 + 0x400 * index)
            behind.setup(layout, index, offset=0)
        asked = misses(channel)
        assert [each.payload.iova for each in asked] == [border - PAGE, border]  # type: ignore[attr-defined]
        for number, each in enumerate(asked):
            answer(channel, each, int(number == refused))
        behind.settle()
        assert [ring.broken is not None for ring in behind.rings] == [refused == 0, refused == 1]


@pytest.mark.row("M17")
def test_a_refused_page_is_no_matter_for_a_ring_that_runs(behind: Pair) -> None:
    with behind.channel() as channel:
        behind.map(0x1000, PAGE)
        layout = RingLayout.contiguous(SIZE, 0x1000)
        behind.setup(layout, 0, offset=0)
        assert behind.rings[0].running
        behind.setup(RingLayout.contiguous(SIZE, 0x5000), 1, offset=0)
        (asked,) = misses(channel)
        answer(channel, asked, 1)
        behind.settle()
        assert behind.rings[0].broken is None
        assert behind.rings[0].running
        assert behind.rings[1].broken is not None
        queue = DriverQueue(behind.memory, QueueConfig.from_layout(layout, features=FeatureSet("VERSION_1").bits))
        behind.map(0x8000, 2 * PAGE)
        behind.post(queue)
        behind.settle()
        assert queue.get_used() is not None


@pytest.mark.row("M17")
@pytest.mark.parametrize(
    ("iova", "user", "rule"),
    [
        (0, END - PAGE, ""),
        (0, END - PAGE + 8, "IotlbRange"),
        # It wraps nowhere, but the core ends one byte before.
        (END - PAGE, USER_OFFSET, "IotlbAddress"),
        (END - PAGE + 8, USER_OFFSET, "IotlbRange"),
    ],
)
def test_where_a_translation_may_end(
    behind: Pair, caplog: pytest.LogCaptureFixture, iova: int, user: int, rule: str
) -> None:
    behind.share((0, USER_OFFSET, PAGE), (PAGE, END - PAGE, PAGE))
    assert behind.told(R.IOTLB_MSG, Iotlb(iova, PAGE, user, 3, 2)) == int(bool(rule))
    assert f"refused: {rule}" in caplog.text or not rule
    cache = behind.session.rings.memory.cache
    assert cache is not None
    assert [(each.iova, each.user) for each in cache] == ([] if rule else [(iova, user)])

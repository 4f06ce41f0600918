"""The device IOTLB over a real socket: misses, updates, invalidations, and front-ends that misuse them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from virtio_test._core import DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.device import RING_FEATURES
from virtio_test.devices.test import TestDevice
from virtio_test.driver.test import TestDriver
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user import channel, iommu, iotlb
from virtio_test.transport.vhost_user.backend import DEFAULT_PROTOCOL_FEATURES
from virtio_test.transport.vhost_user.codec import Message, encode, encode_reply
from virtio_test.transport.vhost_user.frontend import USER_OFFSET, FrontEnd
from virtio_test.transport.vhost_user.iotlb import Cache
from virtio_test.transport.vhost_user.messages import (
    BackendRequest,
    IotlbType,
    Permission,
    ProtocolFeature,
    Request,
)
from virtio_test.transport.vhost_user.payloads import U64, Iotlb, MemoryRegion, MemoryTable

from .test_vhost_user_registers import connected, driver_of
from .vhost_user_world import MEMORY_BYTES, REQUEST, RESPONSE, SIZE, Server, serving
from .world import PATIENCE, eventually, open_fds

PAGE = 4096
READ, WRITE, BOTH = Permission.READ, Permission.WRITE, Permission.READ | Permission.WRITE
RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
RING = 0x1000
ASKED, ANSWERED = 0x80000, 0x90000
"""Where a request and its response lie: each in a page of its own, the response over the end of one."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    device = TestDevice(console=lambda _: None)
    with serving(tmp_path / "s", device, features=device.features | FeatureSet("ACCESS_PLATFORM")) as made:
        yield made


class Behind:
    """A front-end with an IOMMU, which answers what it likes; the driver finds its memory at the same addresses."""

    def __init__(self, front: FrontEnd, *, packed: bool = False) -> None:
        self.front = front
        features = FeatureSet("VERSION_1", "ACCESS_PLATFORM", *(["RING_PACKED"] if packed else []))
        front.guest_offset = 1 << 28
        assert front.negotiate(features) == features
        self.memory = GuestMemory([(0, MEMORY_BYTES)])
        front.share(self.memory)
        layout = RingLayout.contiguous(SIZE, RING, packed=packed)
        self.config = QueueConfig.from_layout(layout, features=features.bits)
        self.queue = DriverQueue(self.memory, self.config)
        self.asked: list[Iotlb] = []
        self.ring = front.setup_ring(self.config)

    def enable(self) -> None:
        self.front.enable(0)

    def map(self, address: int, permission: Permission = BOTH, size: int = PAGE) -> None:
        self.front.update_iotlb(address, size, address, permission)

    def map_ring(self) -> None:
        self.map(RING, size=3 * PAGE)

    def post(self, number: int) -> int:
        self.memory.write(ASKED, REQUEST.pack(number, number + 1, number + 2, number + 3, b"hello back end!"))
        self.memory.fill(ANSWERED - 8, 16, 0xAA)
        token = self.queue.add([(ASKED, 48)], [(ANSWERED - 8, 12)])
        self.queue.publish()
        self.ring.kick.notify()
        return token

    def misses(self, answer: int | Callable[[Message], int] = 0, *, timeout: float = 0.2) -> list[Iotlb]:
        """What the back-end has asked for by now."""
        found: list[Iotlb] = []
        while more := self.front.backend_requests(timeout=timeout, answer=answer):
            found += [each.payload for each in more if isinstance(each.payload, Iotlb)]
            timeout = min(timeout, 0.05)
        return found

    def serve(self, until: Callable[[], bool]) -> list[Iotlb]:
        """Answer each miss with its page until something holds."""
        seen: list[Iotlb] = []

        def give(message: Message) -> int:
            entry = message.payload
            assert isinstance(entry, Iotlb)
            assert (entry.type, entry.iova % PAGE) == (IotlbType.MISS, 0)
            self.map(entry.iova, Permission(entry.permissions))
            return 0

        def once() -> bool:
            seen.extend(self.misses(give, timeout=0.005))
            return until()

        assert eventually(once)
        return seen

    def used(self, token: int, number: int) -> list[Iotlb]:
        """Serve misses until `token` is used, and check the answer."""
        found: list[tuple[int, int]] = []
        seen = self.serve(lambda: bool(found.extend(self.queue.get_used_many()) or found))
        assert found == [(token, 12)]
        assert RESPONSE.unpack(self.memory.read(ANSWERED - 8, 12)) == (number + 101, number + 102, number + 103)
        assert self.memory.read(ANSWERED + 4, 4) == b"\xaa" * 4
        return seen

    @property
    def broken(self) -> bool:
        return self.front.number(Request.GET_STATUS) & 0x40 != 0

    def stopped(self) -> bool:
        """Whether the back-end has said that the ring is broken."""
        return self.ring.error.drain() > 0


@contextmanager
def behind(path: Path, *, packed: bool = False) -> Generator[Behind]:
    with FrontEnd(path, timeout=PATIENCE) as front:
        yield Behind(front, packed=packed)


def cache_of(server: Server) -> Cache:
    session = server.backend.session
    assert session is not None
    cache = session.rings.memory.cache
    assert cache is not None
    return cache


# --- the usual way --------------------------------------------------------------------------------------------


@RINGS
def test_a_driver_behind_an_iommu(server: Server, *, packed: bool) -> None:
    """Our driver, with the log on as well: it is about physical addresses, which no message but the table has."""
    with connected(server.path, iommu=True) as registers:
        wanted = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
        driver = TestDriver(registers, wanted=wanted | FeatureSet("ACCESS_PLATFORM"), console=lambda _: None)
        driver.initialize()
        assert "ACCESS_PLATFORM" in driver.features
        driver.request(10)
        registers.start_log()
        driver.request(11)
        marked = registers.dirty_pages()
        assert marked
        assert all(registers.memory.is_mapped(page, PAGE) for page in marked)
        registers.invalidate(0, 1 << 63)
        driver.request(12)
        registers.stop_log()
        driver.reset()
        driver.initialize()
        driver.request(13)
        assert registers.errors == []


def test_without_an_iommu_it_is_not_accepted(server: Server) -> None:
    with connected(server.path) as registers:
        assert "ACCESS_PLATFORM" not in driver_of(registers).features


@RINGS
def test_each_page_that_is_lacked_is_asked_for_once(server: Server, *, packed: bool) -> None:
    with behind(server.path, packed=packed) as b:
        b.enable()
        layout = b.config.layout()
        asked = b.misses()
        # The descriptors come first: a packed ring's are written too.
        last = (layout.desc + layout.desc_bytes - 1) // PAGE
        assert [each.iova for each in asked] == [page * PAGE for page in range(RING // PAGE, last + 1)]
        assert {each.permissions for each in asked} == {int(BOTH if packed else READ)}
        assert b.misses(timeout=0.05) == [], "and not again"
        token = b.post(7)
        b.map_ring()
        seen = b.used(token, 7)
        assert {(each.iova, each.permissions) for each in seen} == {
            (ASKED, READ),
            (ANSWERED - PAGE, WRITE),
            (ANSWERED, WRITE),
        }
        # All is there now.
        assert b.used(b.post(8), 8) == []


@pytest.mark.row("B16")
@RINGS
def test_a_refusal_breaks_the_ring_that_waits(server: Server, *, packed: bool) -> None:
    for size, rule in ((0, "IotlbRefused"), (3 * PAGE, "UnmappedAddress")):
        with behind(server.path, packed=packed) as b:
            if size:
                b.map_ring()
            b.enable()
            b.post(1)
            assert b.misses(1)
            assert eventually(b.stopped)
            assert b.broken
            session = server.backend.session
            assert session is not None
            error = session.rings.rings[0].broken
            assert error is not None
            assert getattr(error, "rule", "") == rule, error
            assert b.misses(timeout=0.05) == []
            # Set up anew it works.
            b.map_ring()
            b.front.get_base(0)
            b.queue = DriverQueue(b.memory, b.config)
            b.ring = b.front.setup_ring(b.config, base=0x8000 if packed else 0)
            b.used(b.post(2), 2)


@pytest.mark.row("B16")
def test_who_does_not_answer_in_time_refuses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iotlb, "MISS_SECONDS", 0.1)
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        b.post(1)
        assert b.misses(0), "answered, and nothing came"
        assert eventually(b.stopped)
        assert b.broken


def test_without_a_channel_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes by itself is taken; what does not breaks the ring in time."""
    monkeypatch.setattr(iotlb, "MISS_SECONDS", 0.1)
    device = TestDevice(console=lambda _: None)
    protocol = DEFAULT_PROTOCOL_FEATURES & ~ProtocolFeature.BACKEND_REQ
    offered = device.features | FeatureSet("ACCESS_PLATFORM")
    with (
        serving(tmp_path / "s", device, features=offered, protocol_features=protocol) as server,
        behind(server.path) as b,
    ):
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)
        b.front.invalidate_iotlb(ASKED, PAGE)
        b.post(2)
        assert eventually(b.stopped)


@pytest.mark.row("B16")
def test_permissions(server: Server) -> None:
    """Less than is asked for does not do, and more than there was is taken."""
    with behind(server.path) as b:
        b.map_ring()
        for page in (ASKED, ANSWERED - PAGE, ANSWERED):
            b.map(page, READ)
        b.enable()
        token = b.post(1)
        asked = b.misses()
        assert [(each.iova, each.permissions) for each in asked] == [(ANSWERED - PAGE, WRITE), (ANSWERED, WRITE)]
        assert b.memory.read(ANSWERED, 4) == b"\xaa" * 4
        for page in (ANSWERED - PAGE, ANSWERED):
            b.map(page, WRITE)
        b.used(token, 1)
        b.map(ASKED, WRITE)
        b.post(2)
        assert [(each.iova, each.permissions) for each in b.misses(1)] == [(ASKED, READ)]
        assert eventually(b.stopped)


@pytest.mark.row("T12")
@RINGS
def test_what_is_invalidated_is_gone_when_that_is_answered(server: Server, *, packed: bool) -> None:
    with behind(server.path, packed=packed) as b:
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        assert b.used(b.post(1), 1) == []
        # A page in the midst of one entry.
        b.front.invalidate_iotlb(ASKED, PAGE)
        assert not server.backend.memory.is_mapped(ASKED, 1)
        assert server.backend.memory.is_mapped(ASKED - 8, 8)
        assert server.backend.memory.is_mapped(ASKED + PAGE, 8)
        assert [each.iova for each in b.used(b.post(2), 2)] == [ASKED]
        # The ring itself: it stops, and goes on where it was.
        b.front.invalidate_iotlb(RING, 3 * PAGE)
        assert RING in {each.iova for each in b.used(b.post(3), 3)}
        # Everything, as Linux and QEMU say it.
        b.front.invalidate_iotlb(0, 0)
        assert server.backend.memory.regions == []
        b.used(b.post(4), 4)
        # Not aligned: rather more than less.
        b.front.invalidate_iotlb(ASKED + 3, 1)
        assert not server.backend.memory.is_mapped(ASKED, 1)
        b.used(b.post(5), 5)


def test_what_comes_and_goes_at_once_is_asked_for_again(server: Server) -> None:
    """Before the ring has looked: the queue has told of this page once, and would not do so again."""
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        token = b.post(1)
        assert [each.iova for each in b.misses()] == [ASKED]
        entry = Iotlb(ASKED, PAGE, ASKED + USER_OFFSET, int(BOTH), int(IotlbType.UPDATE))
        gone = Iotlb(ASKED, PAGE, 0, 0, int(IotlbType.INVALIDATE))
        b.front.send_bytes(encode(Request.IOTLB_MSG, entry) + encode(Request.IOTLB_MSG, gone))
        assert [b.front.receive().payload for _ in range(2)] == [U64(0)] * 2
        assert ASKED in {each.iova for each in b.used(token, 1)}


def test_an_update_moves_what_was_there(server: Server) -> None:
    with behind(server.path) as b:
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)
        other = 0xC0000
        b.memory.write(other, REQUEST.pack(50, 51, 52, 53, b"elsewhere"))
        b.post(2)
        b.front.number(Request.GET_FEATURES)
        assert eventually(b.queue.has_used)
        b.queue.get_used_many()
        b.front.update_iotlb(ASKED, PAGE, other, READ)
        token = b.queue.add([(ASKED, 48)], [(ANSWERED - 8, 12)])
        b.queue.publish()
        b.ring.kick.notify()
        assert eventually(b.queue.has_used)
        assert b.queue.get_used() == (token, 12)
        assert RESPONSE.unpack(b.memory.read(ANSWERED - 8, 12)) == (151, 152, 153)
        # The ring's own pages move too: it goes on in a copy of itself.
        copy = 0xD0000
        b.memory.copy(copy, RING, 3 * PAGE)
        b.front.update_iotlb(RING, 3 * PAGE, copy, BOTH)
        b.memory.fill(RING, 3 * PAGE, 0xFF)
        moved = DriverQueue(
            b.memory,
            QueueConfig.from_layout(RingLayout.contiguous(SIZE, copy), features=b.config.features),
            state=b.queue.state,
        )
        token = moved.add([(ASKED, 48)], [(ANSWERED - 8, 12)])
        moved.publish()
        b.ring.kick.notify()
        assert eventually(moved.has_used)
        assert moved.get_used() == (token, 12)


def test_the_memory_table_changes_beneath(server: Server) -> None:
    """Entries go with the memory that they show, and are asked for again once it is back."""
    with behind(server.path) as b:
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)
        (region,) = b.memory.regions
        b.front.share(b.memory)
        assert b.used(b.post(2), 2) == [], "the same addresses: nothing is lacked"
        b.front.remove_region(region)
        assert server.backend.memory.regions == []
        token = b.post(3)
        assert b.misses(), "the ring has lost its place"
        b.front.add_region(region)
        b.map_ring()
        b.used(token, 3)


def test_entries_that_would_cut_words_go_with_their_memory(server: Server) -> None:
    """The same user addresses, now of bytes that are aligned otherwise: they are shown no more, and nothing fails."""
    with behind(server.path) as b:
        b.map(0, size=MEMORY_BYTES // 2)
        b.enable()
        (region,) = b.memory.regions
        assert region.fd is not None
        moved = MemoryRegion(b.front.guest_offset, MEMORY_BYTES, USER_OFFSET - 4, 0)
        b.front.request(Request.SET_MEM_TABLE, MemoryTable((moved,)), [region.fd])
        assert server.backend.memory.regions == []
        b.front.share(b.memory)
        b.used(b.post(2), 2)


def test_a_ring_is_stopped_before_its_translations_go(tmp_path: Path) -> None:
    """So whatever the device still does to it then finds it there."""
    seen: list[bool] = []

    class Device(TestDevice):
        def stop_queue(self, queue_index: int) -> None:
            seen.append(self.bus.memory.is_mapped(RING, 0xD00))
            super().stop_queue(queue_index)

    device = Device(console=lambda _: None)
    offered = device.features | FeatureSet("ACCESS_PLATFORM")
    with serving(tmp_path / "s", device, features=offered) as server, behind(server.path) as b:
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)
        b.front.invalidate_iotlb(RING + 0x800, 8)
        b.used(b.post(2), 2)
        b.map_ring()
        b.used(b.post(3), 3)
        count = len(seen)
        (region,) = b.memory.regions
        b.front.remove_region(region)
        assert len(seen) == count + 1
        assert all(seen)


# --- front-ends that misuse it --------------------------------------------------------------------------------

END = 1 << 64
U = USER_OFFSET
WRONG = [
    ("IotlbRange", Iotlb(0, 0, U, 3, 2)),
    ("IotlbRange", Iotlb(END - PAGE, 2 * PAGE, U, 3, 2)),
    ("IotlbRange", Iotlb(0, 2 * PAGE, END - PAGE, 3, 2)),
    ("IotlbRange", Iotlb(END - 8, END - 8, U, 3, 2)),
    ("IotlbRange", Iotlb(4, PAGE, U, 3, 2)),
    ("IotlbRange", Iotlb(0, 12, U, 3, 2)),
    ("IotlbPermission", Iotlb(0, PAGE, U, 0, 2)),
    ("IotlbPermission", Iotlb(0, PAGE, U, 4, 2)),
    ("IotlbPermission", Iotlb(0, PAGE, U, 0xFF, 2)),
    ("IotlbAddress", Iotlb(0, PAGE, U - PAGE, 3, 2)),
    ("IotlbAddress", Iotlb(0, PAGE, U + MEMORY_BYTES - 8, 3, 2)),
    ("IotlbAddress", Iotlb(0, 1 << 63, U, 3, 2)),
    ("IotlbAddress", Iotlb(0, PAGE, 0, 3, 2)),
    ("IotlbAddress", Iotlb(0, PAGE, U + 4, 3, 2)),
    ("IotlbRange", Iotlb(PAGE, 0, 0, 0, 3)),
    ("IotlbRange", Iotlb(END - PAGE, 2 * PAGE, 0, 0, 3)),
    ("IotlbType", Iotlb(0, PAGE, U, 3, 1)),
    ("IotlbType", Iotlb(0, PAGE, U, 3, 4)),
    ("IotlbType", Iotlb(0, PAGE, U, 3, 0)),
    ("IotlbType", Iotlb(0, PAGE, U, 3, 255)),
]


@pytest.mark.row("M17")
@pytest.mark.parametrize(("rule", "entry"), WRONG)
def test_a_message_that_cannot_be_is_answered_and_changes_nothing(
    server: Server, caplog: pytest.LogCaptureFixture, rule: str, entry: Iotlb
) -> None:
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        b.used(b.post(1), 1)
        before, fds = list(cache_of(server)), open_fds()
        with pytest.raises(MessageError, match="IOTLB_MSG was refused with 1"):
            b.front.request(Request.IOTLB_MSG, entry)
        assert any(rule in record.getMessage() for record in caplog.records), caplog.text
        caplog.clear()
        assert list(cache_of(server)) == before
        assert open_fds() == fds
        assert b.used(b.post(2), 2) == []


@pytest.mark.row("M17")
def test_without_the_feature_there_are_no_entries(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with FrontEnd(server.path, timeout=PATIENCE) as front:
        front.negotiate(FeatureSet("VERSION_1"))
        front.share(GuestMemory([(0, MEMORY_BYTES)]))
        for kind in (2, 3):
            front.send(Request.IOTLB_MSG, Iotlb(0, PAGE, U, 3, kind))
            assert front.receive().payload == U64(1)
        assert [record.getMessage().count("NotNegotiated") for record in caplog.records] == [1, 1]
        assert server.backend.memory.is_mapped(0, MEMORY_BYTES)


@pytest.mark.row("M17")
@RINGS
def test_a_flood_of_updates_fills_a_bounded_cache(
    server: Server, monkeypatch: pytest.MonkeyPatch, *, packed: bool
) -> None:
    """The oldest go, but not those that the ring lies in, and requests are answered all the while."""
    monkeypatch.setattr(iotlb, "MAX_ENTRIES", 100)
    with behind(server.path, packed=packed) as b:
        b.enable()
        b.used(b.post(1), 1)
        for number in range(400):
            b.front.update_iotlb((1 << 40) + number * PAGE, 8, number % 100 * PAGE, READ)
            assert len(cache_of(server)) <= 100
            if number % 100 == 50:
                seen = b.used(b.post(number), number)
                assert {each.iova for each in seen} <= {ASKED, ANSWERED - PAGE, ANSWERED}
        # Cut into small pieces from within.
        b.front.update_iotlb(1 << 50, 400 * 8, 0, READ)
        for number in range(0, 400, 2):
            b.front.invalidate_iotlb((1 << 50) + number * 8, 8)
            assert len(cache_of(server)) <= 100
        b.used(b.post(2), 2)


@pytest.mark.row("M17")
def test_a_chain_that_lacks_more_than_fits_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iotlb, "MAX_ENTRIES", 32)
    monkeypatch.setattr(iommu, "_MOST_FOR_A_CHAIN", 64)
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        b.queue.add([(0x10000, 128 * PAGE)], [])
        b.queue.publish()
        b.ring.kick.notify()
        seen = b.serve(b.stopped)
        assert len(seen) <= 300
        assert b.broken


@pytest.mark.row("M17")
def test_no_more_is_asked_for_at_once_than_can_be_kept(server: Server) -> None:
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        b.queue.add([(0x10000, 200 * PAGE)], [])
        b.queue.publish()
        b.ring.kick.notify()
        found = b.misses()
        while more := b.misses(timeout=0.05):
            found += more
        assert [each.iova for each in found] == [0x10000 + page * PAGE for page in range(64)]
        # The next ones come as these are answered.
        b.map(0x10000, READ)
        assert [each.iova for each in b.misses()] == [0x10000 + 64 * PAGE]
        b.map(0, size=MEMORY_BYTES)
        assert eventually(b.queue.has_used)


@pytest.mark.row("M17")
def test_answers_that_nobody_asked_for_close_the_channel(server: Server) -> None:
    with behind(server.path) as b:
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)
        assert b.front.channel is not None
        b.front.channel.socket.sendall(encode_reply(BackendRequest.IOTLB_MSG, U64(1)) * 3)
        b.post(2)
        assert eventually(b.queue.has_used)


@pytest.mark.row("M17")
def test_questions_that_nobody_reads_are_no_heap(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front-end that gives every page and never looks at its channel."""
    monkeypatch.setattr(channel, "_MOST_UNREAD", 50)
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        session = server.backend.session
        assert session is not None
        misses = session.rings.iommu.misses
        for number in range(52):
            assert "open" in repr(session.rings.channel)
            token = b.queue.add([(ASKED, 8)], [])
            b.queue.publish()
            b.ring.kick.notify()
            assert eventually(lambda: len(misses) > 0), number
            b.map(ASKED)
            assert eventually(b.queue.has_used), number
            assert b.queue.get_used() == (token, 0)
            b.front.invalidate_iotlb(ASKED, PAGE)
        assert "closed, 0 unsent" in repr(session.rings.channel)


@pytest.mark.row("M09")
@pytest.mark.parametrize("area", ["descriptor", "used", "available"])
def test_a_ring_that_wraps_is_refused(server: Server, area: str) -> None:
    with behind(server.path) as b:
        address = b.front.ring_address(b.config)
        with pytest.raises(MessageError, match="SET_VRING_ADDR was refused"):
            b.front.request(Request.SET_VRING_ADDR, replace(address, **{area: (1 << 64) - 16}))
        b.map(0, size=MEMORY_BYTES)
        b.enable()
        b.used(b.post(1), 1)


def test_a_new_channel_is_asked_again(server: Server) -> None:
    with behind(server.path) as b:
        b.map_ring()
        b.enable()
        token = b.post(1)
        assert b.misses()
        b.front.open_channel()
        assert [each.iova for each in b.misses()] == [ASKED]
        b.map(ASKED)
        b.used(token, 1)


def test_the_feature_is_offered_to_who_asks_for_it(tmp_path: Path) -> None:
    device = TestDevice(console=lambda _: None)
    with serving(tmp_path / "s", device) as made, FrontEnd(made.path) as front:
        assert not front.number(Request.GET_FEATURES) & 1 << 33
    with (
        pytest.raises(InvalidArgument, match="ORDER_PLATFORM"),
        serving(tmp_path / "t", device, features=device.features | FeatureSet("ORDER_PLATFORM")),
    ):
        pass

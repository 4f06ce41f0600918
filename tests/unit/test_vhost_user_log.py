"""The dirty log over a real socket: what the back-end writes is marked, and nothing stops for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from virtio_test._core import DirtyLog, DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout, Trace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.test import TestDevice
from virtio_test.errors import MessageError, PeerDisconnected, StateError
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.frontend import USER_OFFSET, FrontEnd
from virtio_test.transport.vhost_user.messages import VRING_LOG, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import Log, MemoryRegion, MemoryTable, VringAddress, VringState

from .test_vhost_user_registers import connected, driver_of
from .vhost_user_world import MEMORY_BYTES, SIZE, Guest, Server, guest, serving
from .world import PATIENCE, ServerThread, eventually, open_fds

PAGE = 4096
BORDER = 1 << 20
RING = 0x1000
TABLES = 0x10000
RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


@contextmanager
def traced(path: Path) -> Generator[tuple[Trace, Path]]:
    """A back-end that answers with its request, reversed and cut to what fits; the trace of its accesses."""
    trace = Trace()
    device = BaseDevice(45, handlers={0: lambda request: request[::-1]})
    server = ServerThread(path, Backend(device, path=path, memory=GuestMemory(trace=trace)))
    try:
        yield trace, path
    finally:
        server.close()


def pages(trace: Trace) -> set[int]:
    """The pages that the device has written."""
    writes = [each for each in trace.log() if each.kind in ("store", "write") and each.length]
    return {
        page for each in writes for page in range(each.address // PAGE, (each.address + each.length - 1) // PAGE + 1)
    }


class Ends:
    """A driver queue before a back-end, over two regions that adjoin."""

    def __init__(self, front: FrontEnd, *, packed: bool) -> None:
        wanted = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
        features = front.negotiate(wanted)
        self.front = front
        self.memory = GuestMemory([(0, BORDER), (BORDER, BORDER)])
        front.share(self.memory)
        layout = RingLayout.contiguous(64, RING, packed=packed)
        self.config = QueueConfig.from_layout(layout, features=features.bits)
        self.queue = DriverQueue(self.memory, self.config, indirect=TABLES)
        self.ring = front.setup_ring(self.config)
        front.enable(0)

    def parts(self, random: Random, total: int) -> list[tuple[int, int]]:
        """A buffer of `total` bytes in pieces, some of them over the border."""
        found: list[tuple[int, int]] = []
        while total:
            size = random.randint(1, total)
            near = random.random() < 0.3
            start = BORDER - random.randint(0, size) if near else random.randrange(0x20000, 2 * BORDER - size)
            found.append((start, size))
            total -= size
        return found[:4] if len(found) > 4 else found

    def send(self, random: Random) -> None:
        """Some requests, there and back."""
        tokens: set[int] = set()
        for _ in range(random.randint(1, 6)):
            readable = self.parts(random, random.randint(1, 9000))
            size = sum(length for _, length in readable)
            writable = self.parts(random, size) if random.random() < 0.8 else []
            indirect = random.random() < 0.5 and len(readable) + len(writable) <= 8
            tokens.add(self.queue.add(readable, writable, indirect=indirect))
        self.queue.publish()
        self.ring.kick.notify()

        def took() -> bool:
            tokens.difference_update(token for token, _ in self.queue.get_used_many())
            return not tokens

        assert eventually(took)
        # What is written after the last used buffer (asking for a kick) is written by then.
        self.front.number(Request.GET_FEATURES)


@RINGS
@pytest.mark.row("T13")
def test_exactly_the_pages_that_were_written_are_marked(tmp_path: Path, *, packed: bool) -> None:
    """Against the core's own trace; and no page has changed that is not marked, but by the driver."""
    random = Random(5 + packed)
    with traced(tmp_path / "s") as (trace, path), FrontEnd(path, timeout=PATIENCE) as front:
        ends = Ends(front, packed=packed)
        ends.send(random)
        logs = [DirtyLog(2 * BORDER // PAGE // 8) for _ in range(2)]
        front.set_log(logs[0])
        front.set_features(front.features, log=True)
        front.log_rings()
        for round_ in range(60):
            # Exchanged in the midst of it: each write is in one of both.
            if round_ % 7 == 3:
                logs.reverse()
                front.set_log(logs[0])
            trace.clear()
            ends.send(random)
            marked = set(logs[0].take()) | set(logs[1].take())
            assert marked == pages(trace), round_
        front.set_features(front.features)
        front.log_rings()
        ends.send(random)
        assert [log.take() for log in logs] == [[], []]


@RINGS
def test_what_has_changed_is_marked(tmp_path: Path, *, packed: bool) -> None:
    """Without a trace, so as the core runs in earnest."""
    random = Random(7 + packed)
    device = BaseDevice(45, handlers={0: lambda request: bytes(byte ^ 0xFF for byte in request)})
    path = tmp_path / "s"
    server = ServerThread(path, Backend(device, path=path))
    try:
        with FrontEnd(path, timeout=PATIENCE) as front:
            ends = Ends(front, packed=packed)
            log = DirtyLog(2 * BORDER // PAGE // 8)
            front.set_log(log)
            front.set_features(front.features, log=True)
            front.log_rings()
            buffer, own = 0x40000, {RING // PAGE, RING // PAGE + 1}
            for _ in range(40):
                size, at = random.randint(1, 3 * PAGE), BORDER - random.randint(0, 5 * PAGE)
                ends.memory.write(buffer, random.randbytes(size))
                before = ends.memory.read(0, 2 * BORDER)
                token = ends.queue.add([(buffer, size)], [(at, size)])
                ends.queue.publish()
                ends.ring.kick.notify()
                assert eventually(ends.queue.has_used)
                assert ends.queue.get_used() == (token, size)
                front.number(Request.GET_FEATURES)
                after = ends.memory.read(0, 2 * BORDER)
                changed = {
                    page
                    for page in range(2 * BORDER // PAGE)
                    if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
                }
                marked = set(log.take())
                # The driver has written its side of the ring as well.
                assert changed - own <= marked <= changed | own
                assert marked & own
    finally:
        server.close()


def start(g: Guest, bits: int = MEMORY_BYTES // PAGE) -> DirtyLog:
    log = DirtyLog(bits // 8)
    g.front.set_log(log)
    g.front.set_features(g.front.features, log=True)
    g.front.log_rings()
    return log


@RINGS
def test_no_ring_stops_for_it(server: Server, *, packed: bool) -> None:
    with guest(server.path, packed=packed) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        session = server.backend.session
        assert session is not None
        queue = session.rings.rings[0].queue
        log = start(g)
        g.request(2)
        assert log.take()
        g.front.set_features(g.front.features)
        g.front.log_rings()
        g.request(3)
        g.front.number(Request.GET_FEATURES)
        assert log.take() == []
        assert queue is not None
        assert session.rings.rings[0].queue is queue


def test_the_used_ring_is_marked_where_the_front_end_wants_it(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        log = DirtyLog(64)
        g.front.set_log(log)
        g.front.set_features(g.front.features, log=True)
        config = g.config
        elsewhere = 300 * PAGE + config.device % PAGE
        address = VringAddress(
            0, VRING_LOG, config.desc + USER_OFFSET, config.device + USER_OFFSET, config.driver + USER_OFFSET, elsewhere
        )
        g.front.request(Request.SET_VRING_ADDR, address)
        log.take()
        g.request(2)
        g.front.number(Request.GET_FEATURES)
        marked = log.take()
        assert 300 in marked
        assert config.device // PAGE not in marked
        # Its last byte must have a bit too.
        beyond = replace(address, log=512 * PAGE - 64)
        with pytest.raises(MessageError, match="SET_VRING_ADDR was refused"):
            g.front.request(Request.SET_VRING_ADDR, beyond)
        g.request(3)
        g.front.number(Request.GET_FEATURES)
        assert 300 in log.take()


@pytest.mark.row("M09")
def test_where_a_ring_is_logged_counts_with_the_flag_alone(tmp_path: Path) -> None:
    """User-mode Linux has all ones there, and no flag."""
    with serving(tmp_path / "s") as server, guest(server.path) as g:
        g.setup()
        places = (g.config.desc + USER_OFFSET, g.config.device + USER_OFFSET, g.config.driver + USER_OFFSET)
        g.front.request(Request.SET_VRING_ADDR, VringAddress(0, 0, *places, (1 << 64) - 1))
        g.front.enable(0)
        g.request(1)


@pytest.mark.row("M15")
def test_where_a_used_ring_is_logged_is_judged_without_a_log_too(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        address = replace(g.front.ring_address(g.config), flags=VRING_LOG, log=(1 << 64) - 64)
        with pytest.raises(MessageError, match="SET_VRING_ADDR was refused"):
            g.front.request(Request.SET_VRING_ADDR, address)
        # Elsewhere it may be, and then a log that ends before is none for it.
        g.front.request(Request.SET_VRING_ADDR, replace(address, log=300 * PAGE))
        g.request(1)
        with pytest.raises(PeerDisconnected):
            g.front.set_log(DirtyLog(MEMORY_BYTES // PAGE // 8))


def memfd(size: int) -> int:
    fd = os.memfd_create("log")
    os.truncate(fd, size)
    return fd


WRONG = [
    ("LogRange", Log(0, 0), None),
    ("LogRange", Log(PAGE + 1, 0), None),
    ("LogRange", Log(PAGE, 1), None),
    # CVE-2020-10722: the sum is 0 in 64 bits, or small.
    ("LogRange", Log(2**64 - PAGE, PAGE), None),
    ("LogRange", Log(PAGE, 2**64 - PAGE), None),
    ("LogRange", Log(2**64 - 1, 2**64 - 1), None),
    ("LogTooSmall", Log(MEMORY_BYTES // PAGE // 8 - 1, 0), None),
    ("LogFile", Log(PAGE, 0), "pipe"),
    ("LogFile", Log(PAGE, 0), "read-only"),
]


@pytest.mark.parametrize(("rule", "log", "kind"), WRONG)
@pytest.mark.row("M15")
@pytest.mark.row("CVE-2020-10722")
def test_a_log_that_cannot_be_ends_the_connection(
    server: Server, caplog: pytest.LogCaptureFixture, rule: str, log: Log, kind: str | None
) -> None:
    """Its answer has no way to say so, and a front-end that goes on would lose what is written."""
    before = open_fds()
    refused_log(server, log, kind)
    assert eventually(lambda: server.backend.session is None)
    assert any(rule in record.getMessage() for record in caplog.records), caplog.text
    # A log entry holds the error that it is about.
    caplog.clear()
    assert eventually(lambda: open_fds() == before)
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)


def refused_log(server: Server, log: Log, kind: str | None) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        g.front.set_features(g.front.features, log=True)
        fd = memfd(PAGE)
        fds = [fd]
        if kind == "pipe":
            fds = [*os.pipe(), fd]
        elif kind == "read-only":
            fds = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), fd]
        with pytest.raises(PeerDisconnected):
            g.front.request(Request.SET_LOG_BASE, log, [fds[0]])
        for each in fds:
            os.close(each)


@pytest.mark.row("M15")
def test_a_ring_that_grows_is_logged_as_a_whole(server: Server) -> None:
    """Where its used ring is logged elsewhere, that is all of it; and where the log ends before, it does not grow."""
    with guest(server.path) as g:
        small = RingLayout(16, desc=0x1000, driver=0x2000, device=0x3F80)
        g.config = QueueConfig.from_layout(small, features=g.front.features.bits)
        g.setup()
        log = start(g, 512)
        address = replace(g.front.ring_address(g.config), flags=VRING_LOG, log=300 * PAGE + 0xF80)
        g.front.request(Request.SET_VRING_ADDR, address)
        g.front.request(Request.SET_VRING_NUM, VringState(0, SIZE))
        larger = RingLayout(SIZE, desc=0x1000, driver=0x2000, device=0x3F80)
        g.config = QueueConfig.from_layout(larger, features=g.front.features.bits)
        g.queue = DriverQueue(g.memory, g.config)
        g.front.enable(0)
        for number in range(SIZE):
            g.request(number)
        g.front.number(Request.GET_FEATURES)
        marked = set(log.take())
        assert {300, 301} <= marked
        assert not {3, 4} & marked
        g.front.request(Request.SET_VRING_ADDR, replace(address, log=512 * PAGE - larger.device_bytes))
        with pytest.raises(MessageError, match="SET_VRING_NUM was refused"):
            g.front.request(Request.SET_VRING_NUM, VringState(0, 2 * SIZE))
        g.request(SIZE)


@pytest.mark.row("M15")
def test_a_ring_whose_memory_moves_is_logged_where_it_was_to_be(server: Server) -> None:
    """A new table gives it other guest addresses: its used ring is still marked where the front-end asked for it."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        log = start(g, 3 * MEMORY_BYTES // PAGE)
        elsewhere = 700 * PAGE + g.config.device % PAGE
        g.front.request(Request.SET_VRING_ADDR, replace(g.front.ring_address(g.config), flags=VRING_LOG, log=elsewhere))
        g.request(1)
        # Buffers stay where they were, and the ring's addresses show the same file one region further.
        fd = g.memory.regions[0].fd
        assert fd is not None
        table = MemoryTable(
            (
                MemoryRegion(0, MEMORY_BYTES, USER_OFFSET + MEMORY_BYTES, 0),
                MemoryRegion(MEMORY_BYTES, MEMORY_BYTES, USER_OFFSET, 0),
            )
        )
        g.front.request(Request.SET_MEM_TABLE, table, [fd, fd])
        log.take()
        g.request(2)
        g.front.number(Request.GET_FEATURES)
        marked = log.take()
        assert 700 in marked
        assert not {page for page in marked if page >= MEMORY_BYTES // PAGE} - {700}


@pytest.mark.row("M15", "M04")
def test_features_that_cannot_be_logged_change_nothing(server: Server) -> None:
    """The file was cut short before LOG_ALL came, in a SET_FEATURES that would begin anew: nothing has begun."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
        fd = memfd(PAGE)
        g.front.request(Request.SET_LOG_BASE, Log(PAGE, 0), [fd])
        os.truncate(fd, 0)
        os.close(fd)
        with pytest.raises(MessageError, match="SET_FEATURES was refused"):
            g.front.set_features(g.front.features, protocol_bit=False, log=True)
        session = server.backend.session
        assert session is not None
        assert not session.rings.always_enabled
        g.request(2)


@pytest.mark.row("M15")
def test_memory_beyond_the_log(server: Server) -> None:
    """Refused while rings run; where none does the log is forgotten, since a larger one is about to come."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        log = start(g)
        g.request(1)
        g.memory.add_region(MEMORY_BYTES, PAGE)
        with pytest.raises(MessageError, match="ADD_MEM_REG was refused"):
            g.front.add_region(g.memory.regions[1])
        g.request(2)
        g.front.enable(0, on=False)
        log.take()
        g.front.add_region(g.memory.regions[1])
        g.front.enable(0)
        g.request(3)
        assert log.take() == [], "it is no log of this memory"
        larger = start(g, 2 * MEMORY_BYTES // PAGE)
        g.request(4)
        assert larger.take()


@pytest.mark.row("CVE-2019-14835")
@RINGS
def test_buffers_of_no_bytes_mark_no_page(tmp_path: Path, *, packed: bool) -> None:
    """As many of them as there are descriptors, then a table of many: the marks are those of the used ring."""
    with traced(tmp_path / "s") as (trace, path), FrontEnd(path, timeout=PATIENCE) as front:
        ends = Ends(front, packed=packed)
        log = DirtyLog(2 * BORDER // PAGE // 8)
        front.set_log(log)
        front.set_features(front.features, log=True)
        front.log_rings()
        for count, indirect in ((64, False), (8, True)):
            at = 0x80000
            parts = [(at + PAGE * index, 8) for index in range(count)]
            ends.queue.add([], parts, indirect=indirect)
            # The driver empties them before anybody has looked.
            layout = ends.config.layout()
            for index in range(count):
                slot = TABLES + 16 * index if indirect else layout.at("desc.addr", index)
                ends.memory.write(slot + 8, bytes(4))
            trace.clear()
            ends.queue.publish()
            ends.ring.kick.notify()
            assert eventually(ends.queue.has_used)
            ends.queue.get_used_many()
            front.number(Request.GET_FEATURES)
            ring = set(range(RING // PAGE, layout.end // PAGE + 1))
            marked = set(log.take())
            assert marked
            assert marked <= ring
            assert marked == pages(trace)
            if not packed or indirect:
                continue
            break


def test_who_wants_to_is_told_that_something_was_marked(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        told = Notifier.eventfd()
        g.front.request(Request.SET_LOG_FD, None, [told.fileno()])
        g.request(1)
        g.front.number(Request.GET_FEATURES)
        assert told.drain() == 0
        start(g)
        g.request(2)
        assert eventually(lambda: told.drain() > 0)
        # An fd that cannot be written harms nobody but its sender.
        reading, writing = os.pipe()
        os.close(writing)
        g.front.request(Request.SET_LOG_FD, None, [reading])
        os.close(reading)
        g.request(3)


@RINGS
def test_a_driver_before_a_back_end_that_logs(tmp_path: Path, *, packed: bool) -> None:
    with serving(tmp_path / "s") as server, connected(server.path) as registers:
        driver = driver_of(registers, "packed" if packed else "split")
        with pytest.raises(StateError, match="no dirty log"):
            registers.dirty_pages()
        registers.start_log()
        driver.request(10)
        assert registers.dirty_pages()
        driver.reset()
        driver.initialize()
        driver.request(11)
        assert registers.dirty_pages(), "it goes on over a reset"
        registers.stop_log()
        driver.request(12)
        assert registers.log is None


def test_without_a_way_to_log_there_is_none(tmp_path: Path) -> None:
    protocol = ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ
    with (
        serving(tmp_path / "s") as server,
        connected(server.path, protocol_features=protocol) as registers,
        pytest.raises(StateError, match="LOG_SHMFD"),
    ):
        registers.start_log()
    with serving(tmp_path / "t", protocol_features=protocol) as server, FrontEnd(server.path) as front:
        assert not front.number(Request.GET_FEATURES) & 1 << 26


@pytest.mark.row("T13")
def test_a_log_is_exchanged_while_many_write(tmp_path: Path) -> None:
    """From another thread, without a stop: after each exchange the old one is marked no more."""
    device = TestDevice(console=lambda _: None)
    with serving(tmp_path / "s", device) as server, guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        logs = [start(g), DirtyLog(MEMORY_BYTES // PAGE // 8)]
        memory = server.backend.memory
        stop = threading.Event()
        written: list[int] = []

        def write() -> None:
            # As a device's own thread does.
            random = Random(3)
            while not stop.is_set():
                page = random.randrange(128, 256)
                memory.write(page * PAGE, b"x")
                written.append(page)

        writer = threading.Thread(target=write)
        writer.start()
        seen: set[int] = set()
        try:
            for _ in range(60):
                logs.reverse()
                g.front.set_log(logs[0])
                seen.update(logs[1].take())
                assert logs[1].take() == [], "nobody marks the old one any more"
        finally:
            stop.set()
            writer.join()
        seen.update(logs[0].take())
        assert set(written) <= seen

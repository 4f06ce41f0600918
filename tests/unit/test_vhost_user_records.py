"""Our back-end's record of what is in flight, over a real socket: the region, what may be in it, when it counts."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from virtio_test._core import Chain, DriverQueue, QueueState
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.errors import MessageError, PeerDisconnected
from virtio_test.features import FeatureSet
from virtio_test.status import Status
from virtio_test.transport.vhost_user.backend import DEFAULT_PROTOCOL_FEATURES
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import Inflight, VringState

from .vhost_user_world import REQUEST, RESPONSE, SIZE, Guest, Server, guest, serving
from .world import eventually, mapped_files, open_fds

R = Request
FORMATS = [False, True]


class Keeper(BaseDevice):
    """Takes requests of the test device and answers them when the test says so."""

    def __init__(self) -> None:
        super().__init__(45, handlers={0: kept(self.keep_one)}, queue_sizes=(SIZE,))
        self.taken: list[Chain] = []

    def keep_one(self, chain: Chain) -> None:
        self.taken.append(chain)

    def cancel(self, chain: Chain) -> bool:  # noqa: ARG002 - the device lets go of everything
        return True

    def answer(self, chain: Chain) -> bool:
        self.taken.remove(chain)
        numbers = REQUEST.unpack(chain.read())[1:4]
        return self.complete(chain, RESPONSE.pack(*(number + 100 for number in numbers)))

    def stop_queue(self, queue_index: int) -> None:
        super().stop_queue(queue_index)
        self.taken.clear()

    def reset(self) -> None:
        super().reset()
        self.taken.clear()


class Region:
    """A region as the front-end has it."""

    def __init__(self, g: Guest, *, queues: int = 1, queue_size: int = SIZE) -> None:
        reply = g.front.request(R.GET_INFLIGHT_FD, Inflight(0, 0, queues, queue_size))
        assert reply is not None
        assert isinstance(reply.payload, Inflight)
        self.payload = reply.payload
        self.fd = os.dup(reply.fds[0].fileno()) if reply.fds else -1
        reply.close()
        self.packed = g.config.packed

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def content(self) -> bytes:
        return os.pread(self.fd, self.payload.size, 0)

    def header(self) -> tuple[int, ...]:
        """version, desc_num."""
        return struct.unpack_from("=HH", self.content(), 8)

    def put(self, at: int, data: bytes) -> None:
        os.pwrite(self.fd, data, at)

    def heads(self) -> list[int]:
        start, step = (32, 32) if self.packed else (16, 16)
        return [at for at in range(SIZE) if self.content()[start + step * at]]


@contextmanager
def region(g: Guest, **wanted: int) -> Generator[Region]:
    made = Region(g, **wanted)
    try:
        yield made
    finally:
        made.close()


def give(g: Guest, payload: Inflight, fd: int) -> None:
    g.front.request(R.SET_INFLIGHT_FD, payload, [fd])


def start(g: Guest, held: Region | None = None, *, base: int = 0) -> None:
    if held is not None:
        give(g, held.payload, held.fd)
    g.ring = g.front.setup_ring(g.config, base=base)
    g.front.enable(0)


def without_leaks(path: Path, device: BaseDevice | None = None) -> Generator[Server]:
    """A server that has as much open and mapped in the end as before its first front-end."""
    with serving(path, device) as made:
        before = open_fds(), mapped_files()
        yield made
        assert eventually(lambda: made.backend.session is None)
        assert eventually(lambda: (open_fds(), mapped_files()) == before, patience=2.0), (
            f"{open_fds()}, {mapped_files()}: {before}"
        )


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    yield from without_leaks(tmp_path / "s")


@pytest.fixture
def keeper(tmp_path: Path) -> Generator[Server]:
    yield from without_leaks(tmp_path / "s", Keeper())


def device(server: Server) -> Keeper:
    assert isinstance(server.device, Keeper)
    return server.device


# --- the region -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize("queue_size", [1, 4, 128, 32768])
def test_a_region_is_sealed_zero_and_large_enough(server: Server, packed: bool, queue_size: int) -> None:
    with guest(server.path, packed=packed) as g, region(g, queue_size=queue_size) as held:
        least = 32 + 32 * queue_size if packed else 16 + 16 * queue_size
        assert least <= held.payload.size < least + 64
        assert held.payload == Inflight(held.payload.size, 0, 1, queue_size)
        assert held.content() == bytes(held.payload.size)
        assert fcntl.fcntl(held.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        give(g, held.payload, held.fd)


def test_before_features_are_known_there_is_room_for_either_kind(server: Server) -> None:
    from virtio_test.transport.vhost_user.frontend import FrontEnd

    with FrontEnd(server.path) as front:
        front.number(R.GET_PROTOCOL_FEATURES)
        front.set_protocol_features(ProtocolFeature.INFLIGHT_SHMFD)
        reply = front.request(R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 8))
        assert reply is not None
        assert isinstance(reply.payload, Inflight)
        assert reply.payload.size >= 32 + 8 * 32
        reply.close()


@pytest.mark.row("R11", "M20")
@pytest.mark.parametrize(("queues", "queue_size"), [(0, 8), (2, 8), (0xFFFF, 8), (1, 0), (1, 32769), (1, 0xFFFF)])
def test_of_what_cannot_be_there_is_no_region(server: Server, queues: int, queue_size: int) -> None:
    with guest(server.path) as g:
        with region(g, queues=queues, queue_size=queue_size) as none:
            assert (none.payload, none.fd) == (Inflight(0, 0, queues, queue_size), -1)
        g.setup()
        g.front.enable(0)
        g.request(1)


def test_it_is_not_there_unless_negotiated(server: Server) -> None:
    with guest(server.path, protocol_features=DEFAULT_PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD) as g:
        fd = os.memfd_create("region")
        with pytest.raises(MessageError, match="Refused"):
            give(g, Inflight(4096, 0, 1, 8), fd)
        os.close(fd)
        g.setup()
        g.front.enable(0)
        g.request(1)


def _file(size: int, *, mode: int = os.O_RDWR) -> int:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if mode == os.O_RDWR:
        return fd
    again = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
    os.close(fd)
    return again


def _socket() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def _with_header(version: int, count: int, features: int = 0) -> int:
    fd = _file(1 << 16)
    os.pwrite(fd, struct.pack("=QHH", features, version, count), 0)
    return fd


LEAST = 16 + 16 * SIZE
BAD: list[tuple[str, Inflight, Callable[[], int]]] = [
    ("no queues", Inflight(LEAST, 0, 0, SIZE), lambda: _file(1 << 16)),
    ("more than there are", Inflight(2 * LEAST, 0, 2, SIZE), lambda: _file(1 << 16)),
    ("no descriptors", Inflight(LEAST, 0, 1, 0), lambda: _file(1 << 16)),
    ("too many descriptors", Inflight(1 << 21, 0, 1, 32769), lambda: _file(1 << 21)),
    ("one byte too few", Inflight(LEAST - 1, 0, 1, SIZE), lambda: _file(1 << 16)),
    ("no bytes", Inflight(0, 0, 1, SIZE), lambda: _file(1 << 16)),
    ("a size of its own", Inflight(LEAST + 1, 0, 1, SIZE), lambda: _file(1 << 16)),
    ("an offset of its own", Inflight(LEAST, 4, 1, SIZE), lambda: _file(1 << 16)),
    ("beyond the file", Inflight(LEAST, 8, 1, SIZE), lambda: _file(LEAST)),
    ("an empty file", Inflight(LEAST, 0, 1, SIZE), lambda: _file(0)),
    ("a size that wraps", Inflight((1 << 64) - 8, 0, 1, SIZE), lambda: _file(1 << 16)),
    ("an offset that wraps", Inflight(LEAST, (1 << 64) - 8, 1, SIZE), lambda: _file(1 << 16)),
    ("both", Inflight(1 << 63, 1 << 63, 1, SIZE), lambda: _file(1 << 16)),
    ("no file", Inflight(LEAST, 0, 1, SIZE), _socket),
    ("an eventfd", Inflight(LEAST, 0, 1, SIZE), lambda: os.eventfd(0)),
    ("a file to be read", Inflight(LEAST, 0, 1, SIZE), lambda: _file(1 << 16, mode=os.O_RDONLY)),
    ("a file to be written", Inflight(LEAST, 0, 1, SIZE), lambda: _file(1 << 16, mode=os.O_WRONLY)),
    ("version 2", Inflight(1 << 16, 0, 1, SIZE), lambda: _with_header(2, SIZE)),
    ("version 65535", Inflight(1 << 16, 0, 1, SIZE), lambda: _with_header(0xFFFF, SIZE)),
    ("states of fewer", Inflight(1 << 16, 0, 1, SIZE), lambda: _with_header(1, SIZE - 1)),
    ("states of more", Inflight(1 << 16, 0, 1, SIZE), lambda: _with_header(1, 0xFFFF)),
    ("features", Inflight(1 << 16, 0, 1, SIZE), lambda: _with_header(1, SIZE, 1)),
]


@pytest.mark.row("R11", "qemu@758ef96a", "qemu@fbdfdbb9", "qemu@b9d248df", "qemu@bf21298c")
@pytest.mark.parametrize(("payload", "file"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_region_that_cannot_be_changes_nothing(server: Server, payload: Inflight, file: Callable[[], int]) -> None:
    with guest(server.path) as g, region(g) as held:
        give(g, held.payload, held.fd)
        session = server.backend.session
        assert session is not None
        records = session.rings.records
        fd = file()
        try:
            with pytest.raises(MessageError, match="Refused"):
                give(g, payload, fd)
        finally:
            os.close(fd)
        assert session.rings.records is records is not None
        # The one from before is used.
        g.setup()
        g.front.enable(0)
        g.request(1)
        assert held.header() == (1, SIZE)


def test_a_front_end_that_wants_no_answer_to_a_bad_region_is_left(server: Server) -> None:
    with guest(server.path) as g:
        fd = _file(8)
        g.front.send(R.SET_INFLIGHT_FD, Inflight(LEAST, 0, 1, SIZE), [fd])
        os.close(fd)
        with pytest.raises(PeerDisconnected):
            g.front.receive()
    assert eventually(lambda: server.backend.session is None)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == "InflightRegion"
    del g


def test_no_other_region_comes_while_rings_run(server: Server) -> None:
    with guest(server.path) as g, region(g) as held, region(g) as other:
        g.setup()
        g.front.enable(0)
        with pytest.raises(MessageError, match="Refused"):
            give(g, held.payload, held.fd)
        g.request(1)
        g.front.get_base(0)
        give(g, other.payload, other.fd)
        start(g, base=1)
        g.request(2)
        assert (held.header(), other.header()) == ((0, 0), (1, SIZE))


@pytest.mark.parametrize("packed", FORMATS)
def test_one_from_an_offset_with_room_to_spare_and_a_larger_ring_size(server: Server, packed: bool) -> None:
    with guest(server.path, packed=packed) as g:
        fd = _file(1 << 16)
        give(g, Inflight(0x8000, 0x1008, 1, 2 * SIZE), fd)
        g.setup()
        g.front.enable(0)
        for number in range(SIZE + 3):
            g.request(number)
        assert os.pread(fd, 0x1008, 0) == bytes(0x1008)
        assert struct.unpack("=HH", os.pread(fd, 4, 0x1008 + 8)) == (1, 2 * SIZE)
        os.close(fd)


# --- what is in flight ----------------------------------------------------------------------------------------


@pytest.mark.row("M08", "M20")
@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize("junk", [0, 0xFFFF, 0x1234])
def test_the_next_front_end_connection_goes_on_from_the_record(keeper: Server, packed: bool, junk: int) -> None:
    """The same process serves both: what the first connection left is in the record alone."""
    numbers = list(range(6))
    with guest(keeper.path, packed=packed) as g, region(g) as held:
        g.queue = DriverQueue(g.memory, g.config)
        start(g, held)
        for number in numbers:
            g.post(number)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 6)
        keeper.loop.call_soon(lambda: [device(keeper).answer(device(keeper).taken[at]) for at in (4, 1)])
        assert g.used(2) == [4, 1]
        assert len(held.heads()) == 4
        g.front.close()
        assert eventually(lambda: keeper.backend.session is None)
        with guest(keeper.path, packed=packed) as again:
            again.front.share(g.memory)
            g.front = again.front
            # QEMU sends where the used ring is; of a packed ring it does not know, and the upper half may be anything.
            start(g, held, base=(junk << 16 | 0x8000) if packed else 2)
            # Nobody has kicked.
            assert eventually(lambda: len(device(keeper).taken) == 4)
            got = [REQUEST.unpack(chain.read())[0] for chain in device(keeper).taken]
            assert got == [0, 2, 3, 5]
            assert g.front.get_status() & Status.DEVICE_NEEDS_RESET == 0
            g.post(6)
            g.kick()
            assert eventually(lambda: len(device(keeper).taken) == 5)
            keeper.loop.call_soon(lambda: [device(keeper).answer(chain) for chain in device(keeper).taken[::-1]])
            assert g.used(5) == [6, 5, 3, 2, 0]
            assert held.heads() == []


@pytest.mark.parametrize("packed", FORMATS)
def test_the_driver_is_told_of_what_it_may_not_have_heard_of(server: Server, packed: bool) -> None:
    with guest(server.path, packed=packed) as g, region(g) as held:
        g.setup()
        start(g, held)
        g.request(1)
        g.front.close()
        assert eventually(lambda: server.backend.session is None)
        with guest(server.path, packed=packed) as again:
            again.front.share(g.memory)
            g.front = again.front
            start(g, held, base=0x8000 if packed else 1)
            ring = g.ring
            assert ring is not None
            assert eventually(lambda: ring.call.drain() > 0)


@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize("how", ["base", "reset", "status"])
def test_a_ring_that_ends_leaves_nothing_in_flight(keeper: Server, packed: bool, how: str) -> None:
    with guest(keeper.path, packed=packed) as g, region(g) as held:
        g.setup()
        start(g, held)
        for number in range(3):
            g.post(number)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 3)
        assert len(held.heads()) == 3
        if how == "base":
            # What was not answered goes back, so the ring stands where it began.
            fresh = 0x8000_8000 if packed else 0
            assert g.front.get_base(0) == fresh
            assert held.heads() == []
        elif how == "reset":
            g.front.request(R.RESET_DEVICE)
        else:
            g.front.set_status(1)
            g.front.set_status(0)
        assert held.header()[0] == 0, "it is nobody's record"
        # A driver that begins anew in the same memory.
        g.setup(base=0x8000 if packed else 0)
        g.front.enable(0)
        g.post(9)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 1)
        keeper.loop.call_soon(lambda: device(keeper).answer(device(keeper).taken[0]))
        g.sent = {token: number for token, number in g.sent.items() if number == 9}
        assert g.used() == [9]


@pytest.mark.parametrize("packed", FORMATS)
def test_a_ring_that_begins_elsewhere_is_another_one(keeper: Server, packed: bool) -> None:
    """Whoever sets it up anew without having stopped it, and not where it stands, has begun anew."""
    with guest(keeper.path, packed=packed) as g, region(g) as held:
        g.setup()
        start(g, held)
        g.post(1)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 1)
        keeper.loop.call_soon(lambda: device(keeper).answer(device(keeper).taken[0]))
        assert g.used() == [1]
        g.post(2)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 1)
        g.front.request(R.SET_VRING_BASE, VringState(0, 0x8000 if packed else 0))
        assert held.header()[0] == 0
        g.sent.clear()
        g.setup()
        g.front.enable(0)
        g.post(3)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 1)
        keeper.loop.call_soon(lambda: device(keeper).answer(device(keeper).taken[0]))
        assert g.used() == [3]


@pytest.mark.parametrize("packed", FORMATS)
def test_a_disabled_ring_goes_on_with_its_record(keeper: Server, packed: bool) -> None:
    with guest(keeper.path, packed=packed) as g, region(g) as held:
        g.setup()
        start(g, held)
        for number in range(3):
            g.post(number)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 3)
        keeper.loop.call_soon(lambda: device(keeper).answer(device(keeper).taken[1]))
        assert g.used() == [1]
        g.front.enable(0, on=False)
        # The newest went back; the oldest could not any more, and was answered with nothing.
        assert held.header()[0] == 1
        assert held.heads() == []
        g.front.enable(0)
        assert eventually(lambda: len(device(keeper).taken) == 1)
        assert [REQUEST.unpack(chain.read())[0] for chain in device(keeper).taken] == [2]
        assert len(held.heads()) == 1


# --- records that cannot be -----------------------------------------------------------------------------------

HOSTILE: list[tuple[str, bool, list[tuple[int, bytes]]]] = [
    ("inflight 2", False, [(16, b"\x02")]),
    ("inflight 255", False, [(16 + 16 * 127, b"\xff")]),
    ("used_idx", False, [(16, b"\x01"), (14, b"\xff\x7f")]),
    ("last_batch_head", False, [(16, b"\x01"), (14, b"\xff\xff"), (12, b"\x80\x00")]),
    ("next in a circle", False, [(16, b"\x01"), (14, b"\xfe\xff"), (12, b"\x00\x00"), (22, b"\x00\x00")]),
    ("next beyond", False, [(16, b"\x01"), (14, b"\xfe\xff"), (12, b"\x00\x00"), (22, b"\xff\xff")]),
    ("inflight 3", True, [(32, b"\x03")]),
    ("used_idx", True, [(16, b"\x80\x00")]),
    ("old_used_idx", True, [(18, b"\xff\xff")]),
    ("wrap counter", True, [(20, b"\x02")]),
    ("free_head", True, [(12, b"\x05\x00"), (14, b"\x05\x00")]),
    ("free list in a circle", True, [(34 + 32 * 7, b"\x03\x00")]),
    ("num 0", True, [(32, b"\x01\x00\x01\x00\x00\x00\x00\x00"), (12, b"\x01\x00\x01\x00")]),
    ("num beyond", True, [(32, b"\x01\x00\x01\x00\x00\x00\xff\xff"), (12, b"\x01\x00\x01\x00")]),
    ("last", True, [(32, b"\x01\x00\x01\x00\xff\xff\x01\x00"), (12, b"\x01\x00\x01\x00")]),
]


@pytest.mark.row("R11", "qemu@758ef96a", "qemu@fbdfdbb9", "qemu@b9d248df", "qemu@bf21298c")
@pytest.mark.parametrize(("packed", "defects"), [each[1:] for each in HOSTILE], ids=[each[0] for each in HOSTILE])
def test_a_record_that_cannot_be_stops_its_ring_and_nothing_else(
    server: Server, packed: bool, defects: list[tuple[int, bytes]]
) -> None:
    with guest(server.path, packed=packed) as g, region(g) as held:
        # A good one first: made by the back-end itself.
        g.setup()
        start(g, held)
        g.front.close()
        assert eventually(lambda: server.backend.session is None)
        for at, data in defects:
            held.put(at, data)
        spoiled = held.content()
        with guest(server.path, packed=packed) as again:
            start(again, held, base=0x8000 if packed else 0)
            ring = again.ring
            assert ring is not None
            assert eventually(lambda: ring.error.drain() > 0)
            assert again.front.get_status() & Status.DEVICE_NEEDS_RESET
            session = server.backend.session
            assert session is not None
            broken = session.rings.rings[0].broken
            assert isinstance(broken, MessageError)
            assert (broken.rule, broken.queue) == ("InflightState", 0)
            assert held.content() == spoiled
            # A reset begins a record of its own.
            again.front.request(R.RESET_DEVICE)
            again.setup()
            again.front.enable(0)
            again.request(7)
            assert held.header() == (1, SIZE)


@pytest.mark.row("R11", "R02")
def test_a_region_that_is_cut_short_stops_its_ring_and_nothing_else(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with guest(server.path) as g:
        fd = _file(1 << 16)
        give(g, Inflight(1 << 16, 0, 1, SIZE), fd)
        g.setup()
        g.front.enable(0)
        g.request(1)
        os.ftruncate(fd, 0)
        g.post(2)
        g.kick()
        ring = g.ring
        assert ring is not None
        assert eventually(lambda: ring.error.drain() > 0)
        assert g.queue is not None
        assert not g.queue.has_used(), "nothing is announced that is recorded nowhere"
        session = server.backend.session
        assert session is not None
        assert "the record of what is in flight is lost" in str(session.rings.rings[0].broken)
        os.close(fd)
    # What is logged keeps what it was raised over.
    caplog.clear()
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(3)


def test_a_record_is_no_reason_to_believe_a_ring(keeper: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What is in flight is validated again, from memory that has changed since."""
    with guest(keeper.path) as g, region(g) as held:
        g.setup()
        start(g, held)
        g.post(1)
        g.kick()
        assert eventually(lambda: len(device(keeper).taken) == 1)
        g.front.close()
        assert eventually(lambda: keeper.backend.session is None)
        layout = g.config.layout()
        g.memory.write(layout.at("desc.addr", held.heads()[0]), b"\xff" * 8)
        with guest(keeper.path) as again:
            again.front.share(g.memory)
            start(again, held)
            ring = again.ring
            assert ring is not None
            assert eventually(lambda: ring.error.drain() > 0)
            session = keeper.backend.session
            assert session is not None
            assert "AddressWraps" in str(session.rings.rings[0].broken)
    caplog.clear()


def test_more_in_flight_than_the_record_has_room_for_is_refused_at_the_start(server: Server) -> None:
    with guest(server.path) as g, region(g, queue_size=SIZE // 2) as held:
        g.setup()
        start(g, held)
        ring = g.ring
        assert ring is not None
        assert eventually(lambda: ring.error.drain() > 0)
        session = server.backend.session
        assert session is not None
        assert "a ring of 128 and a record for 64" in str(session.rings.rings[0].broken)


@pytest.mark.row("R11", "M20")
def test_a_record_that_became_too_small_for_its_format_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """The region came for split rings, and then the driver accepts packed ones: their records are larger."""
    device = BaseDevice(45, handlers={0: lambda data: data, 1: lambda data: data}, queue_sizes=(SIZE, SIZE))
    with serving(tmp_path / "s", device) as server, guest(server.path, packed=True) as g:
        packed = g.front.features
        g.front.set_features(packed - FeatureSet("RING_PACKED"))
        with region(g, queues=2) as held:
            give(g, held.payload, held.fd)
            held.put(held.payload.size // 2 + 16, b"\xee" * 64)
            before = held.content()
            g.front.set_features(packed)
            start(g)
            assert eventually(lambda: bool(g.front.get_status() & Status.DEVICE_NEEDS_RESET))
            assert held.content() == before
            session = server.backend.session
            assert session is not None
            broken = session.rings.rings[0].broken
            assert isinstance(broken, MessageError)
            assert (broken.rule, broken.queue) == ("InflightRegion", 0)


def test_the_state_of_a_queue_counts_only_without_a_record() -> None:
    from virtio_test._core import DeviceQueue, GuestMemory, InflightArea, InflightPart, QueueConfig, RingLayout

    memory = GuestMemory([(0, 1 << 16)])
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000, packed=True))
    fd = _file(1 << 12)
    area = InflightArea(1 << 12, fd=fd)
    os.close(fd)
    part = area.part(64, 8)
    assert (area.size, part.entries, InflightPart.bytes(8, True), InflightPart.bytes(8, False)) == (4096, 8, 288, 144)
    at = QueueState(0x8003)
    first = DeviceQueue(memory, config, state=at, record=part)
    assert (first.state, first.keeps_record, first.left) == (at, True, 0)
    second = DeviceQueue(memory, config, state=QueueState(5), record=part)
    assert second.state == at
    second.reset()
    assert (second.keeps_record, second.state) == (False, QueueState(0x8000))
    part.clear()
    assert DeviceQueue(memory, config, state=QueueState(5), record=part).state == QueueState(5)
    for offset, entries in ((4, 8), (0, 0), (4096, 1), (4080, 1), ((1 << 64) - 8, 8)):
        with pytest.raises(ValueError, match="no record of"):
            area.part(offset, entries)
    assert "4096" in repr(int(area.size))
    assert repr(part) == "<InflightPart of 8 descriptors>"

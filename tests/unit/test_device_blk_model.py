"""The block device against a model of 40 lines, over requests cut in any way, right ones and wrong ones.

For every chain: what the driver reads back, what the image has become, and that the device wrote nowhere else. The
same requests go to an image in memory and to one in a file, through Python and through the native service, which copies
where memory is traced and lets the operating system do it elsewhere. Whatever comes, no handler raises, nothing breaks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import GuestMemory, Trace
from virtio_test.carrier.loopback import Loopback
from virtio_test.devices.blk import BlkDevice
from virtio_test.driver.base import Driver
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import FEATURE_NAMES, HEADER, SEGMENT, RequestType

from .class_world import RINGS

SECTORS = 16
SIZE = SECTORS * 512
OK, IOERR, UNSUPP = 0, 1, 2
CLASS = FeatureSet("FLUSH", "CONFIG_WCE", "DISCARD", "WRITE_ZEROES", "LIFETIME", "MQ", device=FEATURE_NAMES)
LIFETIME = (1, 2, 3)
SERIAL = b"model".ljust(20, b"\0")


class Model:
    """What must become of an image, written down as plainly as can be."""

    def __init__(self, content: bytes, *, read_only: bool) -> None:
        self.image = bytearray(content)
        self.read_only = read_only

    def answer(self, readable: bytes, writable: int) -> bytes:
        """What is in the writable part afterwards, as far as it counts as written."""
        if not writable:
            return b""
        room = writable - 1
        status, data = self.do(readable, room)
        return data.ljust(room, b"\0") + bytes([status])

    def do(self, readable: bytes, room: int) -> tuple[int, bytes]:
        if len(readable) < 16:
            return IOERR, b""
        kind, _, sector = HEADER.unpack(readable[:16])
        data, start = readable[16:], sector * 512
        if kind == 0:
            good = room % 512 == 0 and start + room <= SIZE
            return (OK, bytes(self.image[start : start + room])) if good else (IOERR, b"")
        if kind == 1:
            if self.read_only or len(data) % 512 or start + len(data) > SIZE:
                return IOERR, b""
            self.image[start : start + len(data)] = data
            return OK, b""
        if kind == 4:
            return OK, b""
        if kind == 8:
            return (OK, SERIAL) if room == 20 else (IOERR, b"")
        if kind == 10:
            return (OK, b"\1\0\2\0\3\0") if room == 6 else (IOERR, b"")
        if kind in (11, 13) and not self.read_only:
            return self.zero(data, most=64 if kind == 11 else 16, flags=0 if kind == 11 else 1), b""
        return UNSUPP, b""

    def zero(self, data: bytes, *, most: int, flags: int) -> int:
        if not data or len(data) % 16 or len(data) > 16 * most:
            return IOERR
        segments = list(SEGMENT.iter_unpack(data))
        if any(each[2] & ~flags for each in segments):
            return UNSUPP
        if any(sector + count > SECTORS for sector, count, _ in segments):
            return IOERR
        for sector, count, _ in segments:
            self.image[sector * 512 : (sector + count) * 512] = bytes(count * 512)
        return OK


@dataclass
class Chain:
    """The bytes of a chain and how they are cut."""

    readable: list[bytes]
    writable: list[int]
    queue: int
    indirect: bool


def cut(length: int, places: Sequence[int]) -> list[tuple[int, int]]:
    ends = sorted({place % length for place in places} - {0}) if length else []
    return list(zip([0, *ends], [*ends, length], strict=True)) if length else []


sectors = st.one_of(
    st.integers(0, SECTORS - 1), st.integers(SECTORS - 4, SECTORS + 1), st.sampled_from([2**55, 2**63, 2**64 - 1])
)
kinds = st.one_of(
    st.sampled_from([RequestType.IN, RequestType.OUT]),
    st.sampled_from(list(RequestType)),
    st.sampled_from([2, 3, 5, 15, 0x8000_0001, 2**32 - 1]),
)
segments = st.lists(
    st.tuples(sectors, st.one_of(st.integers(0, SECTORS + 1), st.just(2**32 - 1)), st.sampled_from([0, 0, 0, 1, 2, 3])),
    max_size=18,
).map(lambda parts: b"".join(SEGMENT.pack(*part) for part in parts))
good_segments = st.lists(st.tuples(st.integers(0, SECTORS - 1), st.just(1), st.just(0)), min_size=1, max_size=4).map(
    lambda parts: b"".join(SEGMENT.pack(*part) for part in parts)
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, int]:
    """Readable bytes and writable room: mostly as they should be, then with something wrong."""
    kind = draw(kinds)
    sector = draw(sectors)
    data, room = b"", 0
    if kind == RequestType.IN:
        room = 512 * draw(st.integers(0, 4))
    elif kind == RequestType.OUT:
        data = bytes([draw(st.integers(1, 255))]) * (512 * draw(st.integers(0, 4)))
    elif kind == RequestType.GET_ID:
        room = 20
    elif kind == RequestType.GET_LIFETIME:
        room = 6
    elif kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES, RequestType.SECURE_ERASE):
        data = draw(st.one_of(segments, good_segments))
    readable = HEADER.pack(kind, draw(st.sampled_from([0, 7])), sector) + data
    wrong = draw(st.integers(0, 9))
    if wrong == 0:
        readable = readable[: draw(st.integers(0, len(readable)))]
    elif wrong == 1:
        readable += draw(st.binary(min_size=1, max_size=40))
    elif wrong == 2:
        room += draw(st.integers(1, 600))
    elif wrong == 3:
        return readable, draw(st.integers(0, room))
    return readable, room + 1


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    readable, room = draw(requests())
    if not readable and not room:
        readable = b"?"
    places = st.lists(st.integers(0, 4000), max_size=5)
    return Chain(
        [readable[start:end] for start, end in cut(len(readable), draw(places))],
        [end - start for start, end in cut(room, draw(places))],
        draw(st.integers(0, 1)),
        draw(st.booleans()),
    )


class World:
    """One device over one image, and a driver that sends whatever it is told."""

    def __init__(
        self, image: bytearray | int, *, ring: str, read_only: bool, native: bool = False, traced: bool = True
    ) -> None:
        self.trace = Trace() if traced else None
        self.device = BlkDevice(
            image, read_only=read_only, num_queues=2, serial="model", lifetime=LIFETIME, native=native
        )
        self.loopback = Loopback(self.device, memory=GuestMemory([(0, 1 << 20)], trace=self.trace))
        self.driver = Driver(self.loopback, wanted=RINGS[ring] | CLASS, indirect=True)
        self.driver.initialize()

    def send(self, chain: Chain) -> bytes:
        request = self.driver.submit(
            chain.queue, chain.readable, chain.writable, indirect=chain.indirect, publish=False
        )
        places = list(request.writable)
        for address, length in places:
            self.driver.memory.write(address, b"\xee" * length)
        if self.trace is not None:
            self.trace.clear()
        self.driver.flush(chain.queue)
        answer = request.wait()
        assert request.written == len(answer)
        if self.trace is not None:
            writes = [(each.address, each.address + each.length) for each in self.trace.log() if each.kind == "write"]
            assert bool(writes) == bool(answer)
            for start, end in writes:
                assert any(place <= start and end <= place + length for place, length in places)
        return answer

    def content(self) -> bytes:
        out = bytearray(SIZE)
        self.device.image.read_into(memoryview(out), 0)
        return bytes(out)

    def unharmed(self) -> None:
        assert self.loopback.errors == []
        assert self.device.handler_errors == 0
        assert self.device.counters.host_errors == 0


@pytest.mark.timeout(900)  # a deep run takes minutes
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("read_only", [False, True])
@given(content=st.integers(0, 2**32), sent=st.lists(chains(), min_size=1, max_size=6))
def test_the_device_does_what_the_model_does(ring: str, read_only: bool, content: int, sent: list[Chain]) -> None:
    start = (content.to_bytes(5, "little") * SIZE)[:SIZE]
    model = Model(start, read_only=read_only)
    fds = [os.memfd_create("image") for _ in range(3)]
    try:
        for fd in fds:
            os.pwrite(fd, start, 0)
        worlds = [
            World(bytearray(start), ring=ring, read_only=read_only),
            World(fds[0], ring=ring, read_only=read_only),
            World(fds[1], ring=ring, read_only=read_only, native=True),
            World(fds[2], ring=ring, read_only=read_only, native=True, traced=False),
        ]
        for chain in sent:
            expected = model.answer(b"".join(chain.readable), sum(chain.writable))
            for world in worlds:
                assert world.send(chain) == expected
                assert world.content() == bytes(model.image)
        for world in worlds:
            world.unharmed()
            assert world.device.counters == worlds[0].device.counters
        met = worlds[0].device.counters
        assert len(sent) == sum(getattr(met, name) for name in ("ok", "ioerr", "unsupp", "no_status"))
        for world in worlds:
            world.device.close()
    finally:
        for fd in fds:
            os.close(fd)


@given(
    sent=st.lists(
        st.tuples(st.lists(st.binary(min_size=1, max_size=60), max_size=4), st.lists(st.integers(1, 700), max_size=4))
    )
)
def test_arbitrary_bytes_are_answered_one_for_one(sent: list[tuple[list[bytes], list[int]]]) -> None:
    world = World(bytearray(b"\x5a" * SIZE), ring="split", read_only=False)
    model = Model(b"\x5a" * SIZE, read_only=False)
    for readable, writable in sent:
        if readable or writable:
            answer = world.send(Chain(readable, writable, 0, indirect=False))
            assert answer == model.answer(b"".join(readable), sum(writable))
    assert world.content() == bytes(model.image)
    world.unharmed()

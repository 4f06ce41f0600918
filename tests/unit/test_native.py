"""Devices that are served by native services, in the owner loop and in threads, over a real socket and in process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from virtio_test._core import DriverQueue, EntropyService, GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import MonotonicClock
from virtio_test.device import Holdable, Threaded
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.image import FileImage
from virtio_test.devices.native import NativeDevice, Threads, WaitStrategy
from virtio_test.devices.rng import RngDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.rng import RngDriver
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, QueueViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.blk import HEADER
from virtio_test.status import Status
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.payloads import U64

from .class_world import RINGS, WAYS, indirect, reach
from .disks import content, disk
from .pci_world import COMMAND, DEVICE_ID, MASTER_AND_BARS, SIZE, World
from .test_vhost_user_registers import connected
from .vhost_user_world import Server, serving
from .world import PATIENCE, eventually, open_fds

HOW = pytest.mark.parametrize("wait", [None, "blocking", "adaptive", "busy"])
THREADED = pytest.mark.parametrize("wait", ["blocking", "adaptive", "busy"])
RING = pytest.mark.parametrize("ring", ["split", "packed"])
DISK = bytes(range(256)) * 1024
PAGE = 4096


def wanted(ring: str) -> FeatureSet:
    return FeatureSet("VERSION_1", "EVENT_IDX", "INDIRECT_DESC", *(["RING_PACKED"] if ring == "packed" else []))


@contextmanager
def served(path: Path, wait: WaitStrategy | None, **options: int) -> Generator[tuple[BlkDevice, Server]]:
    device = disk(DISK, native=True, wait=wait, **options)
    with serving(path, device) as server:
        yield device, server
    device.close()
    assert device.workers == []


# --- what it is --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no file"):
        BlkDevice(bytearray(512), native=True)
    with pytest.raises(InvalidArgument, match="native=True"):
        BlkDevice(bytearray(512), wait="busy")
    with pytest.raises(InvalidArgument, match="source of its own"):
        RngDevice(source=bytes, native=True)
    for wrong in ({"wait": "wild"}, {"spin": -1.0}, {"spin": float("nan")}, {"cpus": ()}):
        with pytest.raises(InvalidArgument):
            Threads(**wrong)  # pyright: ignore[reportArgumentType]
    service = RngDevice(native=True)
    assert isinstance(service, Holdable)
    assert isinstance(service, Threaded)
    entropy = EntropyService()
    for indices, chains in (((0, 1), {}), ((2,), {}), ((0,), {0: len})):
        with pytest.raises(InvalidArgument):
            NativeDevice(4, services={indices: entropy}, chains=chains, queue_sizes=(8, 8))  # pyright: ignore[reportArgumentType]


@WAYS
def test_every_request_in_the_owner_loop(way: str) -> None:
    device = disk(DISK, native=True, lifetime=(1, 2, 3))
    driver = BlkDriver(reach(device, way), wanted=RINGS[way] | device.features, indirect=indirect(way))
    driver.initialize()
    assert driver.read(1, 3) == DISK[512:2048]
    driver.write(2, b"new" * 170 + b"..")
    assert content(device)[1024:1536] == b"new" * 170 + b".."
    assert driver.identify() == "virtio-test"
    beyond = driver.submit(0, [HEADER.pack(0, 0, len(DISK) // 512)], [513])
    assert beyond.wait() == bytes(512) + b"\1"
    met = device.counters
    assert (met.ok, met.ioerr, met.read, met.written) == (3, 1, 1536, 512)
    driver.reset()
    device.close()


@WAYS
def test_random_bytes_in_the_owner_loop(way: str) -> None:
    device = RngDevice(native=True)
    driver = RngDriver(reach(device, way), wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    one, other = driver.read(100_000), driver.read(100_000)
    assert one != other
    assert min(one.count(value) for value in range(256)) > 200
    assert device.delivered == 200_000


# --- threads, behind a real socket -------------------------------------------------------------------------------


@HOW
@RING
def test_a_disk_over_a_socket(tmp_path: Path, wait: WaitStrategy | None, ring: str) -> None:
    random, shadow = Random(1), bytearray(DISK)
    with served(tmp_path / "s", wait, num_queues=2) as (device, _), connected(tmp_path / "s") as registers:
        driver = BlkDriver(registers, wanted=wanted(ring) | device.features - FeatureSet("RING_PACKED", "IN_ORDER"))
        driver.initialize()
        assert len(device.workers) == (0 if wait is None else 2)
        for _ in range(40):
            sector, count = random.randrange(500), random.randint(1, 12)
            if random.random() < 0.5:
                data = random.randbytes(512 * count)
                driver.write(sector, data)
                shadow[512 * sector : 512 * (sector + count)] = data
            assert driver.read(sector, count) == shadow[512 * sector : 512 * (sector + count)]
        assert content(device) == shadow
        driver.reset()
        assert eventually(lambda: device.workers == [])
        driver.initialize()
        assert driver.read(0, 4) == shadow[:2048]


@HOW
def test_entropy_over_a_socket(tmp_path: Path, wait: WaitStrategy | None) -> None:
    device = RngDevice(native=True, wait=wait)
    with serving(tmp_path / "s", device), connected(tmp_path / "s") as registers:
        driver = RngDriver(registers)
        driver.initialize()
        assert len({driver.read(64) for _ in range(20)}) == 20
        assert device.delivered == 20 * 64


class Raw:
    """A front-end with one ring of the disk, whose descriptors a test chooses."""

    def __init__(self, front: FrontEnd, *, packed: bool = False, more: FeatureSet | None = None) -> None:
        want = FeatureSet("VERSION_1", *(["RING_PACKED"] if packed else []))
        self.front, self.memory = front, GuestMemory([(0, 1 << 20)])
        self.features = front.negotiate(want if more is None else want | more)
        front.share(self.memory)
        layout = RingLayout.contiguous(16, 0x1000, packed=packed)
        self.config = QueueConfig.from_layout(layout, features=self.features.bits)
        self.queue = DriverQueue(self.memory, self.config)
        self.ring = front.setup_ring(self.config)
        front.enable(0)

    def post(self, sector: int = 0, at: int = 0x20000) -> int:
        """A read of one sector, made available without a kick."""
        self.memory.write(0x10000, HEADER.pack(0, 0, sector))
        self.memory.fill(at, 513, 0xEE)
        token = self.queue.add([(0x10000, 16)], [(at, 513)])
        self.queue.publish()
        return token

    def read(self, sector: int = 0, at: int = 0x20000) -> None:
        token = self.post(sector, at)
        self.ring.kick.notify()
        assert self.used(token)
        assert self.memory.read(at, 513) == DISK[512 * sector : 512 * sector + 512] + b"\0"

    def used(self, token: int) -> bool:
        found: list[tuple[int, int]] = []
        return eventually(lambda: bool(found.extend(self.queue.get_used_many()) or found)) and found == [(token, 513)]

    def status(self) -> int:
        return self.front.number(Request.GET_STATUS)


@contextmanager
def raw(path: Path, *, packed: bool = False) -> Generator[Raw]:
    with FrontEnd(path, timeout=PATIENCE) as front:
        yield Raw(front, packed=packed)


@HOW
@RING
@pytest.mark.row("A09", "M11")
def test_a_broken_ring_is_told_of_once_and_set_up_anew(
    tmp_path: Path, wait: WaitStrategy | None, ring: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "virtio_test.vhost_user")
    with served(tmp_path / "s", wait) as (device, _), raw(tmp_path / "s", packed=ring == "packed") as guest:
        guest.read(3)
        guest.queue.add([(1 << 40, 16)], [(0x20000, 513)])
        guest.queue.publish()
        guest.ring.kick.notify()
        assert eventually(lambda: guest.ring.error.drain() > 0)
        assert guest.status() & 0x40
        assert device.workers == []
        assert guest.ring.error.drain() == 0
        assert [record.message.split(":")[0] for record in caplog.records] == ["queue 0 stopped"]
        assert "UnmappedAddress" in caplog.text
        guest.front.get_base(0)
        guest.queue = DriverQueue(guest.memory, guest.config)
        guest.ring = guest.front.setup_ring(guest.config, base=0x8000 * (ring == "packed"))
        guest.front.enable(0)
        guest.read(4)
        assert not guest.status() & 0x40


@THREADED
def test_the_table_and_the_base_wait_for_a_turn(tmp_path: Path, wait: WaitStrategy) -> None:
    """Memory is exchanged, the ring stopped and started, again and again, while it works."""
    with served(tmp_path / "s", wait) as (_, server), raw(tmp_path / "s") as guest:
        for turn in range(10):
            guest.read(turn)
            token = guest.post(turn)
            guest.ring.kick.notify()
            guest.front.share(guest.memory)
            base = guest.front.get_base(0)
            assert base in (2 * turn + 1, 2 * turn + 2)
            # What was not used is offered again where the ring goes on.
            guest.ring = guest.front.setup_ring(guest.config, base=base)
            guest.front.enable(0)
            assert guest.used(token)
        assert server.backend.session is not None
        assert not server.backend.session.rings.broken


@THREADED
def test_a_kick_fd_that_hangs_up_or_is_exchanged(tmp_path: Path, wait: WaitStrategy) -> None:
    with served(tmp_path / "s", wait) as (device, _), raw(tmp_path / "s") as guest:
        guest.read(0)
        for number in range(3):
            reader, writer = os.pipe()
            guest.front.send(Request.SET_VRING_KICK, U64(0), fds=[reader])
            guest.status()
            token = guest.post(number)
            os.write(writer, bytes(8))
            assert guest.used(token)
            os.close(reader)
            os.close(writer)
        assert eventually(lambda: wait != "blocking" or device.workers[0].deaf)
        fds = open_fds()
        guest.front.send(Request.SET_VRING_KICK, U64(0), fds=[guest.ring.kick.fileno()])
        guest.status()
        guest.read(7)
        assert open_fds() <= fds + 1


@HOW
def test_trouble_of_the_host_is_an_ioerr_and_a_line(
    tmp_path: Path, wait: WaitStrategy | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "virtio_test.device")
    with served(tmp_path / "s", wait) as (device, _), raw(tmp_path / "s") as guest:
        assert isinstance(device.image, FileImage)
        os.ftruncate(device.image.fileno(), 1024)
        token = guest.post(4)
        guest.ring.kick.notify()
        assert guest.used(token)
        assert guest.memory.read(0x20000, 513) == bytes(512) + b"\1"
        assert eventually(lambda: "answered IOERR (failure 1): " in caplog.text)
        assert (device.counters.host_errors, device.counters.ioerr) == (1, 1)
        guest.read(1)


def test_a_call_that_a_log_or_a_channel_wants_goes_through_the_loop(tmp_path: Path) -> None:
    """Who asked to hear of marked pages hears of them from the owner loop, whichever thread has marked them."""
    with served(tmp_path / "s", "busy") as (_, server), raw(tmp_path / "s") as guest:
        guest.read(0)
        assert server.backend.session is not None
        rings = server.backend.session.rings
        told = Notifier.eventfd()
        guest.front.send(Request.SET_LOG_FD, fds=[told.fileno()])
        guest.status()
        assert rings.marking.call is not None
        before = guest.ring.call.count
        guest.read(1)
        assert eventually(lambda: guest.ring.call.drain() > 0)
        assert before == 0


@HOW
@RING
def test_behind_an_iommu_and_with_a_log(tmp_path: Path, wait: WaitStrategy | None, ring: str) -> None:
    """What a chain lacks is asked for and waited for, and every page that is written is marked, whoever writes it."""
    device = disk(DISK, native=True, wait=wait)
    offered = device.features | FeatureSet("ACCESS_PLATFORM")
    with serving(tmp_path / "s", device, features=offered), connected(tmp_path / "s", iommu=True) as registers:
        driver = BlkDriver(registers, wanted=wanted(ring) | FeatureSet("ACCESS_PLATFORM"))
        driver.initialize()
        assert "ACCESS_PLATFORM" in driver.features
        for sector in range(0, 40, 4):
            assert driver.read(sector, 4) == DISK[512 * sector :][:2048]
        registers.start_log()
        registers.invalidate(0, 1 << 63)
        request = driver.submit(0, [HEADER.pack(0, 0, 3)], [513])
        ((where, _),) = request.writable
        assert request.wait() == DISK[1536:2048] + b"\0"
        assert where & ~0xFFF in registers.dirty_pages()
        registers.stop_log()
        driver.reset()
        driver.initialize()
        assert driver.read(5, 1) == DISK[2560:3072]
        assert registers.errors == []
    device.close()


@THREADED
@RING
def test_what_is_in_flight_is_recorded_by_threads_too(tmp_path: Path, wait: WaitStrategy, ring: str) -> None:
    """A back-end goes while requests are under way, and another one answers each of them, once."""
    path, first = tmp_path / "s", disk(DISK, native=True, wait=wait)
    server = Server(path, first)
    with connected(path, keep_in_flight=True) as registers:
        driver = BlkDriver(registers, wanted=wanted(ring))
        driver.initialize()
        assert driver.read(0, 1) == DISK[:512]
        requests = [driver.submit(0, [HEADER.pack(0, 0, number)], [513]) for number in range(20)]
        server.close()
        first.close()
        second = disk(DISK, native=True, wait=wait)
        with serving(path, second):
            registers.reconnect()
            for number, request in enumerate(requests):
                assert request.wait() == DISK[512 * number : 512 * number + 512] + b"\0"
            assert driver.read(30, 1) == DISK[15360:15872]
            assert second.counters.ok <= 21
        second.close()


# --- threads, in process -----------------------------------------------------------------------------------------


@THREADED
def test_a_function_that_is_no_bus_master_is_left_alone(wait: WaitStrategy) -> None:
    device = RngDevice(native=True, wait=wait, queue_size=SIZE, device_id=DEVICE_ID)
    world = World(device)
    queue = world.live()
    queue.add([], [(0x80000, 64)])
    queue.signal()
    world.notify(0)
    world.run()
    assert eventually(lambda: queue.get_used() is not None)
    world.set_config(COMMAND, 2, MASTER_AND_BARS & ~4)
    (worker,) = device.workers
    assert worker.parked
    queue.add([], [(0x80000, 64)])
    queue.signal()
    world.notify(0)
    world.run()
    before = world.memory.read(0, 1 << 20)
    threading.Event().wait(0.01)
    assert world.memory.read(0, 1 << 20) == before
    world.set_config(COMMAND, 2, MASTER_AND_BARS)
    world.run()
    assert eventually(lambda: queue.get_used() is not None)
    device.close()


@THREADED
def test_state_goes_round_with_threads(wait: WaitStrategy) -> None:
    device = disk(DISK, native=True, wait=wait)
    loopback = Loopback(device, loop=OwnerLoop(clock=MonotonicClock()))
    driver = BlkDriver(loopback)
    driver.initialize()
    for turn in range(5):
        driver.write(turn, b"%03d " % turn * 128)
        state = loopback.save()
        assert len(device.workers) == 1
        other = disk(content(device), native=True, wait=wait)
        loopback.restore(state, device=other)
        assert device.workers == []
        device.close()
        device = other
        assert driver.read(turn, 1) == b"%03d " % turn * 128
    driver.reset()
    assert device.workers == []
    device.close()


def test_a_ring_that_breaks_in_a_thread_breaks_the_device() -> None:
    device = disk(DISK, native=True, wait="adaptive")
    loopback = Loopback(device, loop=OwnerLoop(clock=MonotonicClock()))
    driver = BlkDriver(loopback)
    driver.initialize()
    layout = loopback.queue(0).layout()
    request = driver.submit(0, [HEADER.pack(0, 0, 0)], [513], publish=False)
    loopback.memory.write(layout.at("desc.addr", 0), (1 << 50).to_bytes(8, "little"))
    loopback.memory.write(layout.at("desc.addr", 1), (1 << 50).to_bytes(8, "little"))
    driver.flush(0)
    with pytest.raises(DeviceNeedsReset):
        request.wait()
    assert [type(error).__name__ for error in loopback.errors] == ["QueueViolation"]
    driver.reset()
    driver.initialize()
    assert driver.read(0, 1) == DISK[:512]
    device.close()


@pytest.mark.parametrize("suspend", [False, True])
def test_what_a_thread_finds_just_before_its_queue_stops_is_told(suspend: bool) -> None:
    """The thread has found the ring broken, and the queue stops before its owner has heard of it."""
    device = disk(DISK, native=True, wait="blocking")
    offered = device.features | FeatureSet("SUSPEND")
    loopback = Loopback(device, loop=OwnerLoop(clock=MonotonicClock()), offered=offered)
    driver = BlkDriver(loopback, wanted=offered)
    driver.initialize()
    assert driver.read(0, 1) == DISK[:512]
    queue = loopback.queue(0)
    driver.submit(0, [HEADER.pack(0, 0, 0)], [513], publish=False)
    layout = queue.layout()
    for slot in range(layout.size):
        loopback.memory.write(layout.at("desc.addr", slot), (1 << 50).to_bytes(8, "little"))
    driver.flush(0)
    # No turn of the loop: the worker is woken by hand.
    device.workers[0].wake()
    assert eventually(lambda: device.workers[0].broken == [0])
    if suspend:
        loopback.write_status(loopback.read_status() | Status.SUSPEND)
        assert loopback.loop.run(until=lambda: bool(loopback.read_status() & Status.DEVICE_NEEDS_RESET), timeout=5.0)
    else:
        loopback.save()
    assert loopback.read_status() & Status.DEVICE_NEEDS_RESET
    loopback.loop.run_pending()
    assert [error.rule for error in loopback.errors if isinstance(error, QueueViolation)] == ["UnmappedAddress"]
    assert len(loopback.errors) == 1
    driver.reset()
    driver.initialize()
    assert driver.read(0, 1) == DISK[:512]
    device.close()


@THREADED
def test_memory_that_only_the_owner_reaches_is_the_owners_to_serve(wait: WaitStrategy) -> None:
    device = RngDevice(native=True, wait=wait, queue_size=SIZE, device_id=DEVICE_ID)
    world = World(device)
    store = GuestMemory([(1 << 32, PAGE)])
    threads = set[int]()

    def write(address: int, data: bytes) -> None:
        threads.add(threading.get_ident())
        store.write(address, data)

    queue = world.live()
    for remote in (False, True, False):
        if remote:
            world.memory.add_remote(1 << 32, PAGE, read=store.read, write=write)
        where = 1 << 32 if remote else 0x80000
        queue.add([], [(where, 64)])
        queue.signal()
        world.notify(0)
        found: list[tuple[int, int]] = []

        def answered(found: list[tuple[int, int]] = found) -> bool:
            world.run()
            found.extend(queue.get_used_many())
            return bool(found)

        assert eventually(answered)
        assert [length for _, length in found] == [64]
        if remote:
            assert any(store.read(1 << 32, 64))
            assert device.workers[0].elsewhere
            world.memory.remove_region(1 << 32, PAGE)
            # Who changes the table has the device held meanwhile.
            world.set_config(COMMAND, 2, MASTER_AND_BARS & ~4)
            world.set_config(COMMAND, 2, MASTER_AND_BARS)
    assert threads == {threading.get_ident()}
    assert eventually(lambda: not device.workers[0].elsewhere)
    device.close()


@RING
def test_a_chain_of_tiny_buffers_is_answered_like_any_other(ring: str) -> None:
    """More parts than a system call takes, each of one byte or of some: the bytes are in their places."""
    device = disk(DISK, native=True, queue_size=1024)
    loopback = Loopback(device)
    driver = Driver(loopback, wanted=wanted(ring))
    driver.initialize()
    for length, count in ((1, 512), (8, 512), (300, 512), (512, 100)):
        total = length * count // 512 * 512
        sizes = [length] * (total // length) + ([total % length] if total % length else [])
        request = driver.submit(0, [HEADER.pack(0, 0, 1)], [*sizes, 1])
        assert request.wait() == content(device)[512 : 512 + total] + b"\0"
        data = Random(length).randbytes(total)
        pieces = [data[at : at + length] for at in range(0, total, length)]
        request = driver.submit(0, [HEADER.pack(1, 0, 100), *pieces], [1])
        assert request.wait() == b"\0"
        assert content(device)[51200 : 51200 + total] == data
    device.close()


def test_a_kick_fd_that_cannot_be_had_leaves_the_one_before_it() -> None:
    """Its number would be somebody else's file by the time that the next thread starts."""
    device = disk(DISK, native=True, wait="blocking")
    loopback = Loopback(device, loop=OwnerLoop(clock=MonotonicClock()))
    driver = BlkDriver(loopback)
    driver.initialize()
    first = Notifier.eventfd()
    assert device.take_kick(0, first.fileno())
    gone = os.dup(first.fileno())
    os.close(gone)
    with pytest.raises(InvalidArgument, match="not open"):
        device.take_kick(0, gone)
    # Its thread ends, and the next one waits for the fd that is left.
    driver.reset()
    driver.initialize()
    (worker,) = device.workers
    before = worker.turns
    first.notify()
    assert eventually(lambda: worker.turns > before)
    assert driver.read(0, 1) == DISK[:512]
    device.close()


def test_threads_of_a_device_that_is_none_are_nobodys() -> None:
    assert not isinstance(BaseDevice(45, handlers={}), Threaded)

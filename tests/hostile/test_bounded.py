"""A driver that never stops keeps nobody waiting, and costs no more the longer it goes on (CVE-2019-3900, U12, V12).

The driver here makes a new buffer available from inside the handler that gets the last: the ring is never empty.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from virtio_test._core import Chain, DriverQueue
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.carrier.pci import PciLoopback
from virtio_test.carrier.uml import UmlPci
from virtio_test.clock import MonotonicClock, Timer
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BUDGET, WEIGHT, BaseDevice, batched, kept
from virtio_test.devices.chains import ChainDevice
from virtio_test.devices.net import NetDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.driver.net import NetDriver
from virtio_test.driver.pci import open_pci
from virtio_test.errors import HandlerError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.net import FEATURE_NAMES, HEADER
from virtio_test.spec.pcidev import Op
from virtio_test.transport.bank import MAX_ERRORS
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import encode
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.payloads import U64

from tests.hostile.world import FORMATS, MIB, Attacker, Way, attacker, memory, reach, spare, upper, wanted
from tests.unit.uml_world import UmlKernel, command
from tests.unit.world import PATIENCE, ServerThread, eventually, mapped_files, open_fds

KINDS: Final = ("request", "batch", "kept", "chain")
SIZE: Final = 1024


def in_upper_case(chain: Chain) -> int:
    return chain.write(chain.read().upper())


class Patient(Attacker):
    """Does not care for what comes back in queue 0: the treadmill does."""

    def _called(self, queue_index: int) -> None:
        if queue_index:
            super()._called(queue_index)


class Treadmill:
    """A device whose queue 0 never runs dry, in one of the four ways to write a handler; queue 1 answers.

    Attributes:
        handled: chains so far.
        refill: called for each of them; what makes the next one available.
    """

    def __init__(self, kind: str, *, row: int = 16) -> None:
        self.handled = 0
        self.refill: Callable[[], object] = lambda: None
        self._row = row
        handlers: dict[str, Any] = {
            "request": self._request,
            "batch": batched(self._batch, request_size=row, response_size=0),
            "kept": kept(self._chain),
        }
        sizes = (SIZE, 8)
        if kind == "chain":
            chains = {0: self._answer, 1: in_upper_case}
            self.device: BaseDevice = ChainDevice(45, chains=chains, queue_sizes=sizes)
        else:
            self.device = BaseDevice(45, handlers={0: handlers[kind], 1: bytes.upper}, queue_sizes=sizes)

    def _one(self) -> None:
        self.handled += 1
        self.refill()

    def _request(self, _request: bytes) -> None:
        self._one()

    def _batch(self, requests: memoryview, _responses: memoryview) -> None:
        for _ in range(len(requests) // self._row):
            self._one()

    def _chain(self, chain: Chain) -> None:
        self._one()
        self.device.complete(chain)

    def _answer(self, _chain: Chain) -> int:
        self._one()
        return 0


def endless(queue: DriverQueue, address: int, length: int, *, publish: bool = True) -> Callable[[], None]:
    """Reaps what was used and makes one more buffer available."""

    def refill() -> None:
        queue.get_used_many()
        queue.add([(address, length)])
        if publish:
            queue.publish()

    return refill


# --- one turn ------------------------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2019-3900")
@FORMATS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "most"), [(16, BUDGET), (4096, WEIGHT // 4096), (3 * WEIGHT, 1)])
def test_one_turn_is_bounded(packed: bool, kind: str, length: int, most: int) -> None:
    """256 chains or 0x80000 bytes, whatever comes first; then the loop gets to the others, and comes back."""
    mill = Treadmill(kind, row=length)
    loopback = Loopback(mill.device, memory=memory(8 * MIB))
    driver = Attacker(loopback, wanted=wanted(packed=packed), arena=spare(loopback.memory))
    driver.initialize()
    loopback.loop.run_pending()
    mill.refill = refill = endless(driver.queues[0], 0, length)
    for _ in range(BUDGET - 40):
        refill()
    for _ in range(5):
        before = mill.handled
        assert mill.device.kicked(0) is True
        assert 0 < mill.handled - before <= most
    assert mill.device.queue(0).latched is None


@pytest.mark.row("CVE-2019-3900")
@pytest.mark.parametrize("kind", ["request", "kept", "chain"])
def test_a_handler_may_say_that_it_was_much_work(kind: str) -> None:
    mill = Treadmill(kind)
    _, driver = attacker(mill.device)
    feed = endless(driver.queues[0], 0, 16)

    def refill() -> None:
        feed()
        mill.device.charge(WEIGHT // 4)

    mill.refill = refill
    for _ in range(64):
        feed()
    for _ in range(5):
        before = mill.handled
        assert mill.device.kicked(0) is True
        assert mill.handled - before == 4


@pytest.mark.row("CVE-2019-3900")
def test_what_a_turn_writes_counts_too() -> None:
    device = BaseDevice(45, handlers={0: lambda _: bytes(WEIGHT // 8)}, queue_sizes=(SIZE,))
    _, driver = attacker(device, size=64 * MIB)
    requests = [driver.submit(0, [b"x"], [WEIGHT // 8], publish=False) for _ in range(40)]
    driver.queues[0].publish()
    assert device.kicked(0) is True
    assert device.queue(0).counters.pushed == 8
    driver.pen().kick()
    driver.loop.run_pending()
    assert all(request.done for request in requests)


@pytest.mark.row("CVE-2019-3900")
def test_a_ring_full_of_tiny_receive_buffers_is_much_work_for_a_frame() -> None:
    device = NetDevice()
    driver = NetDriver(
        Loopback(device),
        wanted=RING_FEATURES | FeatureSet("MRG_RXBUF", device=FEATURE_NAMES),
        buffers=256,
        buffer_size=1,
    )
    driver.initialize()
    # All 256 buffers are taken for each of these frames, and put back: they have room for 3328 bytes.
    for _ in range(100):
        driver.submit(1, [bytes(HEADER.size + 4000)])
    assert device.kicked(1)
    assert device.counters["dropped"] == 2
    driver.loop.run_pending()
    assert device.counters["dropped"] == 100


@pytest.mark.row("CVE-2019-3900")
def test_a_command_of_user_mode_linux_that_fills_a_bar_is_much_work() -> None:
    """17 bytes of a command make thousands of register accesses: a turn does one of those, not 256."""
    kernel = UmlKernel(upper(16))
    kernel.write_config(4, 2, 7)
    fill = command(Op.MMIO_MEMSET, 0, 0x4000, bar=4, data=b"\0")
    queue = kernel.outer.queues[0]
    arena = kernel.outer.arena
    where = arena.allocate(len(fill))
    kernel.memory.write(where, fill)
    for _ in range(5):
        queue.add([(where, len(fill))])
    queue.publish()
    done: list[int] = [kernel.uml.commands[Op.MMIO_MEMSET]]
    while kernel.uml.kicked(0):
        done.append(kernel.uml.commands[Op.MMIO_MEMSET])
    assert done[:5] == [0, 1, 2, 3, 4]
    assert isinstance(kernel.uml, UmlPci)


# --- who else is served --------------------------------------------------------------------------------------------


@contextmanager
def running(way: Way, mill: Treadmill, folder: Path) -> Generator[tuple[Patient, OwnerLoop]]:
    """The mill behind `way`, with its device's loop in another thread: the driver, and that loop."""
    ram = memory(8 * MIB)
    if way in ("vhost-user", "vfio-user"):
        with reach(mill.device, way, folder, ram=ram) as target:
            driver = Patient(target.registers, arena=spare(ram), timeout=PATIENCE)
            owner = target.backend.loop if target.backend is not None else target.bank and target.bank.loop
            assert owner is not None
            yield driver, owner
        return
    loop = OwnerLoop(clock=MonotonicClock())
    if way == "loopback":
        registers: Any = Loopback(mill.device, memory=ram, loop=loop)
    elif way == "mmio 2":
        registers = MmioRegisters(MmioLoopback(VirtioMmio(mill.device, memory=ram, loop=loop)))
    else:
        registers = open_pci(PciLoopback(VirtioPci(mill.device, memory=ram, loop=loop)))
    yield Patient(registers, arena=spare(ram), timeout=PATIENCE), loop


@pytest.mark.row("CVE-2019-3900")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["loopback", "mmio 2", "pci", "vhost-user", "vfio-user"])
def test_everybody_else_is_served_meanwhile(tmp_path: Path, way: Way, kind: str) -> None:
    """Timers, the other queue, registers or messages, and the end of the server."""
    mill = Treadmill(kind)
    with running(way, mill, tmp_path) as (driver, owner):
        driver.initialize()
        driver.loop.run_pending()
        ticks: list[float] = []
        owner.call_soon(lambda: Timer(owner.clock, lambda: ticks.append(0), first_after=0.001, every=0.001))
        mill.refill = endless(driver.queues[0], 0, 16)
        mill.refill()
        driver.pen().kick()
        busy = mill.handled
        for number in range(5):
            # Another queue; and each of its answers is a turn, or a message, of its own.
            text = b"request %d" % number
            assert driver.submit(1, [text], [len(text)]).wait() == text.upper()
            assert driver.registers.device_features()
            assert driver.registers.read_status() & 0x40 == 0
        assert eventually_in(driver, lambda: len(ticks) >= 3 and mill.handled > busy + BUDGET)
        # A reset is one message among others.
        driver.initialize()
        handled = mill.handled
        driver.loop.run_pending()
        assert mill.handled - handled <= BUDGET
        mill.refill = endless(driver.queues[0], 0, 16)
        mill.refill()
        driver.pen().kick()
        assert eventually_in(driver, lambda: mill.handled > handled + BUDGET)
        if way in ("vhost-user", "vfio-user"):
            # The connection ends, and the server can be stopped: both with the queue never empty.
            return
        stop = threading.Timer(0.02, owner.stop)
        stop.start()
        begin = time.monotonic()
        owner.run()
        stop.join()
        assert time.monotonic() - begin < PATIENCE / 2


def eventually_in(driver: Driver, holds: Callable[[], bool]) -> bool:
    """Run the driver's loop, which may be the device's, until something holds."""
    return driver.loop.run(until=holds, timeout=PATIENCE)


@pytest.mark.row("M02", "CVE-2019-3900")
def test_a_front_end_that_never_stops_talking_starves_nobody(tmp_path: Path) -> None:
    """Its messages come faster than they are read: the loop has turns for the others all the same."""
    backend = Backend(upper(), path=tmp_path / "s")
    flood = encode(Request.SET_OWNER) * 2000
    enough = threading.Event()
    with closing(ServerThread(tmp_path / "s", backend)), FrontEnd(tmp_path / "s", timeout=PATIENCE) as front:

        def talk() -> None:
            while not enough.is_set():
                front.socket.sendall(flood)

        talker = threading.Thread(target=talk)
        talker.start()
        try:
            for _ in range(50):
                turned = threading.Event()
                backend.loop.call_soon(turned.set)
                assert turned.wait(PATIENCE)
        finally:
            enough.set()
            talker.join(PATIENCE)
        assert front.number(Request.GET_FEATURES)


@pytest.mark.row("CVE-2019-3900")
def test_one_look_at_a_connection_reads_a_bounded_part(tmp_path: Path) -> None:
    """However much is there to read, a turn takes a few messages of it."""
    backend = Backend(upper(), path=tmp_path / "s")
    with closing(ServerThread(tmp_path / "s", backend)), FrontEnd(tmp_path / "s", timeout=PATIENCE) as front:
        front.negotiate()
        session = backend.session
        assert session is not None
        turns: list[int] = []
        sent = threading.Event()

        def count() -> bool:
            turns.append(session.status.value)
            return session.status.value != 3

        backend.loop.call_soon(lambda: sent.wait(PATIENCE))
        front.send_bytes(encode(Request.SET_STATUS, U64(1)) * 200 + encode(Request.SET_STATUS, U64(3)))
        backend.loop.pend("count", count)
        sent.set()
        assert eventually(lambda: turns[-1:] == [3])
        # Header and payload are a part each.
        assert len(turns) >= 400 // 64


@pytest.mark.row("D16", "M12")
def test_a_ring_that_is_broken_is_told_of_once_though_the_device_breaks_too(tmp_path: Path) -> None:
    """One ring by the driver, then all of them by the device itself: one signal of each err fd."""
    device = BaseDevice(45, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(8, 8))
    with reach(device, "vhost-user", tmp_path) as target:
        driver = Attacker(target.registers, arena=spare(target.registers.memory), timeout=PATIENCE)
        driver.initialize()
        backend = target.backend
        assert backend is not None
        session = backend.session
        assert session is not None
        errors = [ring.error for ring in session.rings.rings]
        driver.pen(1).chain((0x9000_0000, 1, 0))
        driver.pen(1).kick()
        assert eventually_in(driver, lambda: driver.broken is not None)
        assert [each.count for each in errors if each is not None] == [0, 1]
        for _ in range(2):
            backend.loop.call_soon(lambda: backend.broken(HandlerError("the device gives up")))
            assert eventually(lambda: all(ring.broken is not None for ring in session.rings.rings))
        backend.loop.call_soon(lambda: backend.broken(HandlerError("and again")))
        done = threading.Event()
        backend.loop.call_soon(done.set)
        assert done.wait(PATIENCE)
        assert [each.count for each in errors if each is not None] == [1, 1]
        driver.initialize()
        assert driver.submit(1, [b"again"], [5]).wait() == b"AGAIN"


# --- what it costs in the end --------------------------------------------------------------------------------------


def grows(kind: str, *, packed: bool, count: int) -> tuple[int, int]:
    """Bytes of Python's, and of the process, that `count` chains cost when thousands went before."""
    mill = Treadmill(kind)
    _, driver = attacker(mill.device, packed=packed)
    mill.refill = endless(driver.queues[0], 0, 16)
    mill.refill()

    def run(chains: int) -> None:
        end = mill.handled + chains
        while mill.handled < end:
            mill.device.kicked(0)

    run(3_000)
    gc.collect()
    tracemalloc.start()
    run(500)
    gc.collect()
    before, resident = tracemalloc.get_traced_memory()[0], rss()
    run(2_000)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    run(count - 2_000)
    gc.collect()
    assert mill.device.queue(0).in_flight <= SIZE
    return after - before, rss() - resident


@pytest.mark.row("U12")
@FORMATS
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_queue_does_not_grow(packed: bool, kind: str) -> None:
    """Neither Python's nor, as far as it shows, the core's: it is bounded by the size of the queue."""
    traced, resident = grows(kind, packed=packed, count=10_000)
    assert traced < 16 << 10
    assert resident < 2 << 20


@pytest.mark.deep
@pytest.mark.row("U12")
@FORMATS
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_chains_hold_no_more_memory_than_a_thousand(packed: bool, kind: str) -> None:
    traced, resident = grows(kind, packed=packed, count=100_000)
    assert traced < 16 << 10
    assert resident < 2 << 20


def rss() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def storm(count: int, folder: Path, way: Way, kind: str) -> None:
    """So many bad chains, each with the reset that it needs."""
    mill = Treadmill(kind)
    with reach(mill.device, way, folder) as target:
        driver = Attacker(target.registers, arena=spare(target.registers.memory), timeout=PATIENCE)
        driver.initialize()
        mill.refill = lambda: None

        def bad() -> None:
            driver.initialize()
            driver.pen().chain((0x9000_0000, 16, 0))
            driver.pen().kick()
            assert driver.loop.run(until=lambda: driver.broken is not None, timeout=PATIENCE)

        # What is kept for who asks what went wrong, a thousand errors, is there after these.
        for _ in range(max(20, count // 2)):
            bad()
        gc.collect()
        before = (open_fds(), mapped_files(), threading.active_count(), rss())
        for _ in range(count):
            bad()
        gc.collect()
        assert (open_fds(), mapped_files(), threading.active_count()) == before[:3]
        assert rss() - before[3] < 2 << 20
        driver.initialize()
        text = b"still here"
        assert driver.submit(1, [text], [len(text)]).wait() == text.upper()
        # What is counted begins anew with each reset, and what is kept is bounded.
        counters = mill.device.queue(0).counters
        assert (counters.popped, counters.pushed, counters.dropped, counters.rejected) == (0, 0, 0, 0)
        assert mill.device.queue(1).counters.pushed == 1
        assert mill.device.kept == []
        assert mill.handled == 0
        if target.bank is not None:
            assert len(target.bank.errors) <= MAX_ERRORS


STORMS: Final = [
    (way, kind) for way in ("loopback", "pci", "mmio 2", "vhost-user", "vfio-user") for kind in ("request", "kept")
]


@pytest.fixture
def quiet() -> Generator[None]:
    """Thousands of lines that say the same."""
    logger = logging.getLogger("virtio_test")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.row("U12")
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("way", "kind"), STORMS)
def test_bad_chains_leave_no_trace(tmp_path: Path, way: Way, kind: str) -> None:
    storm(60, tmp_path, way, kind)


@pytest.mark.deep
@pytest.mark.timeout(900)
@pytest.mark.row("U12")
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("way", "kind"), STORMS)
def test_ten_thousand_bad_chains_leave_no_trace(tmp_path: Path, way: Way, kind: str) -> None:
    storm(10_000, tmp_path, way, kind)

"""Native services and the threads that run them: by turns here, and by workers that wait, park, stop and tell."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import pytest
from virtio_test._core import (
    DeviceQueue,
    DriverQueue,
    EntropyService,
    GuestMemory,
    Notifier,
    QueueConfig,
    RingLayout,
    Service,
    Trace,
    Worker,
)
from virtio_test.errors import InvalidArgument, QueueViolation, StateError

from .remote_world import Other
from .world import eventually, open_fds

Wait = Literal["blocking", "adaptive", "busy"]

SIZE, QUEUE, DATA = 1 << 20, 16, 0x80000
EVENT_IDX, RING_PACKED = 1 << 29, 1 << 34
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
WAITS = pytest.mark.parametrize("wait", ["blocking", "adaptive", "busy"])
EVENTS = pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])


class World:
    """One queue with both of its ends, a kick and a call that are eventfds."""

    def __init__(
        self, *, packed: bool = False, features: int = 0, memory: GuestMemory | None = None, base: int = 0x1000
    ) -> None:
        self.memory = GuestMemory([(0, SIZE)]) if memory is None else memory
        self.kick, self.call = Notifier.eventfd(), Notifier.eventfd()
        layout = RingLayout.contiguous(QUEUE, base, packed=packed)
        config = QueueConfig.from_layout(layout, features=features | RING_PACKED * packed)
        self.driver = DriverQueue(self.memory, config, kick=self.kick)
        self.device = DeviceQueue(self.memory, config, call=self.call)

    def ask(self, length: int = 64, *, at: int = DATA) -> int:
        """Make a buffer available, and kick if that is wanted."""
        token = self.driver.add([], [(at, length)])
        self.driver.signal()
        return token

    def spoil(self) -> None:
        """Make a descriptor available that lies nowhere."""
        self.driver.add([], [(SIZE << 8, 64)])
        self.driver.signal()

    def answered(self, count: int = 1) -> list[tuple[int, int]]:
        """What is used, as soon as it is `count` buffers."""
        found: list[tuple[int, int]] = []

        def enough() -> bool:
            found.extend(self.driver.get_used_many())
            return len(found) >= count

        assert eventually(enough), f"{found} after {self.device.counters}"
        return found


@pytest.fixture(autouse=True)
def everything_ends() -> Generator[None]:
    threads = tasks()
    yield
    # A thread of an earlier test may end meanwhile.
    assert eventually(lambda: tasks() <= threads)


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


# --- turns ---------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("kind", ["mapped", "traced", "remote"])
def test_a_turn_answers_what_is_there_of_every_kind_of_memory(packed: bool, kind: str) -> None:
    trace = Trace() if kind == "traced" else None
    memory = Other().memory if kind == "remote" else GuestMemory([(0, SIZE)], trace=trace)
    at = 0x8000 if kind == "remote" else DATA
    world = World(packed=packed, memory=memory)
    memory.fill(at, 192)
    tokens = [world.ask(64, at=at), world.ask(32, at=at + 64), world.ask(96, at=at + 96)]
    service = EntropyService(limit=64)
    assert service.turn([world.device]) == (3, False)
    assert world.driver.get_used_many() == [(tokens[0], 64), (tokens[1], 32), (tokens[2], 64)]
    assert any(memory.read(at, 64))
    assert any(memory.read(at + 96, 64))
    assert memory.read(at + 160, 32) == bytes(32)
    assert service.counters == {"delivered": 160, "odd": 0, "failed": 0}
    assert (world.call.drain(), world.device.in_flight) == (1, 0)
    assert service.turn([world.device]) == (0, False)
    assert world.call.drain() == 0


@FORMATS
def test_a_turn_ends_at_its_bounds_and_loses_nothing(packed: bool) -> None:
    world = World(packed=packed)
    tokens = [world.ask(64) for _ in range(10)]
    service = EntropyService()
    assert service.turn([world.device], limit=3) == (3, True)
    # With the chain that reaches it: two of 64 bytes.
    assert service.turn([world.device], max_bytes=65) == (2, True)
    assert world.device.in_flight == 0
    assert service.turn([world.device]) == (5, False)
    assert [token for token, _ in world.driver.get_used_many()] == tokens


@FORMATS
def test_a_broken_ring_raises_once_behind_what_was_good(packed: bool) -> None:
    world = World(packed=packed)
    good = world.ask()
    world.spoil()
    service = EntropyService()
    with pytest.raises(QueueViolation, match="UnmappedAddress"):
        # What it has answered by then stays answered.
        service.turn([world.device])
    assert world.driver.get_used_many() == [(good, 64)]
    assert world.device.latched is not None
    assert service.turn([world.device]) == (0, False)


def test_buffers_that_make_no_sense_are_counted_and_answered() -> None:
    world = World()
    memory = world.memory
    memory.write(DATA, b"\xaa" * 8)
    readable = world.driver.add([(DATA, 8)])
    both = world.driver.add([(DATA, 8)], [(DATA + 8, 8)])
    world.driver.signal()
    service = EntropyService()
    assert service.turn([world.device]) == (2, False)
    assert world.driver.get_used_many() == [(readable, 0), (both, 8)]
    assert service.counters["odd"] == 2
    assert memory.read(DATA, 8) == b"\xaa" * 8


def test_a_turn_and_a_worker_want_the_right_queues() -> None:
    service, world, other = EntropyService(), World(), World()
    assert service.queues == 1
    for queues in ([], [world.device, other.device], [world.device, world.device]):
        with pytest.raises(InvalidArgument, match="works on 1 queue"):
            service.turn(queues)
        with pytest.raises(InvalidArgument, match="works on 1 queue"):
            Worker(service, queues)
    with pytest.raises(InvalidArgument, match="limit"):
        service.turn([world.device], limit=0)
    with pytest.raises(InvalidArgument, match="limit"):
        EntropyService(limit=0)
    with pytest.raises(TypeError):
        Service()


def test_a_worker_says_what_it_cannot_be() -> None:
    service, world = EntropyService(), World()
    for wrong in ("spinning", ""):
        with pytest.raises(InvalidArgument, match="'blocking', 'adaptive' or 'busy'"):
            Worker(service, [world.device], wait=wrong)  # pyright: ignore[reportArgumentType]
    for spin in (-1.0, 1e7, float("nan")):
        with pytest.raises(InvalidArgument, match="microseconds"):
            Worker(service, [world.device], wait="adaptive", spin=spin)
    with pytest.raises(InvalidArgument, match="CPU 1000000"):
        Worker(service, [world.device], cpu=1_000_000)
    with pytest.raises(InvalidArgument, match="not open"):
        Worker(service, [world.device], [999_999])
    with Path("/dev/null").open("rb") as file, pytest.raises(InvalidArgument, match="neither an eventfd nor a pipe"):
        Worker(service, [world.device], [file.fileno()])


# --- workers -------------------------------------------------------------------------------------------------


@WAITS
@FORMATS
@EVENTS
def test_a_worker_answers_whoever_kicks_it(wait: Wait, packed: bool, features: int) -> None:
    world = World(packed=packed, features=features)
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait=wait)
    for _ in range(50):
        token = world.ask()
        assert world.answered() == [(token, 64)]
    assert world.call.drain() > 0
    worker.stop()
    assert not worker.running
    assert worker.chains == 50


@WAITS
def test_what_lies_there_already_needs_no_kick(wait: Wait) -> None:
    world = World()
    tokens = [world.ask() for _ in range(5)]
    world.kick.drain()
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait=wait)
    assert [token for token, _ in world.answered(5)] == tokens
    worker.stop()


@FORMATS
def test_kicks_are_suppressed_while_it_looks_and_wanted_when_it_waits(packed: bool) -> None:
    world = World(packed=packed, features=EVENT_IDX)
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait="busy")
    world.answered(0)
    assert eventually(lambda: worker.turns > 0)
    for _ in range(20):
        world.ask()
        world.answered()
    # The event index of a fresh ring asks for the first one.
    assert world.kick.count <= 1
    worker.stop()
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait="blocking")
    for _ in range(20):
        time.sleep(0.001)
        world.ask()
        world.answered()
    assert world.kick.count > 0
    worker.stop()


def test_the_driver_is_called_once_for_a_turn() -> None:
    world = World()
    worker = Worker(EntropyService(), [world.device], [])
    worker.park()
    for _ in range(8):
        world.ask()
    worker.resume()
    world.answered(8)
    worker.stop()
    assert world.call.count == 1


@WAITS
def test_a_parked_worker_touches_nothing(wait: Wait) -> None:
    world = World(features=EVENT_IDX)
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait=wait)
    world.ask()
    world.answered()
    for _ in range(20):
        worker.park()
        assert worker.parked
        turns, ring = worker.turns, world.memory.read(0x1000, 0x2000)
        world.driver.add([], [(DATA, 64)])
        world.driver.publish()
        before = world.memory.read(0x1000, 0x2000)
        worker.wake()
        world.kick.notify()
        time.sleep(0.002)
        assert world.memory.read(0x1000, 0x2000) == before != ring
        assert worker.turns == turns
        worker.resume()
        world.answered()
    worker.stop()


def test_parks_nest_and_a_parked_worker_can_be_stopped() -> None:
    world = World()
    worker = Worker(EntropyService(), [world.device])
    with pytest.raises(StateError, match="not parked"):
        worker.resume()
    worker.park()
    worker.park()
    worker.resume()
    assert worker.parked
    world.ask()
    worker.wake()
    time.sleep(0.002)
    assert world.driver.get_used() is None
    worker.stop()
    worker.stop()
    assert not worker.running


def test_the_table_changes_under_a_worker_that_works() -> None:
    world = World()
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait="busy")
    for turn in range(50):
        world.memory.add_region(1 << 32, 4096)
        token = world.ask()
        assert world.answered() == [(token, 64)], turn
        world.memory.remove_region(1 << 32, 4096)
    worker.stop()


@WAITS
@FORMATS
def test_a_broken_ring_is_told_once_and_spins_nothing(wait: Wait, packed: bool) -> None:
    world, told = World(packed=packed), threading.Event()
    count = 0

    def tell() -> None:
        nonlocal count
        count += 1
        told.set()

    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait=wait, tell=Notifier.callback(tell))
    good = world.ask()
    world.spoil()
    assert told.wait(10)
    assert world.device.latched is not None
    assert world.device.latched.rule == "UnmappedAddress"
    assert world.answered() == [(good, 64)]
    # It sleeps now: time passes, and it does not use any.
    assert eventually(lambda: spent(0.02) < 0.01)
    for _ in range(5):
        world.kick.notify()
        time.sleep(0.001)
    assert (count, worker.running) == (1, True)
    worker.stop()


def spent(seconds: float) -> float:
    """Processor time of this process while it sleeps."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


@pytest.mark.parametrize("how", ["hung up", "never drained"])
def test_a_kick_that_is_ready_for_ever_is_let_go_of(how: str) -> None:
    world, told = World(), threading.Event()
    one, two = socket.socketpair()
    if how == "hung up":
        kick, other = os.pipe()
        os.close(other)
    else:
        # Readable, and nothing to take: the other end of a socket was shut down by half.
        two.shutdown(socket.SHUT_WR)
        kick = os.dup(one.fileno())
    worker = Worker(EntropyService(), [world.device], [kick], tell=Notifier.callback(told.set))
    assert told.wait(10)
    assert worker.deaf
    assert eventually(lambda: spent(0.02) < 0.01)
    token = world.ask()
    worker.wake()
    assert world.answered() == [(token, 64)]
    worker.set_kicks([world.kick.fileno()])
    assert not worker.deaf
    token = world.ask()
    assert world.answered() == [(token, 64)]
    worker.stop()
    os.close(kick)
    one.close()
    two.close()


def test_a_kick_that_is_filled_all_the_time_keeps_nobody_from_parking() -> None:
    world = World()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()

    def fill() -> None:
        while not ended.is_set():
            try:
                os.write(writer, bytes(4096))
            except BlockingIOError:
                time.sleep(0.0001)

    filler = threading.Thread(target=fill)
    filler.start()
    worker = Worker(EntropyService(), [world.device], [reader])
    for _ in range(20):
        worker.park()
        worker.resume()
        token = world.ask()
        assert world.answered() == [(token, 64)]
    worker.stop()
    ended.set()
    filler.join()
    os.close(reader)
    os.close(writer)


def test_remote_memory_is_left_to_the_owner() -> None:
    told = threading.Event()
    other = Other()
    world, service = World(memory=other.memory), EntropyService()
    worker = Worker(service, [world.device], [world.kick.fileno()], tell=Notifier.callback(told.set), wait="busy")
    assert told.wait(10)
    told.clear()
    assert worker.elsewhere
    token = world.ask(at=0x8000)
    assert told.wait(10)
    assert service.turn([world.device]) == (1, False)
    assert world.driver.get_used_many() == [(token, 64)]
    assert worker.turns == 0
    worker.stop()


def test_a_worker_that_is_forgotten_ends() -> None:
    count = tasks()

    def forget() -> None:
        world, known = World(), list[object]()
        # A cycle: what its owner is told with knows the worker.
        known.append(Worker(EntropyService(), [world.device], wait="busy", tell=Notifier.callback(known.clear)))
        assert tasks() == count + 1

    fds = open_fds()
    forget()
    assert open_fds() <= fds
    assert eventually(lambda: tasks() <= count)


@WAITS
def test_in_a_child_of_fork_it_does_not_run_and_holds_nobody(wait: Wait) -> None:
    world = World()
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()], wait=wait)
    child = os.fork()
    if not child:
        status = 1
        try:
            # Kill it, whatever this process does at an alarm.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            worker.park()
            worker.resume()
            worker.set_kicks([])
            worker.wake()
            quiet = not worker.running and not worker.parked
            worker.stop()
            del worker
            status = 0 if quiet else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.running
    token = world.ask()
    assert world.answered() == [(token, 64)]
    worker.stop()


def test_a_callback_in_its_thread_cannot_wait_for_it() -> None:
    world, refused = World(), list[str]()

    def call() -> None:
        try:
            worker.park()
        except StateError as error:
            refused.append(str(error))
        worker.stop()

    world.device.set_call(Notifier.callback(call))
    worker = Worker(EntropyService(), [world.device], [world.kick.fileno()])
    world.ask()
    world.answered()
    assert eventually(lambda: not worker.running)
    assert refused == ["a worker cannot wait for its own turn to end"]
    worker.stop()
    world.device.set_call(None)


def test_it_runs_where_it_is_told_to() -> None:
    world = World()
    cpu = max(os.sched_getaffinity(0))
    worker = Worker(EntropyService(), [world.device], cpu=cpu)
    placed = [
        os.sched_getaffinity(int(task.name))
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text("ascii").strip() == "virtio-worker"
    ]
    assert placed == [{cpu}]
    assert repr(worker).startswith("<Worker running, ")
    worker.stop()
    assert repr(worker).startswith("<Worker stopped, ")

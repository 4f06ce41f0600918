"""Interrupts, and whoever comes in between: nothing is lost with them, and nobody waits for himself.

What would wait for ever does so in a process of its own: cases are functions of this module, which a child runs.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_test._core import (
    Chain,
    DeviceQueue,
    DriverQueue,
    EntropyService,
    GuestMemory,
    Notifier,
    PacketService,
    QueueConfig,
    RingLayout,
    Worker,
)
from virtio_test.devices.base import BaseDevice, batched, kept
from virtio_test.devices.chains import ChainDevice
from virtio_test.devices.console import ConsoleDevice
from virtio_test.devices.net import NetDevice
from virtio_test.errors import HandlerError, QueueViolation, StaleMemory, StateError

from .remote_world import DATA, FORMATS, PAGE, RING, SIZE, Other, config, ends, raising
from .test_device import RINGS, bring_up

ROOT = Path(__file__).parents[2]
FAR = 1 << 32
"""Where remote memory begins, beside a ring that is mapped."""


def ends_well(case: Callable[..., None], *args: str) -> None:
    """Run `case(*args)` in a process that is given twenty seconds, and see it end as it should."""
    script = f"from {__name__} import {case.__name__} as case; case(*{args!r})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ----------------------------------------------------------------------------------------- who would wait for himself


def a_worker_inside_a_call(how: str) -> None:
    faulthandler.dump_traceback_later(20, exit=True)
    other = Other()
    _, queue = ends(other.memory, packed=False)
    workers = [Worker(EntropyService(), [queue])]
    while not workers[0].elsewhere:
        time.sleep(0.001)
    seen = list[str]()

    def inside(_: int) -> None:
        other.before = int
        # It will wait for the queue, which this thread has.
        workers[0].wake()
        time.sleep(0.05)
        try:
            {"park": workers[0].park, "stop": workers[0].stop, "drop": workers.clear}[how]()
        except StateError as error:
            seen.append(str(error))

    other.before = inside
    assert not queue.has_work()
    refused = "a worker cannot be waited for by the functions that read and write remote memory"
    assert seen == ([] if how == "drop" else [refused])
    # And what it is part of goes on.
    assert queue.in_flight == 0


@pytest.mark.parametrize("how", ["park", "stop", "drop"])
def test_a_worker_is_not_waited_for_inside_a_call(how: str) -> None:
    ends_well(a_worker_inside_a_call, how)


def a_worker_that_nobody_stops(how: str) -> None:
    faulthandler.dump_traceback_later(20, exit=True)
    memory = GuestMemory([(0, SIZE)])
    rung = list[int]()
    driver = DriverQueue(memory, config(packed=False))

    def ring() -> None:
        rung.append(1)
        driver.get_used_many()
        driver.add([], [(DATA, 16)])
        driver.publish()

    queue = DeviceQueue(memory, config(packed=False), call=Notifier.callback(ring))
    for _ in range(4):
        driver.add([], [(DATA, 16)])
    driver.publish()
    worker = Worker(EntropyService(), [queue], wait="busy", limit=1)
    while len(rung) < 10:
        time.sleep(0.001)
    if how == "kept":
        # Longer than anything else.
        sys.kept = worker  # pyright: ignore[reportAttributeAccessIssue]
    else:
        sys.modules["__main__"].__dict__.update(worker=worker, queue=queue, driver=driver)


@pytest.mark.parametrize("how", ["kept", "global"])
def test_a_worker_that_calls_python_does_not_outlive_it(how: str) -> None:
    for _ in range(3):
        ends_well(a_worker_that_nobody_stops, how)


def a_look_at_a_batch_whose_memory_is_lost() -> None:
    faulthandler.dump_traceback_later(20, exit=True)
    fd = os.memfd_create("cut", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    memory = GuestMemory([(0, SIZE)])
    memory.add_region(SIZE, PAGE, fd=fd)
    driver, queue = ends(memory, packed=False)
    driver.add([(SIZE, 4)])
    driver.publish()
    batch = queue.pop_many()
    os.ftruncate(fd, 0)
    seen = list[str]()

    # As a signal handler would, or a finalizer: while the exception is made.
    def look(*_: object) -> None:
        seen.append(repr(batch))

    sys.setprofile(look)
    try:
        batch.requests(4)
    except QueueViolation as error:
        sys.setprofile(None)
        assert error.rule == "MemoryLost"  # noqa: PT017 - whoever looks may not know pytest
    assert "<Batch of 1 chains>" in seen


def test_a_batch_can_be_looked_at_while_it_raises() -> None:
    ends_well(a_look_at_a_batch_whose_memory_is_lost)


# ----------------------------------------------------------------------------------------------------- native services


@FORMATS
def test_an_interrupted_turn_tells_the_driver_what_it_has_answered(packed: bool) -> None:
    other, rung = Other(PAGE), list[int]()
    memory = GuestMemory([(0, SIZE)])
    memory.add_remote(FAR, PAGE, read=other.read, write=other.write)
    driver = DriverQueue(memory, config(packed=packed))
    queue = DeviceQueue(memory, config(packed=packed), call=Notifier.callback(lambda: rung.append(1)))
    driver.add([], [(DATA, 16)])
    driver.add([], [(FAR, 16)])
    driver.publish()
    other.before = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        EntropyService().turn([queue])
    assert rung == [1]
    assert driver.get_used() == (0, 16)


def test_an_interrupt_in_one_callback_of_a_turn_is_not_lost_behind_an_error_in_another() -> None:
    memory = GuestMemory([(0, SIZE)])
    configs = [
        QueueConfig.from_layout(RingLayout.contiguous(8, RING + 0x2000 * index), index=index) for index in range(2)
    ]
    drivers = [DriverQueue(memory, each) for each in configs]

    def failing() -> None:
        raise ValueError("no")

    def interrupted() -> None:
        raise KeyboardInterrupt

    queues = [
        DeviceQueue(memory, each, call=Notifier.callback(call))
        for each, call in zip(configs, (failing, interrupted), strict=True)
    ]
    service = PacketService("loopback")
    service.set_up()
    drivers[0].add([], [(DATA, 1600)])
    drivers[1].add([(DATA + 0x1000, 100)])
    for driver in drivers:
        driver.publish()
    with pytest.raises(KeyboardInterrupt):
        service.turn(queues)


def test_whoever_gets_translations_is_told_though_the_driver_cannot_be() -> None:
    physical, memory = GuestMemory([(0, SIZE)]), GuestMemory()
    memory.translate(physical, add=[(0, DATA, 0, True, True)])
    missed = list[int]()

    def failing() -> None:
        raise ValueError("no")

    both = config(packed=False)
    driver = DriverQueue(physical, both)
    queue = DeviceQueue(memory, both, call=Notifier.callback(failing), miss=Notifier.callback(lambda: missed.append(1)))
    driver.add([], [(DATA - 64, 16)])
    driver.add([], [(DATA, 16)])
    driver.publish()
    with pytest.raises(ValueError, match="no"):
        EntropyService().turn([queue])
    assert missed == [1]
    assert driver.get_used() == (0, 16)


# -------------------------------------------------------------------------------------------- requests that cannot be


@FORMATS
def test_a_request_that_cannot_be_read_is_kept_and_no_other_with_it(packed: bool) -> None:
    other = Other()
    driver, queue = ends(other.memory, packed=packed)
    for number in range(4):
        driver.add([(DATA + 64 * number, 4)], [(DATA + 64 * number + 32, 4)])
    driver.publish()
    seen = list[bytes]()

    def before(address: int) -> None:
        if address == DATA + 64:
            raise OSError("gone")

    other.before = before
    with pytest.raises(StaleMemory) as caught:
        queue.process(lambda request: seen.append(request) or request)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(seen) == 1, "the one before it"
    failed = queue.take_failed()
    assert failed is not None
    assert failed.segments[0][0] == DATA + 64
    assert queue.take_failed() is None
    assert queue.in_flight == 1
    assert queue.push(failed, 0)
    assert queue.process(lambda request: request) == 2
    assert sorted(driver.get_used_many()) == [(0, 4), (1, 0), (2, 4), (3, 4)]


class Lone:
    """A bus with nobody on it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.errors: list[Exception] = []

    def broken(self, error: Exception) -> None:
        self.errors.append(error)


def lone(device: BaseDevice, memory: GuestMemory, *, packed: bool, index: int = 0) -> tuple[Lone, DriverQueue]:
    bus = Lone(memory)
    device.attach(bus)  # pyright: ignore[reportArgumentType]
    layout = QueueConfig.from_layout(RingLayout.contiguous(16, RING, packed=packed), index=index)
    driver = DriverQueue(memory, layout)
    device.activate(device.features)
    device.start_queue(DeviceQueue(memory, layout))
    return bus, driver


def turns(device: BaseDevice) -> int:
    return next(turn for turn in range(1, 20) if not device.kicked(0))


@FORMATS
@pytest.mark.parametrize("way", ["request", "batch"])
def test_complete0_answers_a_request_that_cannot_be_read_once(packed: bool, way: str) -> None:
    other = Other()

    def answer(_: memoryview, responses: memoryview) -> None:
        responses[:] = b"y" * len(responses)

    def answer_one(_: bytes) -> bytes:
        return b"yyyy"

    handler = batched(answer, request_size=4, response_size=4) if way == "batch" else answer_one
    device = BaseDevice(7, handlers={0: handler}, on_handler_error="complete0")
    bus, driver = lone(device, other.memory, packed=packed)
    for number in range(5):
        driver.add([(DATA + 64 * number, 4)], [(DATA + 64 * number + 32, 4)])
    driver.publish()

    def before(address: int) -> None:
        if address == DATA + 64:
            raise OSError("gone")

    other.before = before
    assert turns(device) < 10
    assert sorted(driver.get_used_many()) == [(0, 4), (1, 0), (2, 4), (3, 4), (4, 4)]
    assert (device.handler_errors, bus.errors, device.queue(0).in_flight) == (1, [], 0)


def test_complete0_takes_no_request_for_one_that_was_answered() -> None:
    """Memory for a response goes while a batch is handled: those that come after it are none of that."""
    memory = GuestMemory([(0, SIZE), (SIZE, PAGE)])
    batches = list[int]()

    def answer(requests: memoryview, responses: memoryview) -> None:
        batches.append(len(requests))
        if len(batches) == 1:
            memory.remove_region(SIZE, PAGE)
        responses[:] = b"y" * len(responses)

    handler = batched(answer, request_size=1, response_size=1, limit=2)
    device = BaseDevice(7, handlers={0: handler}, on_handler_error="complete0")
    _, driver = lone(device, memory, packed=False)
    driver.add([(DATA, 1)], [(SIZE, 1)])
    for number in range(4):
        driver.add([(DATA, 1)], [(DATA + 64 + number, 1)])
    driver.publish()
    turns(device)
    assert sorted(driver.get_used_many()) == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert batches == [2, 2, 1]


def test_what_shows_no_bytes_says_why() -> None:
    released = memoryview(b"1234")
    released.release()
    memory = GuestMemory([(0, SIZE)])
    driver, queue = ends(memory, packed=False)
    driver.add([(DATA, 4)])
    driver.add([(DATA, 4)])
    driver.publish()
    for given, cause in ((released, ValueError), (5, TypeError)):
        with pytest.raises(HandlerError, match=f"returned {type(given).__name__}") as caught:
            queue.process(lambda _, given=given: given, limit=1)  # pyright: ignore[reportArgumentType]
        assert isinstance(caught.value.__cause__, cause)
        failed = queue.take_failed()
        assert failed is not None
        queue.push(failed, 0)
    far = GuestMemory()
    far.add_remote(0, PAGE, read=lambda _, __: released, write=None)
    with pytest.raises(ValueError, match="the transfer at") as failure:
        far.read(0, 4)
    assert isinstance(failure.value.__cause__, TypeError)
    assert isinstance(failure.value.__cause__.__cause__, ValueError)


def test_input_for_a_console_whose_ring_cannot_be_reached_breaks_the_console() -> None:
    other = Other()
    device = ConsoleDevice(print)
    bus, driver = lone(device, other.memory, packed=False)
    driver.add([], [(DATA, 4)])
    driver.publish()

    layout = driver.layout()

    def before(address: int) -> None:
        # Whether the driver wants to be told of what was used.
        if address == layout.at("avail.flags") and ("write", layout.at("used.idx"), 2) in other.calls:
            raise OSError("gone")

    other.calls.clear()
    other.before = before
    assert device.feed(b"text") == 4
    (error,) = bus.errors
    assert isinstance(error, QueueViolation)


# ---------------------------------------------------------------------------------------------- interrupted handlers


def interrupted_once(way: str) -> tuple[BaseDevice, list[bytes]]:
    """A device that answers with what it was asked, and is interrupted at the second request, once."""
    asked = list[bytes]()

    def look(request: bytes) -> bytes:
        asked.append(request)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return request

    def look_at_all(requests: memoryview, responses: memoryview) -> None:
        responses[:] = look(bytes(requests))

    def look_at_chain(chain: Chain) -> int:
        return chain.write(look(chain.read()))

    def answer_chain(chain: Chain) -> None:
        device.complete(chain, look(chain.read()))

    device: BaseDevice
    if way == "chain":
        device = ChainDevice(7, chains={0: look_at_chain}, queue_sizes=(16,))
    else:
        handlers = {
            "request": look,
            "batch": batched(look_at_all, request_size=1, response_size=1, limit=1),
            "kept": kept(answer_chain),
        }
        device = BaseDevice(7, handlers={0: handlers[way]})
    return device, asked


@RINGS
@pytest.mark.parametrize("way", ["request", "batch", "kept", "chain"])
def test_a_request_whose_handler_was_interrupted_is_asked_again(ring: str, way: str) -> None:
    device, asked = interrupted_once(way)
    loopback, driver = bring_up(device, ring)
    requests = [driver.submit(0, [bytes([number])], [1]) for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        loopback.loop.run_pending()
    assert loopback.queue(0).in_flight == 0
    assert loopback.errors == []
    # Nobody kicks again: kicks were suppressed.
    loopback.loop.run_pending()
    assert [each.done for each in requests] == [True] * 4
    assert [each.wait() for each in requests] == [bytes([number]) for number in range(4)]
    assert asked == [b"\0", b"\1", b"\1", b"\2", b"\3"]


def kept_world(
    handler: Callable[[BaseDevice, Chain], None], memory: GuestMemory | None = None
) -> tuple[BaseDevice, Lone, DriverQueue]:
    """A device that keeps what it is asked, with two requests."""

    def keep(chain: Chain) -> None:
        handler(device, chain)

    device = BaseDevice(7, handlers={0: kept(keep)}, on_handler_error="complete0")
    bus, driver = lone(device, memory or GuestMemory([(0, SIZE)]), packed=False)
    for number in range(2):
        driver.add([(DATA + 64 * number, 4)], [(DATA + 64 * number + 32, 4)])
    driver.publish()
    return device, bus, driver


def test_an_answer_that_shows_no_bytes_leaves_the_request_to_be_answered() -> None:
    chains = list[Chain]()
    device, bus, driver = kept_world(lambda _, chain: chains.append(chain))
    turns(device)
    with pytest.raises(TypeError):
        device.complete(chains[0], "text")  # pyright: ignore[reportArgumentType]
    assert device.complete(chains[0], b"yyyy")
    assert not device.complete(chains[0], b"yyyy")
    assert driver.get_used_many() == [(0, 4)]
    # And in the handler, whose request is completed as one that failed.
    device, bus, driver = kept_world(lambda device, chain: device.complete(chain, "text") and None)  # pyright: ignore[reportArgumentType]
    turns(device)
    assert driver.get_used_many() == [(0, 0), (1, 0)]
    assert (device.handler_errors, bus.errors, device.queue(0).in_flight) == (2, [], 0)


def test_an_interrupted_answer_leaves_the_request_to_be_answered() -> None:
    other = Other()
    chains = list[Chain]()
    device, _, driver = kept_world(lambda _, chain: chains.append(chain), other.memory)
    turns(device)
    other.before = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        device.complete(chains[0], b"yyyy")
    other.before = int
    assert device.complete(chains[0], b"yyyy")
    assert driver.get_used_many() == [(0, 4)]


def test_a_handler_that_fails_takes_no_request_from_the_thread_that_answers_it() -> None:
    other = Other()
    threads = list[threading.Thread]()
    under_way, failed = threading.Event(), threading.Event()

    def before(address: int) -> None:
        if address == DATA + 32 and threading.current_thread() in threads:
            under_way.set()
            assert failed.wait(10)

    def hand_over(device: BaseDevice, chain: Chain) -> None:
        if threads:
            return
        threads.append(threading.Thread(target=device.complete, args=(chain, b"yyyy")))
        threads[0].start()
        assert under_way.wait(10)
        other.before = int
        threading.Timer(0.2, failed.set).start()
        raise ValueError("no")

    device, bus, driver = kept_world(hand_over, other.memory)
    other.before = before
    turns(device)
    threads[0].join(10)
    assert driver.get_used_many() == [(0, 4)]
    assert (device.handler_errors, bus.errors) == (1, [])


def test_an_interrupt_asks_nobody_again_whose_answer_had_nowhere_to_go() -> None:
    memory = GuestMemory([(0, SIZE), (SIZE, PAGE)])
    asked = list[bytes]()

    def answer(request: bytes) -> bytes:
        asked.append(request)
        if len(asked) == 2:
            memory.remove_region(SIZE, PAGE)
            raise KeyboardInterrupt
        return request

    device = BaseDevice(7, handlers={0: answer})
    bus, driver = lone(device, memory, packed=False)
    for number, at in enumerate((SIZE, DATA + 32)):
        memory.write(DATA + number, bytes([number]))
        driver.add([(DATA + number, 1)], [(at, 1)])
    driver.publish()
    with pytest.raises(KeyboardInterrupt):
        device.kicked(0)
    turns(device)
    assert asked == [b"\0", b"\1", b"\1"]
    assert sorted(driver.get_used_many()) == [(0, 0), (1, 1)]
    assert bus.errors == []


def test_input_whose_writing_is_interrupted_loses_no_buffer() -> None:
    other = Other()
    device = ConsoleDevice(print)
    _, driver = lone(device, other.memory, packed=False)
    driver.add([], [(DATA, 4)])
    driver.publish()

    def before(address: int) -> None:
        if address == DATA:
            raise KeyboardInterrupt

    other.before = before
    with pytest.raises(KeyboardInterrupt):
        device.feed(b"text")
    assert device.queue(0).in_flight == 0
    other.before = int
    device.kicked(0)
    assert driver.get_used_many() == [(0, 4)]
    assert other.memory.read(DATA, 4) == b"text"


def test_a_frame_whose_placing_is_interrupted_loses_no_buffer() -> None:
    other = Other()
    device = NetDevice("drop")
    _, driver = lone(device, other.memory, packed=False)
    for at in (DATA, DATA + 64):
        driver.add([], [(at, 64)])
    driver.publish()

    def before(address: int) -> None:
        # The frame needs both: it is interrupted in the second.
        if address == DATA + 64:
            raise KeyboardInterrupt

    other.before = before
    with pytest.raises(KeyboardInterrupt):
        device.deliver(b"f" * 100)
    assert device.queue(0).in_flight == 0
    other.before = int
    assert device.deliver(b"f" * 100)
    assert [length for _, length in driver.get_used_many()] == [64, 48]

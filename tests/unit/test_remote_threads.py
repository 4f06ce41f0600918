"""Functions that reach remote memory run in the middle of everything: what they may not do, and who waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from virtio_test._core import DeviceQueue, GuestMemory, Trace
from virtio_test.errors import InvalidArgument, StateError

from tests.unit.remote_world import DATA, FORMATS, PAGE, SIZE, Other, config, ends


@pytest.fixture
def other() -> Other:
    return Other()


@FORMATS
def test_inside_a_call_neither_this_memory_nor_a_queue_can_be_used(other: Other, packed: bool) -> None:
    driver, device = ends(other.memory, packed=packed)
    driver.add([(DATA, 4)], [(DATA + 64, 4)])
    driver.add([(DATA, 4)], [(DATA + 64, 4)])
    driver.publish()
    chain, batch = device.pop(), device.pop_many(1)
    assert chain is not None
    unrelated = GuestMemory([(0, SIZE)])
    elsewhere = ends(unrelated, packed=packed)
    refused: list[Callable[[], object]] = [
        lambda: other.memory.read(0, 1),
        lambda: other.memory.write(0, b"1"),
        lambda: other.memory.fill(0, 1),
        lambda: other.memory.copy(0, 8, 1),
        lambda: other.memory.read_into(0, bytearray(1)),
        lambda: other.memory.read(0, 60_000 + 10_000 - 5_000),
        lambda: other.memory.is_mapped(0, 1),
        lambda: other.memory.live_view(0, 1),
        lambda: other.memory.epoch,
        lambda: other.memory.regions,
        lambda: other.memory.add_region(1 << 32, PAGE),
        lambda: other.memory.add_remote(1 << 32, PAGE, read=other.read, write=None),
        lambda: other.memory.remove_region(0, SIZE),
        lambda: other.memory.replace([]),
        lambda: DeviceQueue(other.memory, config(packed=packed)),
        device.pop,
        device.has_work,
        device.pop_many,
        lambda: device.push(chain),
        lambda: device.unpop(chain),
        lambda: device.process(lambda _: b""),
        device.signal,
        lambda: device.in_flight,
        lambda: device.latched,
        device.stop,
        device.resume,
        device.reset,
        chain.read,
        lambda: chain.write(b""),
        lambda: chain.queue_index,
        lambda: len(batch),
        lambda: batch.requests(1),
        lambda: batch.respond(b"1"),
        lambda: driver.add([(DATA, 1)]),
        driver.signal,
        driver.get_used,
        lambda: driver.free,
        driver.detach,
        elsewhere[0].signal,
        elsewhere[1].pop,
    ]
    asked = 0

    def ask(_: int) -> None:
        nonlocal asked
        for call in refused:
            with pytest.raises(StateError):
                call()
        for thing in (device, driver, batch, other.memory):
            assert "in a transfer" in repr(thing)
        assert repr(chain)
        unrelated.write(0, b"12")
        assert unrelated.read(0, 2) == b"12"
        unrelated.add_region(1 << 32, PAGE)
        unrelated.remove_region(1 << 32, PAGE)
        asked += 1

    other.before = ask
    assert not device.has_work()
    other.memory.read(0, 1)
    other.memory.read(0, SIZE)  # without the GIL
    assert chain.read() == bytes(4)
    batch.requests(4)
    assert asked > 5
    other.before = int
    assert device.push(chain)
    assert batch.respond(b"1234") == 1
    assert len(driver.get_used_many()) == 2


def test_a_memory_may_be_reached_through_another_but_not_through_itself() -> None:
    outer, inner = Other(), Other()
    middle = GuestMemory()
    middle.add_remote(0, SIZE, read=inner.memory.read, write=inner.memory.write)
    outer.before = lambda address: middle.write(address, b"seen")
    outer.memory.read(DATA, 4)
    assert inner.store.read(DATA, 4) == b"seen"
    inner.before = lambda _: outer.memory.read(0, 1)
    with pytest.raises(InvalidArgument) as caught:
        outer.memory.read(DATA, 4)
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, StateError):
        cause = cause.__cause__
    assert isinstance(cause, StateError)


def test_changes_of_a_trace_reach_remote_memory_and_its_log_can_be_read_meanwhile() -> None:
    store, trace = GuestMemory([(0, SIZE)]), Trace()
    memory = GuestMemory(trace=trace)
    lengths = list[int]()

    def write(address: int, data: bytes) -> None:
        lengths.append(len(trace.log()))
        store.write(address, data)

    memory.add_remote(0, SIZE, read=store.read, write=write)
    device = DeviceQueue(memory, config(packed=False))
    trace.change_at(0, DATA, b"raced")
    trace.change_at(0, SIZE, b"nowhere")
    device.has_work()
    assert store.read(DATA, 5) == b"raced"
    assert trace.missed == 1
    assert lengths[0] == 1


@FORMATS
def test_threads_that_wait_for_a_queue_let_its_callbacks_run(
    other: Other, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback gives the GIL away while the lock is held: whoever waits for the lock must not keep the GIL."""
    other.memory.add_region(1 << 32, PAGE)
    driver, device = ends(other.memory, packed=packed)
    other.before = lambda _: time.sleep(0.0002)
    stop = threading.Event()
    served, wrong = list[bytes](), list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", wrong.append)

    def again(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            while not stop.is_set():
                work()

        return run

    def change() -> None:
        other.memory.add_remote(1 << 33, PAGE, read=other.read, write=None)
        other.memory.remove_region(1 << 33, PAGE)

    def serve() -> None:
        device.process(lambda request: served.append(request) or request)

    def look() -> None:
        assert device.in_flight <= 8
        assert driver.free <= 8
        repr(device)
        device.has_work()

    def churn() -> None:
        batch = device.pop_many(2)
        len(batch)
        batch.requests(2)
        del batch

    works = [serve, serve, look, change, churn, lambda: other.memory.read(DATA, 100_000 - 99_000)]
    threads = [threading.Thread(target=again(work), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    expected, got = set[int](), set[int]()
    deadline = time.monotonic() + 60
    while len(expected) < 20 and time.monotonic() < deadline and not wrong:
        if driver.free >= 2:
            expected.add(driver.add([(DATA, 4)], [(DATA + 64, 4)]))
            driver.signal()
        got |= {token for token, _ in driver.get_used_many()}
    while got != expected and time.monotonic() < deadline and not wrong:
        got |= {token for token, _ in driver.get_used_many()}
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert got == expected
    assert len(served) == 20


def test_a_region_is_removed_after_the_calls_into_it(other: Other) -> None:
    entered, leave = threading.Event(), threading.Event()
    order = list[str]()

    def hold(_: int) -> None:
        entered.set()
        assert leave.wait(60)
        order.append("call")

    def remove() -> None:
        other.memory.remove_region(0, SIZE)
        order.append("removed")

    other.before = hold
    reader = threading.Thread(target=lambda: other.memory.read(0, 8))
    reader.start()
    assert entered.wait(60)
    remover = threading.Thread(target=remove)
    remover.start()
    time.sleep(0.05)
    assert order == []
    leave.set()
    reader.join(60)
    remover.join(60)
    assert order == ["call", "removed"]


def test_a_batch_that_is_dropped_inside_a_call_goes_back_into_the_ring(other: Other) -> None:
    driver, device = ends(other.memory, packed=False)
    for _ in range(3):
        driver.add([(DATA, 4)])
    driver.publish()
    held = [device.pop_many(2)]
    other.before = lambda _: held.clear()
    assert device.has_work()
    other.memory.read(0, 1)
    assert held == []
    other.before = int
    assert device.in_flight == 0
    assert len(device.pop_many()) == 3
    held.append(device.pop_many(2))

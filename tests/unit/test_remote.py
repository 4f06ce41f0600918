"""Memory that functions reach: what they are called for, and what becomes of what they raise."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Notifier, QueueState
from virtio_test.errors import InvalidArgument, QueueViolation, StaleMemory

from tests.unit.remote_world import DATA, FORMATS, PAGE, SIZE, Other, config, ends, raising


@pytest.fixture
def other() -> Other:
    return Other()


def test_each_access_is_one_call_and_a_long_one_several() -> None:
    other = Other(4 << 20)
    other.memory.write(5, b"abc")
    assert other.memory.read(4, 5) == b"\0abc\0"
    target = bytearray(2)
    other.memory.read_into(6, target)
    assert target == b"bc"
    other.memory.fill(0, 3, 7)
    assert other.memory.is_mapped(0, 4 << 20)
    assert not other.memory.is_mapped(1, 4 << 20)
    assert other.calls == [("write", 5, 3), ("read", 4, 5), ("read", 6, 2), ("write", 0, 3)]
    other.calls.clear()
    long = bytes(range(256)) * 8192 + b"end"
    other.memory.write(16, long)
    assert other.memory.read(16, len(long)) == long
    half = [("write", 16, 1 << 20), ("write", 16 + (1 << 20), 1 << 20), ("write", 16 + (2 << 20), 3)]
    assert other.calls == half + [("read", address, length) for _, address, length in half]
    other.memory.copy(17, 16, len(long))
    assert other.memory.read(17, len(long)) == long


def test_a_remote_region_says_so(other: Other) -> None:
    other.memory.add_remote(SIZE, PAGE, read=other.read, write=None)
    other.memory.add_region(2 * SIZE, PAGE)
    assert [(r.remote, r.writable, r.fd is None, r.offset) for r in other.memory.regions] == [
        (True, True, True, 0),
        (True, False, True, 0),
        (False, True, False, 0),
    ]
    assert [repr(region) for region in other.memory.regions][:2] == [
        "<Region 0x0 + 0x10000, remote>",
        "<Region 0x10000 + 0x1000, remote, read-only>",
    ]
    assert repr(other.memory) == "<GuestMemory of 3 regions, epoch 3>"
    with pytest.raises(InvalidArgument, match="read-only"):
        other.memory.write(SIZE, b"x")
    for address in (0, SIZE):
        with pytest.raises(InvalidArgument, match="remote"):
            other.memory.live_view(address, 8)
    with pytest.raises(InvalidArgument):
        other.memory.live_view(SIZE - 4, 8)
    assert other.memory.live_view(2 * SIZE, 8) == bytes(8)
    assert other.calls == []


def test_what_cannot_be_a_remote_region_is_refused(other: Other) -> None:
    memory = other.memory
    for address, size in [(SIZE + 4, 8), (SIZE, 12), (SIZE, 0), (SIZE - 8, 16), (2**64 - 8, 16)]:
        with pytest.raises(InvalidArgument):
            memory.add_remote(address, size, read=other.read, write=other.write)
    with pytest.raises(TypeError, match="not callable"):
        memory.add_remote(SIZE, 8, read=5, write=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="not callable"):
        memory.add_remote(SIZE, 8, read=other.read, write=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        memory.add_remote(SIZE, 8, read=other.read)  # pyright: ignore[reportCallIssue]
    assert (memory.epoch, len(memory.regions)) == (1, 1)
    memory.add_remote(SIZE, 8, read=other.read, write=None)
    memory.remove_region(SIZE, 8)
    memory.replace([])
    assert memory.regions == []


@FORMATS
def test_one_request_there_and_back(other: Other, packed: bool) -> None:
    driver, device = ends(other.memory, packed=packed)
    other.memory.write(DATA, b"hello")
    token = driver.add([(DATA, 5)], [(DATA + 64, 8)])
    assert driver.signal()
    other.calls.clear()
    assert device.process(lambda request: request[::-1]) == 1
    assert ("read", DATA, 5) in other.calls
    assert ("write", DATA + 64, 5) in other.calls
    assert {length for _, address, length in other.calls if address < DATA} <= {2, 4, 8}
    assert driver.get_used() == (token, 5)
    assert other.store.read(DATA + 64, 8) == b"olleh\0\0\0"


# --------------------------------------------------------------------------------------------------------- exceptions


def test_what_raises_or_gives_the_wrong_bytes_is_a_failed_access_with_its_cause(other: Other) -> None:
    other.before = raising(KeyError("gone"))
    for call in (
        lambda: other.memory.read(8, 4),
        lambda: other.memory.write(8, b"1234"),
        lambda: other.memory.fill(8, 4),
        lambda: other.memory.copy(8, 16, 4),
        lambda: other.memory.read_into(8, bytearray(100_000 - 99_996)),
    ):
        with pytest.raises(InvalidArgument, match="the transfer at") as caught:
            call()
        assert isinstance(caught.value.__cause__, KeyError)
    for given, cause in [
        (b"123", InvalidArgument),
        (b"12345", InvalidArgument),
        (None, TypeError),
        ("text", TypeError),
    ]:
        memory = GuestMemory()
        answer: Any = given
        memory.add_remote(0, PAGE, read=lambda _address, _length, answer=answer: answer, write=None)
        with pytest.raises(InvalidArgument, match="the transfer at 0x8 failed") as caught:
            memory.read(8, 4)
        assert isinstance(caught.value.__cause__, cause)
    # Any bytes-like answer will do, and a cause never belongs to a later error.
    memory = GuestMemory()
    memory.add_remote(0, PAGE, read=lambda _, length: memoryview(bytearray(b"x" * length)), write=None)
    assert memory.read(8, 4) == b"xxxx"
    with pytest.raises(InvalidArgument) as caught:
        memory.read(PAGE, 4)
    assert caught.value.__cause__ is None


@FORMATS
def test_a_ring_that_cannot_be_reached_latches_like_one_that_is_gone(other: Other, packed: bool) -> None:
    driver, device = ends(other.memory, packed=packed)
    driver.add([(DATA, 4)])
    driver.publish()
    assert device.has_work()
    other.before = raising(OSError("connection lost"))
    assert device.has_work(), "what is broken counts as work"
    with pytest.raises(QueueViolation, match="transfer") as caught:
        device.pop()
    assert caught.value.rule == "RingUnmapped"
    assert caught.value.address is not None
    assert isinstance(caught.value.__cause__, OSError)
    assert device.latched is not None
    assert device.pop() is None
    with pytest.raises(QueueViolation, match="transfer"):
        driver.get_used()
    assert driver.latched is not None
    other.before = int
    device.reset()
    chain = device.pop()
    assert chain is not None
    other.before = raising(OSError("connection lost"))
    with pytest.raises(StaleMemory) as stale:
        chain.read()
    assert isinstance(stale.value.__cause__, OSError)
    assert device.latched is None
    with pytest.raises(QueueViolation):
        DriverQueue(other.memory, config(packed=packed))
    with pytest.raises(QueueViolation):
        device.push(chain)


@FORMATS
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_comes_out_of_whatever_was_going_on(
    other: Other, packed: bool, interrupt: type[BaseException]
) -> None:
    def calls() -> dict[str, Callable[[], object]]:
        other.before = int
        driver, device = ends(other.memory, packed=packed, size=16)
        for _ in range(4):
            driver.add([(DATA, 4)], [(DATA + 64, 1)])
        driver.publish()
        done, chain, batch = device.pop(), device.pop(), device.pop_many(1)
        assert done is not None
        assert chain is not None
        assert len(batch) == 1
        device.push(done)
        driver.add([(DATA, 1)])
        return {
            "has_work": DeviceQueue(other.memory, config(packed=packed)).has_work,
            "enable_kicks": device.enable_kicks,
            "memory.read": lambda: other.memory.read(0, 8),
            "chain.read": chain.read,
            "chain.write": lambda: chain.write(b"1"),
            "chain.fill": lambda: chain.fill(1),
            "batch.requests": lambda: batch.requests(4),
            "batch.respond": lambda: batch.respond(b"1"),
            "process": lambda: device.process(lambda _: b""),
            "process_batch": lambda: device.process_batch(lambda _, __: None, request_size=1, response_size=1),
            "pop_many": device.pop_many,
            "pop": device.pop,
            "push": lambda: device.push(chain),
            "device.signal": device.signal,
            "has_used": driver.has_used,
            "get_used": driver.get_used,
            "get_used_many": driver.get_used_many,
            "add": lambda: driver.add([(DATA, 1)]),
            "driver.signal": driver.signal,
            "driver.reset": driver.reset,
        }

    error = interrupt("now")
    for name in calls():
        call = calls()[name]
        other.before = raising(error)
        other.calls.clear()
        with pytest.raises(interrupt) as caught:
            call()
        assert caught.value is error, name
        assert len(other.calls) == 1, f"{name}: nothing is called any more"
        # It was raised, so it is not raised again.
        other.before = int
        assert other.memory.read(DATA, 1) == b"\0"


class Countdown:
    """Raises at the n-th call from now."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, _: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@FORMATS
def test_an_interrupt_loses_no_chain_and_no_used_buffer(other: Other, packed: bool) -> None:
    kept = {"device": 0, "driver": 0}
    raised = True
    for step in itertools.count(1):
        if not raised:
            break
        raised, other.before = False, int
        driver, device = ends(other.memory, packed=packed)
        tokens = [driver.add([(DATA, 4)]) for _ in range(3)]
        driver.publish()
        other.before = Countdown(step)
        try:
            chains = device.pop_many()
        except KeyboardInterrupt:
            raised, other.before = True, int
            if device.latched is not None:
                continue
            kept["device"] += 1
            assert (device.in_flight, device.counters.popped) == (0, 0)
            chains = device.pop_many()
        assert len(chains) == 3
        del chains
        other.before = int
        device.process(lambda _: None)
        other.before = Countdown(step)
        try:
            taken = driver.get_used_many()
        except KeyboardInterrupt:
            raised, other.before = True, int
            if driver.latched is not None:
                continue
            kept["driver"] += 1
            assert (driver.in_flight, driver.counters.popped) == (3, 0)
            taken = driver.get_used_many()
        assert taken == [(token, 0) for token in tokens]
    assert min(kept.values()) >= 3, kept


def test_an_interrupt_wins_over_what_the_handler_raised(other: Other) -> None:
    driver, device = ends(other.memory, packed=False)
    driver.add([(DATA, 4)])
    driver.add([(DATA, 4)])
    driver.publish()

    calls = list[bytes]()

    def handler(request: bytes) -> bytes:
        calls.append(request)
        if len(calls) == 2:
            other.before = raising(KeyboardInterrupt())
            raise KeyError
        return b""

    with pytest.raises(KeyboardInterrupt):
        device.process(handler)


# ---------------------------------------------------------------------------------------------------------- life time


def test_cycles_through_callbacks_are_collected() -> None:
    def world() -> list[weakref.ref[Other]]:
        found = list[weakref.ref[Other]]()
        for used in (False, True):
            other = Other()
            other.memory.add_remote(SIZE, PAGE, read=other.read, write=None)
            if used:
                driver, device = ends(other.memory, packed=False)
                driver.add([(DATA, 4)])
                driver.publish()
                other.kept += [driver, device, device.pop_many()]
            found.append(weakref.ref(other))
        return found

    found = world()
    gc.collect()
    assert [ref() for ref in found] == [None, None]


def test_a_region_that_went_lets_its_functions_go() -> None:
    class Function:
        def __call__(self, _: int, length: int) -> bytes:
            return bytes(length)

    memory = GuestMemory()
    seen = list[weakref.ref[Function]]()
    for forget in (lambda: memory.remove_region(0, PAGE), lambda: memory.replace([])):
        function = Function()
        seen.append(weakref.ref(function))
        memory.add_remote(0, PAGE, read=function, write=None)
        del function
        assert memory.read(0, 2) == b"\0\0"
        assert seen[-1]() is not None
        forget()
        assert seen[-1]() is None


# ---------------------------------------------------------------------------------------------------------- positions


@FORMATS
@pytest.mark.parametrize("remote", [False, True])
def test_a_kick_finds_the_position_that_was_published(packed: bool, remote: bool) -> None:
    """NOTIFICATION_DATA puts it into the kick: the next avail index, or offset and wrap counter (2.9, 4.1.5.2)."""
    memory = Other().memory if remote else GuestMemory([(0, SIZE)])
    seen = list[int]()
    kick = Notifier.callback(lambda: seen.append(driver.state.avail))
    driver, device = ends(memory, packed=packed, kick=kick)
    expected, lap = list[int](), 0
    for number in range(1, 20):
        for _ in range(count := 1 + number % 3):
            driver.add([(DATA, 4)])
        before = driver.state.avail
        assert before == (expected[-1] if expected else 0x8000 * packed), "what is added is not published yet"
        assert driver.signal()
        lap += count
        expected.append((lap % 8) | (lap // 8 % 2 == 0) << 15 if packed else lap)
        assert seen == expected
        driver.add([(DATA, 4)])
        assert driver.state.avail == expected[-1]
        driver.publish()
        lap += 1
        expected[-1:] = [(lap % 8) | (lap // 8 % 2 == 0) << 15 if packed else lap]
        seen[-1:] = expected[-1:]
        device.process(lambda _: None)
        driver.get_used_many()
        # The device asked for kicks again when it found nothing.
    assert len(seen) == 19


@FORMATS
def test_a_position_wraps(packed: bool) -> None:
    memory = GuestMemory([(0, SIZE)])
    start = 7 | 0x8000 if packed else 0xFFFF
    seen = list[int]()
    kick = Notifier.callback(lambda: seen.append(driver.state.avail))
    driver = DriverQueue(memory, config(packed=packed), state=QueueState(start), kick=kick)
    driver.add([(DATA, 4)])
    driver.signal()
    driver.add([(DATA, 4)])
    driver.signal()
    assert seen == [0, 1]

"""`process` handles a burst while nothing is locked, and completes it in one go: none of that may be seen.

What is compared with is the sentence in its documentation, done one chain at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Chain, DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.errors import QueueViolation, StaleMemory

from tests.unit.remote_world import Other

FORMATS = pytest.mark.parametrize("packed", [False, True])
SIZE = 256
DATA, ROOM = 0x100000, 0x10000
"""Where the buffers of request 0 lie, and how far on those of the next."""


class Answer(bytes):
    """Not exactly `bytes`, and no less immutable."""


class World:
    """A queue with requests of (readable, writable) bytes; request k is full of k."""

    def __init__(
        self, requests: list[tuple[int, int]], *, packed: bool, memory: GuestMemory | None = None, features: int = 0
    ) -> None:
        self.memory = memory or GuestMemory([(0, DATA), (DATA, 64 * ROOM)])
        config = QueueConfig.from_layout(RingLayout.contiguous(SIZE, 0x1000, packed=packed), features=features)
        self.driver, self.queue = DriverQueue(self.memory, config), DeviceQueue(self.memory, config)
        self.requests = requests
        for k, (readable, writable) in enumerate(requests):
            at = DATA + k * ROOM
            self.memory.write(at, bytes([k]) * readable)
            self.driver.add([(at, readable)], [(at + ROOM // 2, writable)] if writable else [])
        self.driver.publish()

    def answers(self) -> list[bytes]:
        """What the driver finds of each request that was used, in the order of its tokens."""
        used = sorted(self.driver.get_used_many())
        return [self.memory.read(DATA + token * ROOM + ROOM // 2, written) for token, written in used]


# ------------------------------------------------------------------------------------ the same, one chain at a time


@dataclass
class Script:
    """What a handler makes of request k: a kind of response, its length, and what it charges."""

    kinds: list[tuple[str, int, int]]

    def __call__(self, queue: DeviceQueue, request: bytes) -> bytes | bytearray | memoryview | None:
        kind, length, charge = self.kinds[request[0]]
        if charge:
            queue.charge(charge)
        data = bytes([request[0] ^ 0xFF]) * length
        match kind:
            case "none":
                return None
            case "array":
                self.shared[:] = data
                return self.shared
            case "view":
                return memoryview(data + b"no more")[:length]
            case "subclass":
                return Answer(data)
            case "raise":
                raise KeyError(request[0])
            case _:
                return data

    def __post_init__(self) -> None:
        # One for all requests: what it held for the one before is gone.
        self.shared = bytearray()


def plain(world: World, script: Script, limit: int, max_request: int, max_bytes: int) -> tuple[int, int, Chain | None]:
    """Chains completed, rejected, and the one whose handler raised."""
    queue, moved, count, rejected = world.queue, 0, 0, 0
    while count < limit and moved < max_bytes and (chain := queue.pop()) is not None:
        if chain.readable > max_request:
            queue.push(chain, 0)
            rejected, count = rejected + 1, count + 1
            continue
        request = chain.read()
        kind, length, charge = script.kinds[request[0]]
        if kind == "raise":
            return count, rejected, chain
        moved += len(request) + charge
        count += 1
        response = script(queue, request)
        if response is None:
            queue.push(chain, 0)
        elif length > chain.writable:
            queue.push(chain, 0)
            rejected += 1
        else:
            moved += length
            chain.write(response)
            queue.push(chain)
    return count, rejected, None


KINDS = st.tuples(
    st.sampled_from(["bytes", "bytes", "bytes", "none", "array", "view", "subclass", "raise"]),
    st.integers(0, 40),
    st.sampled_from([0, 0, 7]),
)
REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), KINDS), min_size=1, max_size=60)


@FORMATS
@pytest.mark.parametrize("in_order", [False, True])
@given(
    requests=REQUESTS,
    limit=st.integers(1, 70),
    max_request=st.sampled_from([0, 20, 1 << 20]),
    most=st.integers(1, 2000),
)
def test_it_is_a_loop_over_pop_and_push(
    requests: list[tuple[int, int, tuple[str, int, int]]],
    limit: int,
    max_request: int,
    most: int,
    packed: bool,
    in_order: bool,
) -> None:
    sizes = [(readable, writable) for readable, writable, _ in requests]
    features = in_order << 35
    fast = World(sizes, packed=packed, features=features)
    slow = World(sizes, packed=packed, features=features)
    script, other = Script([kind for _, _, kind in requests]), Script([kind for _, _, kind in requests])
    count, rejected, failed = plain(slow, other, limit, max_request, most)
    done, raised = 0, False
    try:
        done = fast.queue.process(
            lambda request: script(fast.queue, request), limit=limit, max_request=max_request, max_bytes=most
        )
    except KeyError:
        raised, done = True, fast.queue.counters.pushed
    assert (done, raised, fast.queue.counters.rejected) == (count, failed is not None, rejected)
    kept = fast.queue.take_failed()
    assert (kept is not None, fast.queue.take_failed()) == (raised, None)
    if kept is not None and failed is not None:
        assert kept.head == failed.head
        fast.queue.unpop(kept)
        slow.queue.unpop(failed)
    assert fast.queue.in_flight == slow.queue.in_flight == 0
    assert fast.answers() == slow.answers()
    assert fast.queue.state == slow.queue.state
    # The rest is where it was.
    rest = {"limit": SIZE, "max_request": 1 << 20}
    assert fast.queue.process(lambda _: None, **rest) == slow.queue.process(lambda _: None, **rest)


# ------------------------------------------------------------------------------------------- what handlers do meanwhile


@FORMATS
def test_nobody_is_asked_any_more_once_a_handler_has_reset_its_queue(packed: bool) -> None:
    world = World([(4, 4)] * 40, packed=packed)
    seen = list[int]()

    def handler(request: bytes) -> bytes:
        seen.append(request[0])
        if len(seen) == 3:
            world.queue.reset()
            world.queue.stop()
        return request

    used = world.memory.read(world.driver.layout().device, 64)
    assert world.queue.process(handler) == 0
    assert seen == [0, 1, 2]
    assert world.queue.counters.dropped == 32
    assert (world.queue.in_flight, world.queue.counters.pushed, world.queue.take_failed()) == (0, 0, None)
    assert world.answers() == []
    assert world.memory.read(world.driver.layout().device, 64) == used
    assert world.memory.read(DATA + ROOM // 2, 4) == bytes(4)


@FORMATS
def test_nobody_is_asked_any_more_once_a_handler_has_latched_its_queue(packed: bool) -> None:
    world = World([(4, 4)] * 5, packed=packed)
    seen = list[int]()

    def handler(request: bytes) -> bytes:
        seen.append(request[0])
        world.queue.latch(QueueViolation("Made", "2.1", "by a handler"))
        return request

    assert world.queue.process(handler) == 0
    assert seen == [0]
    assert world.answers() == []
    assert world.queue.counters.dropped == 5


@FORMATS
def test_a_handler_that_uses_its_queue_changes_nothing(packed: bool) -> None:
    world = World([(4, 4)] * 40, packed=packed)
    taken = list[Chain | None]()

    def handler(request: bytes) -> bytes:
        assert 1 <= world.queue.in_flight <= 32 + len(taken)
        if request[0] == 3:
            taken.append(world.queue.pop())
        return request

    assert world.queue.process(handler) == 39
    (chain,) = taken
    assert chain is not None
    assert chain.read() == bytes([32]) * 4
    assert world.queue.push(chain, 0)
    assert world.answers() == [b"" if k == 32 else bytes([k]) * 4 for k in range(40)]


@FORMATS
def test_large_answers_wait_for_few_others(packed: bool) -> None:
    """What waits is bounded, however many chains of a burst have large answers."""
    world = World([(4, 30000)] * 10, packed=packed)
    waiting = list[int]()

    def handler(request: bytes) -> bytes:
        waiting.append(world.queue.in_flight + request[0] - 10)
        return request[:1] * 30000

    assert world.queue.process(handler) == 10
    assert max(waiting) == 2
    assert world.answers() == [bytes([k]) * 30000 for k in range(10)]


@FORMATS
@pytest.mark.parametrize("last", [bytes, bytearray], ids=["bytes", "buffer"])
def test_memory_that_goes_meanwhile_costs_the_answers_that_lie_there(packed: bool, last: type[bytes]) -> None:
    """The first of them is kept for the caller; the others were handled and must not be again: they get nothing."""
    memory = GuestMemory([(0, DATA), (DATA, 2 * ROOM), (DATA + 2 * ROOM, 2 * ROOM), (DATA + 4 * ROOM, 2 * ROOM)])
    world = World([(4, 4)] * 6, packed=packed, memory=memory)
    calls = list[int]()

    def handler(request: bytes) -> bytes | bytearray:
        calls.append(request[0])
        if len(calls) == 6:
            memory.remove_region(DATA + 2 * ROOM, 2 * ROOM)
            return last(request)
        return request

    with pytest.raises(StaleMemory, match="0x128000"):
        world.queue.process(handler)
    assert calls == [0, 1, 2, 3, 4, 5]
    failed = world.queue.take_failed()
    assert failed is not None
    assert world.queue.take_failed() is None
    assert world.queue.in_flight == 1
    assert [written for _, written in sorted(world.driver.get_used_many())] == [4, 4, 0, 4, 4]
    assert world.queue.push(failed, 0)
    assert world.driver.get_used() == (2, 0)
    assert world.queue.process(handler) == 0


@FORMATS
def test_a_handler_that_raises_after_memory_went(packed: bool) -> None:
    memory = GuestMemory([(0, DATA), (DATA, ROOM), (DATA + ROOM, 4 * ROOM)])
    world = World([(4, 4)] * 4, packed=packed, memory=memory)

    def handler(request: bytes) -> bytes:
        if request[0] == 2:
            memory.remove_region(DATA, ROOM)
            raise KeyError
        return request

    with pytest.raises(StaleMemory):
        world.queue.process(handler)
    kept = [world.queue.take_failed(), world.queue.take_failed(), world.queue.take_failed()]
    assert [chain and chain.segments[0][0] for chain in kept] == [DATA + 2 * ROOM, DATA, None]
    assert world.driver.get_used_many() == [(1, 4)]
    assert world.queue.in_flight == 2


@FORMATS
def test_an_interrupt_in_the_midst_of_completing_loses_nothing(packed: bool) -> None:
    """Remote memory whose function is interrupted at the answer to request 1 of 4."""
    other = Other(DATA + 8 * ROOM)
    world = World([(4, 4)] * 4, packed=packed, memory=other.memory)
    calls = list[int]()

    def handler(request: bytes) -> bytes:
        calls.append(request[0])
        return request

    def interrupt(address: int) -> None:
        if address == DATA + ROOM + ROOM // 2:
            other.before = int
            raise KeyboardInterrupt

    other.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        world.queue.process(handler)
    assert calls == [0, 1, 2, 3]
    failed = world.queue.take_failed()
    assert failed is not None
    assert world.queue.in_flight == 1
    assert sorted(world.driver.get_used_many()) == [(0, 4), (2, 4), (3, 4)]
    assert world.queue.push(failed, 0)
    assert world.driver.get_used() == (1, 0)


def test_what_a_handler_answers_is_let_go() -> None:
    import sys

    world = World([(4, 4)] * 3, packed=False)
    answer = bytes(bytearray(b"kept"))
    before = sys.getrefcount(answer)
    handler: Callable[[bytes], bytes] = lambda _: answer  # noqa: E731
    assert world.queue.process(handler) == 3
    assert sys.getrefcount(answer) == before

"""Our own caller's mistakes (V10, section 2.9): a `UsageError`, guest memory byte for byte as it was, nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Batch, Chain, DeviceQueue, DriverQueue, Policy
from virtio_test.errors import (
    ForeignChain,
    HandlerError,
    InvalidArgument,
    NoFeature,
    QueueFull,
    QueueViolation,
    StaleChain,
    StateError,
    UsageError,
)

from tests.property.bench import DATA, READ_A, RING, TABLE, WRITE, Bench
from tests.property.ends import IN_ORDER, INDIRECT_DESC

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def refused(bench: Bench, error: type[UsageError], call: Callable[[], object]) -> None:
    """The call raises, writes nothing, and takes nothing out of flight."""
    before, in_flight, state = bench.image(), bench.queue.in_flight, bench.queue.state
    bench.trace.clear()
    with pytest.raises(error):
        call()
    assert not [access for access in bench.trace.log() if access.kind in ("store", "write")]
    assert bench.image() == before
    assert (bench.queue.in_flight, bench.queue.state) == (in_flight, state)
    assert bench.queue.latched is None


@pytest.mark.row("U01")
@FORMATS
def test_u01_more_written_than_the_chain_can_take(packed: bool) -> None:
    bench = Bench(packed)
    bench.direct()
    chain = bench.pop()
    for written in (33, 1 << 32, -1, 1 << 64):
        refused(bench, InvalidArgument, lambda written=written: bench.queue.push(chain, written))
    bench.complete()


@pytest.mark.row("U02")
@FORMATS
def test_u02_less_reported_than_written_is_allowed(packed: bool) -> None:
    bench = Bench(packed)
    bench.direct()
    chain = bench.pop()
    assert chain.write(bytes(20)) == 20
    assert chain.written == 20
    assert bench.queue.push(chain, 3)
    assert [written for _, written in bench.driver.take()] == [3]


@pytest.mark.row("U03")
@FORMATS
def test_u03_chains_that_are_not_to_be_pushed(packed: bool) -> None:
    bench, other = Bench(packed), Bench(packed)
    bench.several()
    other.single()
    foreign = other.pop()
    first, second = bench.pop(), bench.pop()
    refused(bench, ForeignChain, lambda: bench.queue.push(foreign))
    refused(bench, ForeignChain, lambda: bench.queue.unpop(foreign))
    refused(bench, ForeignChain, lambda: bench.queue.put_back(foreign))
    refused(bench, StateError, lambda: bench.queue.unpop(first))
    assert bench.queue.push(first)
    for call in (
        lambda: bench.queue.push(first),
        lambda: bench.queue.unpop(first),
        lambda: bench.queue.put_back(first),
        lambda: first.write(b"x"),
        first.read,
        lambda: first.fill(0),
    ):
        refused(bench, StaleChain, call)
    bench.queue.unpop(second)
    refused(bench, StaleChain, lambda: bench.queue.push(second))
    assert bench.pop().head == second.head


@FORMATS
def test_any_chain_can_be_put_back_and_is_handed_out_again_in_its_place(packed: bool) -> None:
    bench = Bench(packed)
    bench.several()
    before, state = bench.image(), bench.queue.state
    first, second, third = bench.pop(), bench.pop(), bench.pop()
    heads = [each.head for each in (first, second, third)]
    bench.queue.put_back(second)
    bench.queue.put_back(first)
    refused(bench, StaleChain, lambda: bench.queue.put_back(first))
    refused(bench, StaleChain, first.read)
    assert (bench.image(), bench.queue.in_flight) == (before, 3)
    again = [bench.pop() for _ in range(2)]
    assert [each.head for each in again] == heads[:2]
    assert again[0].read() is not None
    for each in (again[0], third, again[1]):
        bench.queue.put_back(each)
    assert (bench.image(), bench.queue.in_flight, bench.queue.state) == (before, 0, state), "all is in the ring again"
    assert [bench.pop().head for _ in range(3)] == heads
    stale = bench.pop()
    bench.queue.reset(state=bench.setup.state())
    bench.queue.put_back(stale)
    assert bench.queue.in_flight == 0


@pytest.mark.row("U03")
@FORMATS
def test_u03_a_chain_of_before_the_reset(packed: bool) -> None:
    bench = Bench(packed)
    bench.several()
    old, older = bench.pop(), bench.pop()
    assert old.generation == 0
    bench.queue.reset(state=bench.setup.state())
    refused(bench, StaleChain, lambda: old.write(b"x"))
    refused(bench, StaleChain, old.read)
    before = bench.image()
    assert bench.queue.push(old) is False
    bench.queue.unpop(older)
    assert bench.image() == before
    assert bench.queue.counters.dropped == 1
    assert bench.queue.in_flight == 0
    assert bench.pop().generation == 1


@pytest.mark.row("U04")
@FORMATS
def test_u04_a_ring_that_is_gone_takes_no_used_entry(packed: bool) -> None:
    bench = Bench(packed)
    bench.single()
    chain = bench.pop()
    state = bench.queue.state
    bench.memory.remove_region(RING, 1 << 16)
    with pytest.raises(QueueViolation, match="RingUnmapped"):
        bench.queue.push(chain)
    assert bench.queue.state == state
    bench.memory.add_region(RING, 1 << 16)
    assert bench.queue.pop() is None
    assert bench.memory.read(RING, 1 << 16) == bytes(1 << 16)


@pytest.mark.row("U05", "U07")
@FORMATS
def test_u05_u07_a_batch_over_the_end_of_the_index_is_shown_by_one_store(packed: bool) -> None:
    bench = Bench(packed, start=0x8006 if packed else 0xFFFE)
    bench.several()
    batch = bench.queue.pop_many(4)
    assert len(batch) == 4
    bench.trace.clear()
    assert batch.respond(bytes(4 * 8)) == 4
    stores = [access.address for access in bench.trace.log() if access.kind == "store"]
    shown = bench.at("desc.flags", 6) if packed else bench.at("used.idx")
    assert stores.count(shown) == 1
    assert stores[-1] == shown
    assert [written for _, written in bench.driver.take()] == [8] * 4


@pytest.mark.row("U10")
@FORMATS
def test_u10_in_order_pushes_are_shown_in_order(packed: bool) -> None:
    bench = Bench(packed, features=INDIRECT_DESC | IN_ORDER)
    bench.several()
    bench.drain()
    for number in (3, 1, 4, 2):
        assert bench.queue.push(bench.popped[number], number)
        assert bench.driver.take() == []
    refused(bench, StaleChain, lambda: bench.queue.push(bench.popped[3]))
    assert bench.queue.push(bench.popped[0], 9)
    assert [written for _, written in bench.driver.take()] == [9, 1, 2, 3, 4]


@FORMATS
def test_impossible_arguments_of_the_device_end(packed: bool) -> None:
    bench = Bench(packed)
    bench.direct()
    chain = bench.pop()
    for limit in (0, 32769, -1):
        refused(bench, InvalidArgument, lambda limit=limit: bench.queue.pop_many(limit))
        refused(bench, InvalidArgument, lambda limit=limit: bench.queue.process(lambda _: None, limit=limit))
    for call in (
        lambda: chain.read(-1),
        lambda: chain.read(offset=-1),
        lambda: chain.write(b"x", offset=-1),
        lambda: chain.fill(256),
        lambda: chain.fill(-1),
        lambda: chain.fill(0, length=-1),
    ):
        refused(bench, InvalidArgument, call)
    assert chain.read(offset=1 << 40) == b""
    assert chain.write(b"x", offset=1 << 40) == 0
    assert chain.fill(1, offset=32) == 0


@FORMATS
def test_impossible_answers_to_a_batch(packed: bool) -> None:
    bench = Bench(packed)
    bench.several()
    batch = bench.queue.pop_many(3)
    refused(bench, InvalidArgument, lambda: batch.respond(bytes(10)))
    refused(bench, InvalidArgument, lambda: batch.respond(bytes(9), itemsize=4))
    refused(bench, InvalidArgument, lambda: batch.respond(bytes(9), itemsize=-1))
    assert batch.respond(bytes(9)) == 3
    refused(bench, StaleChain, lambda: batch.respond(bytes(9)))
    refused(bench, StaleChain, lambda: batch.requests(1))


@FORMATS
def test_a_handler_that_fails_loses_nothing(packed: bool) -> None:
    """Earlier responses stay, its own chain is kept for the caller, later ones are in the ring again."""
    bench = Bench(packed)
    bench.several()
    calls = list[int]()

    def handler(_request: bytes) -> bytes:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyError("third")
        return b"ok"

    with pytest.raises(KeyError, match="third"):
        bench.queue.process(handler)
    assert [written for _, written in bench.driver.take()] == [2, 2]
    failed = bench.queue.take_failed()
    assert failed is not None
    assert bench.queue.take_failed() is None
    assert bench.queue.in_flight == 1
    bench.queue.unpop(failed)
    assert bench.queue.process(handler) == 3
    assert [written for _, written in bench.driver.take()] == [2, 2, 2]
    assert len(calls) == 6


@FORMATS
@pytest.mark.parametrize("answer", [3, "text", object(), [1]])
def test_a_handler_that_answers_nonsense(packed: bool, answer: object) -> None:
    bench = Bench(packed)
    bench.single()
    handler: Callable[[bytes], bytes] = lambda _request: answer  # type: ignore[assignment, return-value]  # noqa: E731
    with pytest.raises(HandlerError):
        bench.queue.process(handler)
    assert bench.driver.take() == []
    failed = bench.queue.take_failed()
    assert failed is not None
    bench.queue.push(failed, 0)
    assert [written for _, written in bench.driver.take()] == [0]


@FORMATS
def test_impossible_buffers_of_the_driver_end(packed: bool) -> None:
    bench = Bench(packed)
    features = bench.setup.features & ~INDIRECT_DESC
    queue = DriverQueue(bench.memory, bench.setup.config())
    without = DriverQueue(bench.memory, bench.setup.__class__(packed, 8, RING, bench.start, features).config())
    tables = DriverQueue(bench.memory, bench.setup.config(), indirect=TABLE, indirect_entries=2)
    byte = (DATA, 1)
    cases: list[tuple[type[UsageError], Callable[[], object]]] = [
        (InvalidArgument, lambda: queue.add([])),
        (InvalidArgument, lambda: queue.add([(DATA, 0)])),
        (InvalidArgument, lambda: queue.add([byte], [(DATA, 0)])),
        (InvalidArgument, lambda: queue.add([(DATA, 1 << 32)])),
        (InvalidArgument, lambda: queue.add([(DATA, -1)])),
        (InvalidArgument, lambda: queue.add([(-1, 1)])),
        (InvalidArgument, lambda: queue.add([(1 << 64, 1)])),
        (InvalidArgument, lambda: queue.add([byte] * 9)),
        (InvalidArgument, lambda: queue.add([(DATA, 0xFFFF_FFFF)] * 2)),
        (NoFeature, lambda: without.add([byte], indirect=True)),
        (NoFeature, lambda: queue.add([byte], indirect=True)),
        (InvalidArgument, lambda: tables.add([byte] * 3, indirect=True)),
        (InvalidArgument, lambda: queue.get_used_many(-1)),
    ]
    for error, call in cases:
        refused(bench, error, call)
    for _ in range(8):
        queue.add([byte])
    refused(bench, QueueFull, lambda: queue.add([byte]))
    refused(bench, QueueFull, lambda: queue.add([byte] * 2))
    assert queue.publish() == 8
    assert queue.free == 0


# ---------------------------------------------------------------------------------------------- any calls, in any order

OPERATIONS = ["pop", "push", "unpop", "put back", "stop", "resume", "batch", "drop", "fail"]
MISTAKES = ["push too much", "write", "read", "foreign"]


class Caller:
    """Makes any call of a device end, right or wrong, and remembers what it holds."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.queue = bench.queue
        self.chains: list[Chain] = []
        self.live: list[Chain] = []
        self.batches: list[Batch] = []
        stranger = Bench(bench.packed)
        stranger.single()
        self.foreign = stranger.pop()

    def call(self, name: str, key: int) -> None:
        chain = self.chains[key % len(self.chains)] if self.chains else self.foreign
        match name:
            case "pop":
                self.keep(self.queue.pop())
            case "push":
                assert self.queue.push(chain, 0)
                self.live.remove(chain)
            case "push too much":
                self.queue.push(chain, chain.writable + 1)
            case "unpop":
                self.queue.unpop(chain)
                self.live.remove(chain)
            case "put back":
                self.queue.put_back(chain)
                self.live.remove(chain)
            case "write":
                chain.write(b"\x5a" * key)
            case "read":
                chain.read()
            case "stop":
                self.queue.stop()
            case "resume":
                self.queue.resume()
            case "batch":
                self.batches.append(self.queue.pop_many(key + 1))
            case "drop":
                if self.batches:
                    self.batches.pop(key % len(self.batches))
            case "fail":
                self.fail(key)
            case _:
                self.queue.push(self.foreign)

    def keep(self, chain: Chain | None) -> None:
        if chain is not None:
            self.chains.append(chain)
            self.live.append(chain)

    def fail(self, key: int) -> None:
        """A handler that pops chains itself, and raises at its second request."""
        calls = list[bytes]()

        def handler(request: bytes) -> None:
            calls.append(request)
            if key % 2:
                self.keep(self.queue.pop())
            if len(calls) == 2:
                raise KeyError(key)

        try:
            self.queue.process(handler, limit=key + 1)
        except KeyError:
            failed = self.queue.take_failed()
            assert failed is not None
            self.keep(failed)

    def finish(self) -> None:
        """Give everything back that is held, and complete the rest of the ring."""
        self.queue.resume()
        self.batches.clear()
        for chain in self.live:
            assert self.queue.push(chain, 0)
        while (chain := self.queue.pop()) is not None:
            assert self.queue.push(chain, 0)


@given(
    st.booleans(),
    st.sampled_from([0, IN_ORDER]),
    st.lists(st.tuples(st.sampled_from(OPERATIONS + MISTAKES), st.integers(0, 9)), max_size=40),
)
def test_any_calls_in_any_order(packed: bool, features: int, script: list[tuple[str, int]]) -> None:
    """No chain is lost and none comes back twice, and every refusal leaves guest memory as it was.

    Where the newest chain is held elsewhere, what is put back cannot go back into the ring: it is popped again.
    """
    bench = Bench(packed, features=features)
    bench.full()
    caller = Caller(bench)
    for name, key in script:
        before, was = bench.image(), bench.queue.state.used
        try:
            caller.call(name, key)
        except UsageError:
            assert bench.image() == before
            assert bench.queue.state.used == was
    caller.finish()
    assert bench.queue.latched is None
    assert bench.queue.in_flight == 0
    assert sorted(head for head, _ in bench.driver.take()) == list(range(8))
    assert bench.queue.counters.pushed == bench.queue.counters.popped == 8


@pytest.mark.row("T14")
def test_t14_threads_that_share_a_queue_complete_each_chain_once() -> None:
    for packed in (False, True):
        bench = Bench(packed, Policy.interop, size=256)
        for _ in range(4):
            heads = [bench.add((READ_A, 4, False), (WRITE, 4, True)) for _ in range(128)]
            failures = list[BaseException]()

            def work(queue: DeviceQueue = bench.queue, failures: list[BaseException] = failures) -> None:
                try:
                    while (chain := queue.pop()) is not None:
                        assert chain.read() == bytes(range(4))
                        chain.write(b"done")
                        assert queue.push(chain)
                except BaseException as failure:  # noqa: BLE001 - it belongs to the main thread
                    failures.append(failure)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            assert sorted(bench.driver.take()) == sorted((head, 4) for head in heads)
            assert bench.queue.in_flight == 0

"""Every fast path does what the plain one does: batches, `process`, `process_batch`; and rewinding undoes a pop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Chain, DeviceQueue, GuestMemory

from tests.property.ends import ModelDriverEnd
from tests.property.model import Plan
from tests.property.play import fill, guest, snapshot
from tests.property.shapes import Script, scripts

REQUEST, RESPONSE = 20, 12
"""Row sizes of the batches; the scripts make chains that are longer, shorter and just right."""


@dataclass
class World:
    """One queue with chains waiting, as the model's driver has made them."""

    memory: GuestMemory
    driver: ModelDriverEnd
    queue: DeviceQueue
    plans: dict[int, Plan]

    @classmethod
    def of(cls, script: Script) -> World:
        memory = guest(script)
        driver = ModelDriverEnd(script.setup, memory)
        plans, room = dict[int, Plan](), script.setup.size
        for number, (request, plan) in enumerate(script.place()):
            room -= plan.slots
            if room < 0:
                break
            fill(memory, plan, request.data(number))
            plans[driver.add(plan)] = plan
        driver.publish()
        return cls(memory, driver, DeviceQueue(memory, script.setup.config(), state=script.setup.state()), plans)

    def outcome(self) -> tuple[dict[int, int], list[bytes]]:
        """What the driver got back, and every buffer's bytes."""
        used = dict(self.driver.take())
        return used, [self.memory.read(s.address, s.length) for plan in self.plans.values() for s in plan.segments]


def echo(request: bytes, length: int) -> bytes:
    return bytes(byte ^ 0x5A for byte in request.ljust(length)[:length])


def plain_rows(queue: DeviceQueue, limit: int) -> int:
    """What the documentation of `process_batch` says, one chain at a time; chains that did not fit."""
    chains = [chain for chain in (queue.pop() for _ in range(limit)) if chain is not None]
    rejected = 0
    for chain in chains:
        if chain.readable < REQUEST or chain.writable < RESPONSE:
            rejected += 1
            queue.push(chain, 0)
        else:
            chain.write(echo(chain.read(REQUEST), RESPONSE))
            queue.push(chain)
    return rejected


def rows(requests: memoryview, responses: memoryview) -> None:
    for at in range(len(requests) // REQUEST):
        row = bytes(requests[at * REQUEST : (at + 1) * REQUEST])
        responses[at * RESPONSE : (at + 1) * RESPONSE] = echo(row, RESPONSE)


@given(scripts(), st.integers(1, 6))
def test_process_batch_is_the_plain_way_in_one_call(script: Script, limit: int) -> None:
    fast, plain = World.of(script), World.of(script)
    count = fast.queue.process_batch(rows, request_size=REQUEST, response_size=RESPONSE, limit=limit)
    rejected = plain_rows(plain.queue, limit)
    assert count == plain.queue.counters.pushed
    assert fast.queue.counters.rejected == rejected
    assert fast.outcome() == plain.outcome()
    assert fast.queue.state == plain.queue.state


@given(scripts(), st.integers(1, 6))
def test_a_batch_is_the_plain_way_in_three_steps(script: Script, limit: int) -> None:
    fast, plain = World.of(script), World.of(script)
    batch = fast.queue.pop_many(limit)
    wanted = batch.requests(REQUEST)
    assert wanted.readonly
    assert len(wanted) == len(batch) * REQUEST
    responses = bytearray(len(batch) * RESPONSE)
    rows(wanted, memoryview(responses))
    batch.respond(responses, itemsize=RESPONSE)
    assert fast.queue.counters.rejected == plain_rows(plain.queue, limit)
    assert fast.outcome() == plain.outcome()
    assert fast.queue.state == plain.queue.state
    assert fast.queue.in_flight == 0


def sized(request: bytes) -> bytes:
    """A response whose length depends on the request: none, one that fits, or one that does not."""
    return echo(request, request[0] % 32 if request else 3)


def plain_handler(queue: DeviceQueue, handler: Callable[[bytes], bytes]) -> int:
    count = 0
    while (chain := queue.pop()) is not None:
        response = handler(chain.read())
        if len(response) > chain.writable:
            queue.push(chain, 0)
        else:
            chain.write(response)
            queue.push(chain)
        count += 1
    return count


@given(scripts())
def test_process_is_a_loop_over_pop_and_push(script: Script) -> None:
    fast, plain = World.of(script), World.of(script)
    assert fast.queue.process(sized) == plain_handler(plain.queue, sized)
    assert fast.outcome() == plain.outcome()
    regions = script.regions
    assert snapshot(script.setup, fast.memory, regions) == snapshot(script.setup, plain.memory, regions)


@given(scripts())
def test_a_batch_that_is_dropped_was_never_taken(script: Script) -> None:
    world = World.of(script)
    before = snapshot(script.setup, world.memory, script.regions)
    state = world.queue.state
    batch = world.queue.pop_many(5)
    assert world.queue.in_flight == len(batch) == min(5, len(world.plans))
    del batch
    assert world.queue.in_flight == 0
    assert world.queue.state == state
    assert snapshot(script.setup, world.memory, script.regions) == before


@given(scripts(), st.lists(st.integers(0, 9), max_size=6))
def test_unpop_is_as_if_nothing_had_been_popped(script: Script, undone: Iterable[int]) -> None:
    """Popping and putting back, newest first, any number of times, changes nothing that the driver sees."""
    busy, plain = World.of(script), World.of(script)
    before = snapshot(script.setup, busy.memory, script.regions)
    for count in undone:
        chains = [chain for chain in (busy.queue.pop() for _ in range(count)) if chain is not None]
        for chain in reversed(chains):
            busy.queue.unpop(chain)
        assert busy.queue.in_flight == 0
        assert snapshot(script.setup, busy.memory, script.regions) == before
    plain_handler(busy.queue, sized)
    plain_handler(plain.queue, sized)
    assert busy.outcome() == plain.outcome()


@given(scripts())
def test_a_stopped_queue_goes_on_from_its_state(script: Script) -> None:
    """Every round begins with a new queue object, built from the state of the one before."""
    setup, memory = script.setup, guest(script)
    driver, state = ModelDriverEnd(setup, memory), setup.state()
    for number, (request, plan) in enumerate(script.place()):
        fill(memory, plan, request.data(number))
        token = driver.add(plan)
        driver.publish()
        queue = DeviceQueue(memory, setup.config(), state=state)
        chain = queue.pop()
        assert isinstance(chain, Chain)
        assert chain.read() == request.data(number)
        assert chain.write(request.response(number)) == request.answered
        queue.push(chain)
        assert driver.take() == [(token, request.answered)]
        state = queue.stop()
        assert queue.pop() is None

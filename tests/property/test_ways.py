"""Every way to take chains from a spoiled ring ends the same: one by one, by `process`, by batches, by native services.

Batches have any size, services do turns of any size, or run in a thread. The same chains are completed, with the same
bytes, and the same rule is found broken behind them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import DeviceQueue, FileService, Worker
from virtio_test.devices.blk import BlkDevice
from virtio_test.errors import QueueViolation
from virtio_test.strategies import ROWS, RingCase, Scene, cases, defects, legal, random_case
from virtio_test.strategies.case import RING, TABLES, Name, Outcome

from tests.property import oracles
from tests.unit.world import eventually

Way = Callable[[DeviceQueue], int]
SIZE = 24
"""Bytes of a response; chains with less room are completed with nothing."""


def answer(request: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in request[:SIZE]).ljust(SIZE, b"\x77")


def plain(queue: DeviceQueue) -> int:
    """What the documentation of `process` says, one chain at a time."""
    count = 0
    while (chain := queue.pop()) is not None:
        count += 1
        if chain.readable > 1 << 24 or chain.writable < SIZE:
            queue.push(chain, 0)
            continue
        chain.write(answer(chain.read()))
        queue.push(chain)
    return count


def processed(limit: int) -> Way:
    def way(queue: DeviceQueue) -> int:
        count = 0
        while done := queue.process(answer, limit=limit):
            count += done
        return count

    return way


def zeros(queue: DeviceQueue) -> int:
    count = 0
    while (chain := queue.pop()) is not None:
        count += 1
        if chain.writable >= SIZE:
            chain.write(bytes(SIZE))
        queue.push(chain)
    return count


def batches(limit: int) -> Way:
    def way(queue: DeviceQueue) -> int:
        count = 0
        while len(batch := queue.pop_many(limit)):
            count += len(batch)
            batch.respond(bytes(SIZE * len(batch)))
        return count

    return way


def rows(limit: int) -> Way:
    def way(queue: DeviceQueue) -> int:
        count = 0
        while done := queue.process_batch(lambda _, __: None, request_size=0, response_size=SIZE, limit=limit):
            count += done
        return count

    return way


def disk(queue: DeviceQueue) -> int:
    """Every chain as a request to a disk of two sectors, in Python."""
    device, count = BlkDevice(bytearray(1024)), 0
    while (chain := queue.pop()) is not None:
        count += 1
        queue.push(chain, device.answer(chain))
    return count


def service() -> FileService:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 1024)
    made = FileService(
        fd, serial=b"virtio-test".ljust(20, b"\0"), lifetime=bytes(6), max_discard=(0, 0), max_write_zeroes=(0, 0)
    )
    os.close(fd)
    made.agree(
        capacity=2,
        read_only=False,
        flush=True,
        legacy=True,
        write_through=True,
        discard=False,
        write_zeroes=False,
        lifetime=False,
    )
    return made


def turns(limit: int) -> Way:
    def way(queue: DeviceQueue) -> int:
        made, count = service(), 0
        while (done := made.turn([queue], limit=limit)[0]) or queue.has_work():
            count += done
        return count

    return way


def threaded(queue: DeviceQueue) -> int:
    worker = Worker(service(), [queue])
    assert eventually(lambda: worker.turns > 0 and (queue.latched is not None or not queue.has_work()))
    worker.park()
    worker.stop()
    # Of what a worker has found broken the queue tells.
    if queue.latched is not None:
        raise queue.latched
    return queue.counters.pushed


def ends(case: RingCase, policy: Name, way: Way) -> tuple[str | None, int, list[bytes], object]:
    """(rule, chains popped and put back, memory, state) after the whole ring was taken in that way."""
    with case.play(policy) as scene:
        rule, queue = None, oracles.device(scene)
        try:
            way(queue)
        except QueueViolation as violation:
            rule = violation.rule
        counters = queue.counters
        return rule, counters.pushed, quiet(scene), queue.state.used


def quiet(scene: Scene) -> list[bytes]:
    """Memory without what a device writes when it likes: how it wants to be kicked (2.7.10)."""
    names = ("device_event.off_wrap", "device_event.flags") if scene.case.packed else ("used.flags", "avail_event")
    for name in names:
        scene.put(name, 0)
    return oracles.image(scene)


def alone(case: RingCase) -> bool:
    """Whether the ring says what it says, whatever is written to buffers, and whenever."""
    if case.end == "driver" or case.later or case.areas or case.state or case.row in ("I17", "B12", "C12"):
        return False
    outcome = case.interop or Outcome(0, segments=())
    return not any(RING <= at < TABLES for chain in outcome.segments or () for at, _, _ in chain)


def compared(case: RingCase, policy: Name, limit: int) -> None:
    one = ends(case, policy, plain)
    assert one == ends(case, policy, processed(limit))
    two = ends(case, policy, zeros)
    assert two == ends(case, policy, batches(limit))
    assert two == ends(case, policy, rows(limit))
    three = ends(case, policy, disk)
    assert three == ends(case, policy, turns(limit))
    assert three == ends(case, policy, threaded)


SPOILED = [row for row in ROWS if any(alone(case) for case in cases(row))]


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.row(row)) for row in SPOILED])
def test_a_spoiled_ring_ends_the_same_in_every_way(row: str) -> None:
    random = Random(row)
    for case in (*cases(row), *(random_case(random, row) for _ in range(5))):
        if alone(case):
            compared(case, "interop", random.choice((1, 2, 32)))
            compared(case, "strict", random.choice((1, 2, 32)))


@given(defects(), st.integers(1, 5), st.sampled_from(("interop", "strict")))
def test_any_spoiled_ring_does(case: RingCase, limit: int, policy: Name) -> None:
    if alone(case):
        compared(case, policy, limit)


@given(legal(), st.integers(1, 5), st.sampled_from(("interop", "strict")))
def test_a_legal_ring_does(case: RingCase, limit: int, policy: Name) -> None:
    compared(case.but(later=()), policy, limit)

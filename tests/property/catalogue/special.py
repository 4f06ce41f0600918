"""Rows that are a story rather than one change: what happens over several calls, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from virtio_test._core import Policy
from virtio_test.errors import InvalidArgument, QueueViolation, StaleMemory

from tests.property.bench import EDGE, INDIRECT, NEXT, READ_A, READ_B, RING, TABLE, WRITE, Bench, W
from tests.property.ends import EVENT_IDX


@dataclass(frozen=True)
class Special:
    """One row, told by a function."""

    row: str
    run: Callable[[Policy], None]

    def __str__(self) -> str:
        return f"{self.row}-{self.run.__name__}"


SPECIAL: list[Special] = []

LEGAL = [(READ_A, 16, False), (READ_B, 8, False), (WRITE, 32, True)]
"""What `Bench.tabled` describes."""


def tells(*rows: str) -> Callable[[Callable[[Policy], None]], Callable[[Policy], None]]:
    """Register the decorated function for these rows."""

    def register(run: Callable[[Policy], None]) -> Callable[[Policy], None]:
        SPECIAL.extend(Special(row, run) for row in rows)
        return run

    return register


def formats(policy: Policy) -> list[Bench]:
    """The same bench for either format."""
    return [Bench(packed, policy) for packed in (False, True)]


@tells("A15")
def used_flags_are_written_and_never_read(policy: Policy) -> None:
    bench = Bench(packed=False, policy=policy)
    bench.single()
    bench.put("used.flags", 0xFFFF)
    bench.queue.enable_kicks()
    assert bench.get("used.flags") == 0
    bench.put("used.flags", 0xFFFF)
    bench.queue.disable_kicks()
    assert bench.get("used.flags") == 1
    bench.put("used.flags", 0xFFFF)
    bench.drain()
    bench.complete()
    loads = {access.address for access in bench.trace.log() if access.kind == "load"}
    assert not loads & set(range(bench.at("used.flags"), bench.queue.layout().end))


@tells("A16")
def kicks_for_nothing_cost_nothing(policy: Policy) -> None:
    """The device arms itself once; then each look is one load."""
    for bench in formats(policy):
        assert bench.queue.pop() is None
        bench.trace.clear()
        for _ in range(100):
            assert bench.queue.pop() is None
            assert not bench.queue.has_work()
        assert [access.kind for access in bench.trace.log()] == ["load"] * 200
        assert not bench.queue.signal()


@tells("C08", "B19")
def a_chain_that_does_not_fit_the_handler_is_completed_with_0(policy: Policy) -> None:
    """Wrong direction or too short is the device's business (R7): counted, answered, and no violation."""
    for bench in formats(policy):
        bench.add((WRITE, 32, True))
        bench.add((READ_A, 16, False))
        bench.add((READ_A, 15, False), (WRITE, 32, True))
        bench.add((READ_A, 16, False), (WRITE + 64, 32, True))

        def answer(requests: memoryview, responses: memoryview) -> None:
            assert bytes(requests) == bytes(range(16))
            responses[:] = b"\x77" * 8

        assert bench.queue.process_batch(answer, request_size=16, response_size=8) == 4
        assert sorted(written for _, written in bench.driver.take()) == [0, 0, 0, 8]
        assert bench.queue.counters.rejected == 3
        assert bench.queue.latched is None
        assert bench.memory.read(WRITE, 32) == bytes(32)
        assert bench.memory.read(WRITE + 64, 8) == b"\x77" * 8


@tells("C12", "B12", "I17")
def a_device_that_overwrites_its_own_ring_gets_a_violation_at_most(policy: Policy) -> None:
    """Buffers over each part of the ring, then all three parts at one place: no access outside, no endless loop."""
    for bench in formats(policy):
        areas = [bench.setup.layout.desc, bench.setup.layout.driver, bench.setup.layout.device]
        for address in areas:
            fresh = Bench(bench.packed, policy)
            fresh.add((address, 64, True))
            fill_everything(fresh)
    same = Bench(packed=False, policy=policy)
    place = same.setup.layout.desc
    same.queue.reset(same.config(driver=place, device=place))
    # Read as an avail ring this descriptor says: flags 0, idx 1, head 0.
    same.memory.write(same.at("desc.addr"), (1 << 16).to_bytes(8, "little"))
    same.put("desc.len", 16)
    same.put("desc.flags", W)
    fill_everything(same)


def fill_everything(bench: Bench) -> None:
    try:
        for _ in range(40):
            chain = bench.queue.pop()
            if chain is None:
                break
            chain.fill(0xFF)
            bench.queue.push(chain)
        else:
            pytest.fail("the queue never comes to an end")
    except QueueViolation:
        assert bench.queue.pop() is None
    outside = {a.address for a in bench.trace.log() if a.kind in ("store", "write")}
    assert all(RING <= address < RING + (1 << 16) for address in outside if address)


@tells("C13", "I19", "P25")
def what_changes_after_it_was_read_changes_nothing(policy: Policy) -> None:
    """The INDIRECT descriptor changes while its table is read, all else after it: the snapshot stays (T01-T07)."""
    for bench in formats(policy):
        bench.tabled()
        at, trace = bench.at, bench.trace
        trace.clear()
        assert bench.pop().segments == LEGAL
        reads = [access.address for access in trace.log()]
        table = next(number for number, address in enumerate(reads) if TABLE <= address < TABLE + 48)

        fresh = Bench(bench.packed, policy)
        fresh.tabled()
        assert fresh.queue
        fresh.trace.clear()
        for name, value in (("desc.len", 3), ("desc.addr", 0), ("desc.flags", NEXT | INDIRECT)):
            width = fresh.queue.layout().fields()[name][1]
            fresh.trace.change_at(table, at(name), value.to_bytes(width, "little"))
        chain = fresh.pop()
        assert fresh.get("desc.len") == 3
        fresh.memory.fill(RING, 0x80, 0xFF)
        fresh.memory.fill(TABLE, 48, 0xFF)
        assert chain.segments == LEGAL
        assert chain.read(16) == bytes(range(16))
        assert chain.write(b"\x01" * 40) == 32


@tells("B02")
def nothing_to_write_is_nothing_written(policy: Policy) -> None:
    for bench in formats(policy):
        bench.single()
        bench.put("desc.len", 0)
        if policy == Policy.strict:
            with pytest.raises(QueueViolation, match="ZeroLength"):
                bench.drain()
            continue
        chain = bench.pop()
        assert chain.segments == []
        assert chain.writable == chain.readable == 0
        assert chain.write(b"x") == chain.fill(1) == 0
        assert chain.read() == b""
        with pytest.raises(InvalidArgument):
            bench.queue.push(chain, 1)
        bench.complete()


@tells("B16")
def memory_that_is_taken_away_is_not_touched(policy: Policy) -> None:
    """Between pop and copy a buffer's region goes (T12): nothing of the copy is made, and the chain lives on."""
    for bench in formats(policy):
        bench.add((READ_A, 16, False), (WRITE, 16, True), (EDGE, 16, True))
        chain = bench.pop()
        bench.memory.remove_region(EDGE, 4096)
        with pytest.raises(StaleMemory):
            chain.write(b"x" * 17)
        with pytest.raises(StaleMemory):
            chain.fill(1)
        assert bench.memory.read(WRITE, 16) == bytes(16)
        assert chain.written == 0
        assert chain.read() == bytes(range(16))
        assert chain.write(b"fits in what is left"[:16]) == 16
        bench.memory.add_region(EDGE, 4096)
        assert chain.write(b"again", offset=16) == 5
        assert bench.memory.read(EDGE, 5) == b"again"
        assert bench.queue.push(chain)
        assert bench.driver.take() == [(chain.head, 21)]


@tells("P18")
def a_broken_head_does_not_keep_a_loop_running(policy: Policy) -> None:
    """CVE-2026-16457: a device loop `while has_work()` over INDIRECT and NEXT."""
    for bench in formats(policy):
        bench.tabled()
        bench.put("desc.flags", bench.get("desc.flags") | NEXT | INDIRECT)
        found = list[str]()
        while bench.queue.has_work():
            assert len(found) <= 10 * bench.size
            try:
                bench.queue.process(lambda _: b"")
            except QueueViolation as violation:
                found.append(violation.rule)
        assert found == ["IndirectAndNext"]


@tells("P22", "P23")
def event_structures_that_make_no_sense_get_a_notification(policy: Policy) -> None:
    """Reserved flags, an offset beyond the ring, DESC without EVENT_IDX: an error of the driver, and it is told."""
    nonsense = [(3, 0), (0xFFFF, 0), (0xFFFE, 8), (0xFFFC, 0)]
    beyond = [(2, 8), (2, 0x7FFF), (2, 0xFFFF)]
    cases = [(features, *words) for features in (0, EVENT_IDX) for words in nonsense + beyond] + [(0, 2, 0)]
    for features, flags, off_wrap in cases:
        bench = Bench(packed=True, policy=policy, features=features)
        bench.several()
        # The first signal is always sent: the one that counts is the second.
        bench.queue.push(bench.pop(), 0)
        bench.queue.signal()
        bench.put("driver_event.flags", flags)
        bench.put("driver_event.off_wrap", off_wrap)
        bench.queue.push(bench.pop(), 0)
        assert bench.queue.signal(), f"flags {flags:#x}, off_wrap {off_wrap:#x}"


@tells("P19")
def a_used_descriptor_says_write_when_something_was_written(policy: Policy) -> None:
    """2.8.3, 2.8.6: WRITE iff bytes were written, the wrap bits, nothing else (`Bench.used` compares the flags)."""
    bench = Bench(packed=True, policy=policy)
    bench.several()
    bench.put("desc.flags", bench.get("desc.flags") | 0x7F78)
    for written in (0, 1, 32, 0, 5):
        place = bench.queue.state.used
        chain = bench.pop()
        bench.queue.push(chain, written)
        assert bench.used(place) == (chain.head, written)


@tells("P20", "P21")
def chains_of_several_slots_are_used_in_any_order_across_the_end(policy: Policy) -> None:
    """The used descriptor goes to the next used place and skips as many slots as that chain had."""
    for wrap in (0, 1):
        bench = Bench(packed=True, policy=policy, size=7, start=4 | wrap << 15)
        for _ in range(6):
            first = bench.add((READ_A, 1, False), (READ_A, 2, False), (WRITE, 9, True))
            second = bench.add((READ_A, 3, False), (WRITE + 64, 9, True))
            third = bench.add((WRITE + 128, 9, True))
            bench.popped.clear()
            bench.drain()
            assert [chain.head for chain in bench.popped] == [first, second, third]
            at = bench.queue.state.used
            bench.popped = [bench.popped[1], bench.popped[2], bench.popped[0]]
            bench.complete()
            assert bench.driver.take() == [(second, 9), (third, 9), (first, 9)]
            assert bench.queue.state.used == bench.queue.state.avail
            slots = ((at & 0x7FFF) + (0 if at >> 15 else 7) + 6) % 14
            assert bench.queue.state.used == slots % 7 | (slots < 7) << 15


@tells("P27")
def flags_are_loaded_before_the_rest_of_a_descriptor(policy: Policy) -> None:
    """2.8.21.1.1: else address and length may be older than the flags that vouch for them."""
    bench = Bench(packed=True, policy=policy)
    bench.direct()
    assert bench.queue
    bench.trace.clear()
    bench.pop()
    loads = [access.address for access in bench.trace.log() if access.kind == "load"]
    for slot in range(3):
        flags = loads.index(bench.at("desc.flags", slot))
        for name in ("desc.addr", "desc.len", "desc.id"):
            assert loads.index(bench.at(name, slot)) > flags


@tells("P28")
def flags_are_stored_after_the_rest_and_the_first_ones_last(policy: Policy) -> None:
    bench = Bench(packed=True, policy=policy)
    bench.several()
    batch = bench.queue.pop_many(3)
    bench.trace.clear()
    batch.respond(bytes(3 * 4))
    stores = [access.address for access in bench.trace.log() if access.kind == "store"]
    for slot in range(3):
        flags = stores.index(bench.at("desc.flags", slot))
        assert stores.index(bench.at("desc.id", slot)) < flags
        assert stores.index(bench.at("desc.len", slot)) < flags
    assert stores[-1] == bench.at("desc.flags", 0)

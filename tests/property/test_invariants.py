"""The invariants V1 to V9 and V12, V13 of the robustness catalogue: on legal traffic, under chaos, under a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from virtio_test._core import Access, DeviceQueue, GuestMemory, Policy, Trace
from virtio_test.errors import QueueViolation

from tests.property.bench import DATA, HOLE, RING, Bench
from tests.property.ends import IN_ORDER, ModelDriverEnd
from tests.property.play import guest, play, transcript
from tests.property.shapes import Script, scripts
from tests.property.watch import WatchedEnd
from tests.unit.world import mapped_files, open_fds

# ------------------------------------------------------------------------------------------------------ legal traffic


def watched(script: Script) -> tuple[list[tuple[object, ...]], list[tuple[str, int, int]]]:
    """Play a script on a watched device end: what the driver saw, and every access."""
    trace = Trace()
    memory = guest(script, trace=trace)
    queue = DeviceQueue(memory, script.setup.config(), state=script.setup.state())
    device = WatchedEnd(queue, trace)
    events = transcript(play(script, memory, ModelDriverEnd(script.setup, memory), device))
    return events, [(access.kind, access.address, access.length) for access in device.watch.history]


@pytest.mark.row("U06")
@given(scripts())
def test_legal_traffic_keeps_the_invariants_and_is_deterministic(script: Script) -> None:
    """V1 to V7 are judged by `Watch` at every call; V13: the same again is the same to the last access."""
    assert watched(script) == watched(script)


@pytest.mark.row("U10")
def test_in_order_does_not_let_more_in_flight_than_the_ring_has() -> None:
    """V6: chains that wait for their turn are still in flight; else an evil driver makes the host keep ever more."""
    for policy in (Policy.interop, Policy.strict):
        bench = Bench(packed=False, policy=policy, features=IN_ORDER)
        bench.full()
        bench.drain()
        for chain in bench.popped[1:]:
            assert bench.queue.push(chain, 0)
        assert bench.get("used.idx") == 0
        for slot in range(8):
            bench.put("avail.ring", slot, slot)
        bench.put("avail.idx", 16)
        with pytest.raises(QueueViolation):
            bench.drain()
        assert len(bench.popped) == 8


# --------------------------------------------------------------------------------------------------------------- leaks


@pytest.mark.row("U12")
def test_a_thousand_malformed_rings_leave_nothing_behind() -> None:
    """V12: file descriptors and mappings of the process return to where they were."""

    def held() -> tuple[int, int]:
        return open_fds(), mapped_files()

    def attack() -> None:
        bench = Bench(packed=False)
        for number in range(100):
            bench.direct()
            bench.put("desc.addr", HOLE, number % 3)
            with pytest.raises(QueueViolation, match="UnmappedAddress"):
                bench.drain()
            bench.assert_reset_heals()
            bench.driver.take()
            bench.memory.fill(RING, 1 << 16)
            bench.queue.reset()
            bench.driver = bench.setup.model_driver(bench.memory)

    attack()
    before = held()
    for _ in range(10):
        attack()
    assert held() == before


# --------------------------------------------------------------------------------------------------------------- races

OTHER = {
    "desc.addr": [DATA + 0x40, HOLE],
    "desc.len": [1, 0xFFFF_FFFF],
    "desc.flags": [0, 1, 2, 3, 4, 5, 0x80, 0x8080],
    "desc.next": [0, 5, 0xFFFF],
    "desc.id": [5, 0xFFFF],
    "avail.idx": [0, 2, 9],
    "avail.ring": [1, 0xFFFF],
}
Outcome = tuple[object, ...]


def story(bench: Bench) -> Outcome:
    """One chain from its pop to its used entry; what came of it."""
    place = bench.queue.state.used
    try:
        chain = bench.queue.pop()
    except QueueViolation as violation:
        return "violation", violation.rule, violation.descriptor
    if chain is None:
        return ("nothing",)
    data = chain.read()
    written = chain.write(b"\xa5" * 8)
    bench.queue.push(chain)
    return "chain", chain.segments, data, written, bench.used(place)


def changes(packed: bool, shape: str) -> Iterator[tuple[str, int, int, int]]:
    """(what, address, width, value) of every field that the pop looks at."""
    bench = Bench(packed)
    layouts = [("ring", bench.setup.layout)] + [("table", bench.table)] * (shape != "direct")
    for where, layout in layouts:
        fields = layout.fields()
        for name, others in OTHER.items():
            if name not in fields or (where == "table" and not name.startswith("desc")):
                continue
            for index in range(3 if name.startswith("desc") else 1):
                for value in others:
                    yield f"{where} {name}[{index}] = {value:#x}", layout.at(name, index), fields[name][1], value


@pytest.mark.row("T01", "T02", "T03", "T04", "T05", "T06", "T07", "T09")
@pytest.mark.parametrize("policy", [Policy.interop, Policy.strict], ids=["interop", "strict"])
@pytest.mark.parametrize(
    ("packed", "shape"),
    [(False, "direct"), (False, "tabled"), (False, "mixed"), (True, "direct"), (True, "tabled")],
)
def test_a_race_has_the_result_of_one_snapshot(packed: bool, shape: str, policy: Policy) -> None:
    """2.11: a field changes just before access n, for every n of a pop and all that follows it, and for every field.

    Each field is read once, so the outcome is that of the ring before the change or that of the ring after it.
    """

    def run(change: tuple[int, bytes] | None = None, at: int = 0) -> tuple[Outcome, int]:
        bench = Bench(packed, policy)
        getattr(bench, shape)()
        assert bench.queue.size == 8
        bench.trace.clear()
        if change:
            bench.trace.change_at(at, *change)
        outcome = story(bench)
        kinds = [access.kind for access in bench.trace.log()]
        # With its first store the device gives the buffer back: what changes after that is no race.
        return outcome, kinds.index("store") if "store" in kinds else len(kinds)

    before, count = run()
    assert before[0] == "chain"
    late = 0
    for what, address, width, value in changes(packed, shape):
        change = address, value.to_bytes(width, "little")
        after = run(change)[0]
        for number in range(1, count):
            outcome = run(change, number)[0]
            assert outcome in (before, after), f"{what} before access {number} of {count}"
            late += outcome == before != after
    assert late > count, "no change ever came too late: the harness does not reach the reads"


def test_the_trace_numbers_accesses_as_the_race_needs_it() -> None:
    """The harness itself: a change just before access n is seen by access n and not by n - 1."""
    trace = Trace()
    bench = Bench(packed=False, trace=trace)
    bench.single()
    assert bench.queue
    trace.clear()
    bench.pop()
    log: list[Access] = trace.log()
    number = next(n for n, access in enumerate(log) if access.address == bench.at("avail.ring"))
    for shift, head in ((0, 3), (1, 0)):
        fresh = Bench(packed=False)
        fresh.single()
        fresh.memory.copy(fresh.at("desc.addr", 3), fresh.at("desc.addr"), 16)
        fresh.trace.clear()
        fresh.trace.change_at(number + shift, fresh.at("avail.ring"), b"\x03\x00")
        assert fresh.pop().head == head
    assert isinstance(bench.memory, GuestMemory)

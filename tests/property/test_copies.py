"""Partial copies: any length at any offset of a chain is a slice of its bytes, however it is cut into segments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Chain, DeviceQueue, GuestMemory
from virtio_test.errors import StaleMemory

from tests.property.model import Plan
from tests.property.play import fill, guest
from tests.property.shapes import Script, scripts

AT = st.one_of(st.integers(0, 40), st.integers(0, 6000))
READS = st.lists(st.tuples(AT, st.one_of(st.none(), AT)), min_size=1, max_size=6)
WRITES = st.lists(st.tuples(st.sampled_from(["write", "fill"]), AT, AT), min_size=1, max_size=6)


def first(script: Script) -> tuple[GuestMemory, Plan, bytes, Chain]:
    """The first request of a script, popped."""
    memory, setup = guest(script), script.setup
    request, plan = next(script.place())
    data = request.data(0)
    fill(memory, plan, data)
    driver = setup.model_driver(memory)
    driver.add(plan)
    driver.publish()
    chain = DeviceQueue(memory, setup.config(), state=setup.state()).pop()
    assert chain is not None
    return memory, plan, data, chain


def writable(memory: GuestMemory, plan: Plan) -> bytes:
    return b"".join(memory.read(s.address, s.length) for s in plan.segments if s.writable)


@given(scripts(), READS)
def test_reads_are_slices(script: Script, reads: list[tuple[int, int | None]]) -> None:
    _, _, data, chain = first(script)
    assert chain.readable == len(data)
    for offset, length in reads:
        wanted = data[offset:] if length is None else data[offset : offset + length]
        assert chain.read(length, offset=offset) == wanted
        buffer = bytearray(b"\xee" * (len(wanted) + 3))
        assert chain.read_into(buffer, offset=offset) == len(data[offset : offset + len(buffer)])
        assert buffer[: len(wanted)] == wanted
        assert chain.read_into(memoryview(buffer)[1:1], offset=offset) == 0


@given(scripts(), WRITES)
def test_writes_are_slices_and_written_is_their_end(script: Script, writes: list[tuple[str, int, int]]) -> None:
    memory, plan, _, chain = first(script)
    expected = bytearray(writable(memory, plan))
    assert chain.writable == len(expected)
    furthest = 0
    for number, (how, offset, length) in enumerate(writes, start=1):
        count = max(0, min(length, len(expected) - offset))
        content = bytes([number]) * length
        if how == "write":
            assert chain.write(content, offset=offset) == count
        else:
            assert chain.fill(number, offset=offset, length=length) == count
        expected[offset : offset + count] = content[:count]
        furthest = max(furthest, offset + count) if count else furthest
        assert chain.written == furthest
        assert writable(memory, plan) == expected
    assert chain.fill(0xFF) == len(expected)
    assert writable(memory, plan) == b"\xff" * len(expected)


@given(scripts(), st.integers(0, 7))
def test_a_write_into_memory_that_is_half_gone_writes_nothing(script: Script, which: int) -> None:
    """One region with a writable segment is unmapped after the pop: no byte of the others changes."""
    memory, plan, _, chain = first(script)
    segments = [s for s in plan.segments if s.writable and s.length]
    if not segments:
        assert chain.writable == 0
        return
    victim = segments[which % len(segments)].address
    region = next(r for r in memory.regions if r.address <= victim < r.address + r.size)
    memory.remove_region(region.address, region.size)
    kept = [s for s in segments if memory.is_mapped(s.address, s.length)]
    before = [memory.read(s.address, s.length) for s in kept]
    with pytest.raises(StaleMemory):
        chain.write(b"\xa5" * chain.writable)
    with pytest.raises(StaleMemory):
        chain.fill(0xA5)
    assert [memory.read(s.address, s.length) for s in kept] == before
    assert chain.written == 0

"""Our driver end against an evil device, in stories of several calls; `test_one_defect.py` has the used rings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import DriverQueue, GuestMemory, Policy
from virtio_test.errors import QueueFull

from tests.property.bench import DATA, PAGE, RING
from tests.property.driver_bench import DriverBench
from tests.property.ends import EVENT_IDX, IN_ORDER, Setup, features_of
from tests.property.model import Segment

POLICIES = pytest.mark.parametrize("policy", [Policy.interop, Policy.strict], ids=["interop", "strict"])
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.mark.row("G09")
@POLICIES
@FORMATS
def test_g09_calls_for_nothing(packed: bool, policy: Policy) -> None:
    """Nothing used, nothing in flight, after everything was taken: None, and one load each after the first."""
    bench = DriverBench(packed, policy)
    assert bench.queue.get_used() is None
    (token,) = bench.publish()
    assert bench.queue.get_used_many() == []
    bench.device.push((bench.pop(), 3))
    assert bench.queue.get_used_many() == [(token, 3)]
    assert bench.queue.get_used() is None
    bench.trace.clear()
    for _ in range(50):
        assert bench.queue.get_used() is None
        assert not bench.queue.has_used()
    assert [access.kind for access in bench.trace.log()] == ["load"] * 100


@pytest.mark.row("G10")
@given(st.booleans(), st.booleans(), st.lists(st.tuples(*[st.integers(0, 0xFFFF)] * 2), max_size=8))
def test_g10_garbage_in_the_suppression_fields_costs_notifications_only(
    packed: bool, event_idx: bool, words: list[tuple[int, int]]
) -> None:
    bench = DriverBench(packed, features=EVENT_IDX * event_idx)
    names = ("device_event.off_wrap", "device_event.flags") if packed else ("avail_event", "used.flags")
    for pair in words:
        for name, value in zip(names, pair, strict=True):
            bench.put(name, value)
        token = bench.queue.add([], [(DATA, 32)])
        assert bench.queue.signal() in (True, False)
        bench.device.push((bench.pop(), 2))
        assert bench.queue.get_used() == (token, 2)
    assert bench.queue.latched is None


@FORMATS
@given(st.integers(0, 2**32), st.binary(min_size=16, max_size=16))
def test_what_the_device_scribbles_over_descriptors_is_never_read_back(packed: bool, seed: int, junk: bytes) -> None:
    """2.7.5.1: the device must not write the table; the driver's free list and lengths live elsewhere."""
    bench = DriverBench(packed)
    for _ in range(5):
        tokens = bench.publish(8)
        with pytest.raises(QueueFull):
            bench.queue.add([], [(DATA, 1)])
        elements = [bench.pop() for _ in tokens]
        if not packed:
            bench.memory.write(bench.queue.layout().desc, junk * 8)
        order = sorted(range(8), key=lambda number: hash((seed, number)))
        for number in order:
            bench.device.push((elements[number], number))
        assert bench.queue.get_used_many() == [(tokens[number], number) for number in order]
        assert bench.queue.free == 8


@pytest.mark.row("U11")
@POLICIES
@FORMATS
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 3))
def test_u11_one_used_entry_for_a_batch(packed: bool, policy: Policy, sizes: list[int], start: int) -> None:
    """IN_ORDER: what a batch skips counts as written whole (2.7.9, 2.8.8)."""
    first = start | 0x8000 if packed else 0xFFFE + start & 0xFFFF
    bench = DriverBench(packed, policy, features=IN_ORDER, start=first)
    for size in sizes:
        tokens = bench.publish(size)
        bench.device.push_batch([bench.pop() for _ in tokens], 9)
        expected = [(token, 32) for token in tokens[:-1]] + [(tokens[-1], 9)]
        assert bench.queue.get_used_many() == expected
    assert bench.queue.free == 8


@FORMATS
def test_the_driver_end_writes_its_own_areas_only(packed: bool) -> None:
    bench = DriverBench(packed)
    bench.trace.clear()
    for _ in range(20):
        (token,) = bench.publish()
        bench.device.push((bench.pop(), 1))
        assert bench.queue.get_used_many() == [(token, 1)]
        bench.queue.enable_calls()
        bench.queue.disable_calls()
        bench.queue.signal()
    layout = bench.queue.layout()
    stores = [access.address for access in bench.trace.log() if access.kind in ("store", "write")]
    assert stores
    assert all(layout.desc <= address < layout.driver + layout.driver_bytes for address in stores)


def test_a_fresh_ring_is_zeroed_first() -> None:
    """2.7.10.1, 2.8.1: whatever lay there before."""
    for packed in (False, True):
        memory = GuestMemory([(RING, 1 << 16), (DATA, PAGE)])
        memory.fill(RING, 1 << 16, 0xFF)
        setup = Setup(packed, 4, RING, 0x8000 if packed else 0, features_of(0, packed=packed))
        queue = DriverQueue(memory, setup.config())
        assert memory.read(RING, setup.layout.desc_bytes) == bytes(setup.layout.desc_bytes)
        assert queue.get_used() is None
        token = queue.add([], [(DATA, 4)])
        queue.publish()
        device = setup.model_device(memory)
        element = device.pop()
        assert element is not None
        assert element.segments == [Segment(DATA, 4, writable=True)]
        device.push((element, 4))
        assert queue.get_used_many() == [(token, 4)]

"""Our driver end against an evil device: section 2.14 of the robustness catalogue, rows G01 to G11."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import DriverQueue, GuestMemory, Policy
from virtio_test.errors import QueueFull

from tests.property.bench import AVAIL, DATA, PAGE, RING, USED, W
from tests.property.driver_bench import DriverBench
from tests.property.ends import EVENT_IDX, IN_ORDER, Setup, features_of
from tests.property.model import Segment

POLICIES = pytest.mark.parametrize("policy", [Policy.interop, Policy.strict], ids=["interop", "strict"])
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.mark.row("G01")
@POLICIES
@FORMATS
@pytest.mark.parametrize("identity", [8, 0x7FFF, 0xFFFF, 0x10000, 0xFFFF_FFFF])
def test_g01_used_id_beyond_the_queue(packed: bool, policy: Policy, identity: int) -> None:
    bench = DriverBench(packed, policy)
    tokens = bench.publish()
    if packed and identity > 0xFFFF:
        identity = 0xFFFF
    bench.use(identity)
    bench.assert_breaks("UsedIdOutOfRange", tokens)


@pytest.mark.row("G02")
@POLICIES
@FORMATS
def test_g02_used_id_of_nothing_in_flight(packed: bool, policy: Policy) -> None:
    bench = DriverBench(packed, policy)
    tokens = bench.publish(2)
    free = bench.queue.free
    bench.use(7)
    assert bench.queue.free == free
    bench.assert_breaks("UsedIdNotInFlight", tokens)


@pytest.mark.row("G02")
@POLICIES
@FORMATS
def test_g02_used_id_of_the_middle_of_a_chain(packed: bool, policy: Policy) -> None:
    bench = DriverBench(packed, policy)
    token = bench.queue.add([(DATA, 1), (DATA + 8, 1)], [(DATA + 16, 1)])
    bench.queue.publish()
    head = bench.pop().head
    bench.use((head + 1) % 8)
    bench.assert_breaks("UsedIdNotInFlight", [token])


@pytest.mark.row("G02")
@POLICIES
def test_g02_used_id_of_a_buffer_that_was_not_shown_yet(policy: Policy) -> None:
    bench = DriverBench(packed=False, policy=policy)
    (first,) = bench.publish()
    head = bench.pop().head
    second = bench.queue.add([], [(DATA + 64, 32)])
    bench.use((head + 1) % 8)
    bench.assert_breaks("UsedIdNotInFlight", [first, second])


@pytest.mark.row("G04")
@POLICIES
@FORMATS
@pytest.mark.parametrize("length", [33, 1 << 31, 0xFFFF_FFFF])
def test_g04_used_length_beyond_the_buffer(packed: bool, policy: Policy, length: int) -> None:
    bench = DriverBench(packed, policy)
    tokens = bench.publish()
    bench.use(bench.pop().head, length)
    bench.assert_breaks("UsedLenTooBig", tokens)


@pytest.mark.row("G04")
@FORMATS
def test_g04_clamped_where_the_policy_says_so(packed: bool) -> None:
    bench = DriverBench(packed, Policy(used_len_beyond=True))
    (token,) = bench.publish()
    bench.use(bench.pop().head, 0xFFFF_FFFF)
    assert bench.queue.get_used() == (token, 32)


@pytest.mark.row("G04")
@POLICIES
@FORMATS
def test_g04_a_readable_buffer_takes_nothing(packed: bool, policy: Policy) -> None:
    bench = DriverBench(packed, policy)
    token = bench.queue.add([(DATA, 64)])
    bench.queue.publish()
    bench.use(bench.pop().head, 1)
    bench.assert_breaks("UsedLenTooBig", [token])


@pytest.mark.row("G05", "G06")
@POLICIES
@pytest.mark.parametrize("idx", [3, 9, 0x8000, 0xFFFF])
def test_g05_g06_used_idx_ahead_or_back(policy: Policy, idx: int) -> None:
    """2 in flight, so 0, 1 and 2 are all that used.idx can be; 0xFFFF is a step back."""
    bench = DriverBench(packed=False, policy=policy)
    tokens = bench.publish(2)
    bench.use(0, idx=idx)
    bench.assert_breaks("UsedIdxTooFar", tokens)


@pytest.mark.row("G05")
@POLICIES
def test_g05_what_was_not_shown_cannot_be_used(policy: Policy) -> None:
    bench = DriverBench(packed=False, policy=policy)
    tokens = bench.publish(1)
    tokens.append(bench.queue.add([], [(DATA, 32)]))
    bench.use(bench.pop().head, idx=2)
    bench.assert_breaks("UsedIdxTooFar", tokens)


@pytest.mark.row("G08")
@POLICIES
@FORMATS
def test_g08_one_id_twice(packed: bool, policy: Policy) -> None:
    bench = DriverBench(packed, policy)
    first, second = bench.publish(2)
    head = bench.pop().head
    bench.use(head, 1)
    bench.use(head, 1, slot=1)
    assert bench.queue.get_used() == (first, 1)
    bench.assert_breaks("UsedIdNotInFlight", [second])


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


@pytest.mark.row("G11")
@POLICIES
@pytest.mark.parametrize("flags", [0, AVAIL, USED, W, AVAIL | W, USED | W])
def test_g11_a_descriptor_that_is_not_used_is_not_taken(policy: Policy, flags: int) -> None:
    """AVAIL unlike USED, or both of the lap before: nothing has come back."""
    bench = DriverBench(packed=True, policy=policy)
    bench.publish()
    bench.put("desc.id", 0)
    bench.put("desc.flags", flags)
    assert bench.queue.get_used() is None
    assert not bench.queue.has_used()
    assert bench.queue.latched is None


@pytest.mark.row("G11")
@POLICIES
@FORMATS
def test_g11_nothing_in_flight_is_nothing_used(packed: bool, policy: Policy) -> None:
    """A used entry of the present lap, and never a buffer: no id can be right."""
    bench = DriverBench(packed, policy)
    bench.use(0)
    bench.assert_breaks("UsedIdNotInFlight" if packed else "UsedIdxTooFar", [])


@pytest.mark.row("P19")
@pytest.mark.parametrize("flags", [AVAIL | USED, AVAIL | USED | W])
def test_p19_a_length_without_write_counts_only_for_interop(flags: int) -> None:
    """2.8.4: without WRITE the length is reserved; QEMU never sets it."""
    for policy in (Policy.interop, Policy.strict):
        bench = DriverBench(packed=True, policy=policy)
        (token,) = bench.publish()
        bench.use(bench.pop().head, 7)
        bench.put("desc.flags", flags)
        wanted = 7 if flags & W or policy == Policy.interop else 0
        assert bench.queue.get_used() == (token, wanted)


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


@pytest.mark.row("U11")
@POLICIES
def test_u11_a_batch_beyond_used_idx(policy: Policy) -> None:
    """IN_ORDER: the entry names the third buffer, and used.idx says that one was used."""
    bench = DriverBench(packed=False, policy=policy, features=IN_ORDER)
    tokens = bench.publish(3)
    heads = [bench.pop().head for _ in tokens]
    bench.use(heads[2], 1, idx=1)
    bench.assert_breaks("UsedIdNotInFlight", tokens)


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

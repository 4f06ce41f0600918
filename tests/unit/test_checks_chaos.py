"""`check_ring` over arbitrary rings: it never fails, and never misses what a running queue meets first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_test._core import DeviceQueue, GuestMemory, Policy, QueueConfig, QueueState, RingLayout
from virtio_test.checks import check_ring
from virtio_test.checks.example import BUFFER, NOWHERE, RING, TABLE
from virtio_test.errors import QueueViolation

SIZE = 4
DYNAMIC = {"AvailIdxDecreased", "TooManyInFlight"}
"""What comes of taking several chains without completing one."""

POOLS = {
    "addr": [0, BUFFER, TABLE, RING, NOWHERE, 2**64 - 8, 0x3FFF8],
    "len": [0, 1, 16, 24, 32, 80, 2**32 - 1],
    "flags": [0, 1, 2, 3, 4, 5, 6, *(0x80 | low for low in range(7)), *(0x8000 | low for low in range(7)), 0xFFFF],
    "next": [0, 1, 2, 3, 4, 0xFFFF],
    "id": [0, 1, 2, 4, 0xFFFF],
    "ring": [0, 1, 2, 3, 4, 0xFFFF],
    "idx": [0, 1, 2, 3, 4, 5, 0xFFFF],
}
policies = st.sampled_from([Policy.strict, Policy.interop, Policy("strict", mixed_order=True)])


@st.composite
def images(draw: st.DrawFn) -> tuple[GuestMemory, RingLayout]:
    """A ring, and an indirect table, of values that nearly make sense."""
    layout = RingLayout.contiguous(SIZE, RING, packed=draw(st.booleans()))
    table = RingLayout(SIZE, packed=layout.packed, desc=TABLE, driver=TABLE + 0x1000, device=TABLE + 0x2000)
    memory = GuestMemory([(0, 0x40000)])
    for where in (layout, table):
        for name, (_, width, _, count) in where.fields().items():
            for index in range(count):
                pool = POOLS.get(name.rpartition(".")[2], [0, 1, 4])
                value = draw(st.sampled_from(pool)) & (1 << 8 * width) - 1
                memory.write(where.at(name, index), value.to_bytes(width, "little"))
    return memory, layout


@settings(max_examples=300, deadline=None)
@given(image=images(), policy=policies, features=st.sampled_from([0, 1 << 28, 1 << 29]), start=st.integers(0, 5))
def test_what_a_running_queue_meets_is_told(
    image: tuple[GuestMemory, RingLayout], policy: Policy, features: int, start: int
) -> None:
    memory, layout = image
    config = QueueConfig.from_layout(layout, features=features, policy=policy)
    state = QueueState(start % SIZE | (start & 1) << 15 if layout.packed else start)
    before = memory.read(0, 0x40000)
    found = check_ring(memory, config, state=state)
    assert memory.read(0, 0x40000) == before
    met = None
    try:
        queue = DeviceQueue(memory, config, state=state)
        while queue.pop() is not None:
            pass
    except QueueViolation as error:
        met = error
    if met is not None and met.rule not in DYNAMIC:
        assert (met.rule, met.position, met.message) in [(each.rule, each.position, each.message) for each in found]
    elif met is None:
        # The other way round: chains are found good as well; what is left is no chain's.
        others = ("Used", "AvailFlags", "Event")
        assert [each for each in found if not each.rule.startswith(others)] == []


@settings(max_examples=150, deadline=None)
@given(image=images(), taken=st.integers(0, 5), policy=policies)
def test_used_elements_of_any_kind_are_judged(
    image: tuple[GuestMemory, RingLayout], taken: int, policy: Policy
) -> None:
    memory, layout = image
    config = QueueConfig.from_layout(layout, features=1 << 28, policy=policy)
    if layout.packed:
        return
    found = check_ring(memory, config, driver_state=QueueState(taken))
    for each in found:
        assert each.queue == 0
        if each.rule in ("UsedIdOutOfRange", "UsedLenTooBig"):
            assert each.position is not None
            assert each.address is not None
            slot = each.position % SIZE
            assert each.address == layout.at("used.ring.id", slot)
            identity = int.from_bytes(memory.read(each.address, 4), "little")
            assert (identity >= SIZE) == (each.rule == "UsedIdOutOfRange")


@settings(max_examples=100, deadline=None)
@given(
    size=st.sampled_from([0, 1, 3, 4, 32768, 32769, 65536, 2**32 - 1]),
    places=st.tuples(*[st.sampled_from([0, 1, RING, RING + 8, 0x3FFF0, NOWHERE, 2**64 - 16, 2**64 - 1])] * 3),
    packed=st.booleans(),
)
def test_any_place_and_size_is_judged(size: int, places: tuple[int, int, int], packed: bool) -> None:
    memory = GuestMemory([(0, 0x40000)])
    desc, driver, device = places
    config = QueueConfig(size, desc=desc, driver=driver, device=device, features=packed << 34, policy=Policy.strict)
    found = [each.rule for each in check_ring(memory, config)]
    met = None
    try:
        DeviceQueue(memory, config)
    except QueueViolation as error:
        met = error.rule
    refusals = [rule for rule in found if rule in {"RingMisaligned", "RingUnmapped"} or rule.startswith("QueueSize")]
    assert met in refusals if met else not refusals

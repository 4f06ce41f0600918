"""`check_ring`: all that is broken in an image, by the same rules as a running queue, and nothing of it written."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Policy, QueueConfig, QueueState, RingLayout
from virtio_test.checks import EXAMPLES, Example, check_ring
from virtio_test.checks.example import AVAIL, BUFFER, INDIRECT, NEXT, NOWHERE, RING, TABLE, USED, WRITE, Write
from virtio_test.errors import InvalidArgument, QueueViolation

EVENT_IDX, INDIRECT_DESC, RING_PACKED = 1 << 29, 1 << 28, 1 << 34
DYNAMIC = {"AvailIdxDecreased", "TooManyInFlight"}
"""What only a running queue sees."""


def examples(end: str, *, packed: bool | None = None) -> list[Example]:
    return [
        each
        for found in EXAMPLES.values()
        for each in found
        if each.end == end and each.rule not in DYNAMIC and packed in (None, each.packed)
    ]


def name_of(example: Example) -> str:
    return f"{example.rule}-{'packed' if example.packed else 'split'}"


def split(*writes: Write, size: int = 4, features: int = INDIRECT_DESC) -> tuple[GuestMemory, QueueConfig]:
    return image(writes, size, features, is_packed=False)


def packed(*writes: Write, size: int = 4, features: int = INDIRECT_DESC) -> tuple[GuestMemory, QueueConfig]:
    return image(writes, size, features, is_packed=True)


def image(writes: tuple[Write, ...], size: int, features: int, *, is_packed: bool) -> tuple[GuestMemory, QueueConfig]:
    memory = GuestMemory([(0, 0x40000)])
    layout = RingLayout.contiguous(size, RING, packed=is_packed)
    for name, index, value in writes:
        memory.write(layout.at(name, index), value.to_bytes(layout.fields()[name][1], "little"))
    return memory, QueueConfig.from_layout(layout, index=5, features=features, policy=Policy.strict)


def desc(index: int, address: int, length: int, flags: int = 0, last: int = 0, *, of: str = "next") -> list[Write]:
    values = {"addr": address, "len": length, "flags": flags, of: last}
    return [(f"desc.{name}", index, value) for name, value in values.items()]


def told(found: list[QueueViolation]) -> list[tuple[str, int | None]]:
    return [(each.rule, each.position) for each in found]


@pytest.mark.parametrize("example", examples("device"), ids=name_of)
def test_a_minimal_ring_shows_the_same_as_a_running_queue(example: Example) -> None:
    for policy in (Policy.strict, Policy.interop):
        memory, config = example.image(policy)
        state = QueueState(*example.state) if example.state else None
        before = memory.read(0, 1 << 16)
        found = check_ring(memory, config, state=state)
        met = example.run(policy)
        assert [each.rule for each in found] == ([met.rule] if met else [])
        # A repeated head is told of a ring of our own, so the words are the same and nothing else must be.
        assert [str(each).split(" [")[0] for each in found] == ([str(met).split(" [")[0]] if met else [])
        assert [(each.position, each.head) for each in found] == ([(met.position, met.head)] if met else [])
        assert memory.read(0, 1 << 16) == before


@pytest.mark.parametrize("example", examples("driver", packed=False), ids=name_of)
def test_used_elements_are_judged_as_a_driver_judges_them(example: Example) -> None:
    memory, config = example.image()
    found = check_ring(memory, config, driver_state=QueueState(1, 0))
    met = example.run()
    assert met is not None
    if example.rule == "UsedIdNotInFlight":
        # The head was never made available, which the driver knows and an image that was written over does not show.
        assert found == []
    else:
        assert [(each.rule, each.message, each.position, each.address) for each in found] == [
            (met.rule, met.message, met.position, met.address)
        ]


def test_every_broken_chain_of_a_split_ring_is_told() -> None:
    writes = [
        *desc(0, BUFFER, 16, NEXT, 9),
        *desc(1, BUFFER, 16),
        *desc(2, NOWHERE, 16),
        *desc(3, TABLE, 24, INDIRECT),
    ]
    writes += [("avail.ring", slot, head) for slot, head in enumerate((0, 1, 2, 3))] + [("avail.idx", 0, 4)]
    memory, config = split(*writes)
    assert told(check_ring(memory, config)) == [("NextOutOfRange", 0), ("UnmappedAddress", 2), ("IndirectBadLen", 3)]
    # Who has consumed more is told of less.
    later = check_ring(memory, config, state=QueueState(3, 3))
    assert told(later) == [("IndirectBadLen", 3)]
    assert later[0].queue == 5


def test_every_broken_list_of_a_packed_ring_is_told() -> None:
    lists = [
        *desc(0, BUFFER, 16, AVAIL | WRITE | NEXT, of="id"),
        *desc(1, BUFFER, 16, AVAIL, of="id"),
        *desc(2, BUFFER, 16, AVAIL, 7, of="id"),
        *desc(3, NOWHERE, 16, AVAIL, 8, of="id"),
        *desc(4, BUFFER, 16, AVAIL, 7, of="id"),
        *desc(5, BUFFER, 0, AVAIL, 9, of="id"),
    ]
    memory, config = packed(*lists, size=7)
    assert told(check_ring(memory, config)) == [
        ("OutOfOrder", 0),
        ("UnmappedAddress", 3),
        ("IdInFlight", 4),
        ("ZeroLength", 5),
    ]


def test_a_packed_ring_is_followed_across_its_end() -> None:
    begin = QueueState(2 | 1 << 15)
    writes = [
        *desc(2, BUFFER, 16, AVAIL | NEXT | WRITE, 1, of="id"),
        *desc(0, BUFFER, 16, USED, 1, of="id"),
        *desc(1, NOWHERE, 16, USED, 2, of="id"),
    ]
    memory, config = packed(*writes, size=3)
    assert told(check_ring(memory, config, state=begin)) == [("OutOfOrder", 2), ("UnmappedAddress", 1)]


def test_every_area_is_told_and_the_chains_where_they_can_be_found() -> None:
    memory, config = split(*desc(0, NOWHERE, 16), ("avail.idx", 0, 1))
    layout = config.layout()

    def moved(**areas: int) -> QueueConfig:
        places = {"desc": layout.desc, "driver": layout.driver, "device": layout.device} | areas
        return QueueConfig(4, desc=places["desc"], driver=places["driver"], device=places["device"], index=5)

    assert sorted(each.rule for each in check_ring(memory, moved(desc=RING + 8, driver=NOWHERE, device=RING + 1))) == [
        "RingMisaligned",
        "RingMisaligned",
        "RingUnmapped",
    ]
    found = check_ring(memory, moved(device=NOWHERE))
    assert [(each.rule, each.queue) for each in found] == [("RingUnmapped", 5), ("UnmappedAddress", 5)]
    assert [each.rule for each in check_ring(memory, moved(driver=NOWHERE))] == ["RingUnmapped"]


def test_a_packed_ring_is_followed_without_its_event_areas() -> None:
    memory, config = packed(*desc(0, NOWHERE, 16, AVAIL, of="id"))
    alone = QueueConfig(4, desc=config.desc, driver=1, device=2, features=RING_PACKED)
    found = [each.rule for each in check_ring(memory, alone)]
    assert sorted(found) == ["RingMisaligned", "RingMisaligned", "UnmappedAddress"]


def test_a_repeated_head_is_told_each_time_but_the_first() -> None:
    heads = [("avail.ring", slot, head) for slot, head in enumerate((2, 1, 2, 2))]
    memory, config = split(*desc(1, BUFFER, 1), *desc(2, BUFFER, 1), *heads, ("avail.idx", 0, 4))
    found = check_ring(memory, config)
    assert told(found) == [("HeadInFlight", 2), ("HeadInFlight", 3)]
    assert [(each.head, each.queue) for each in found] == [(2, 5), (2, 5)]


def used(*elements: tuple[int, int], idx: int | None = None) -> list[Write]:
    ring = [
        (f"used.ring.{name}", slot, value)
        for slot, pair in enumerate(elements)
        for name, value in zip(("id", "len"), pair, strict=True)
    ]
    return [*ring, ("used.idx", 0, len(elements) if idx is None else idx)]


def test_every_broken_used_element_is_told() -> None:
    chains = [each for head in range(4) for each in desc(head, BUFFER, 16, WRITE)]
    heads = [("avail.ring", slot, slot) for slot in range(4)] + [("avail.idx", 0, 4)]
    memory, config = split(*chains, *heads, *used((0, 16), (9, 0), (1, 17), (0, 4)))
    found = check_ring(memory, config, driver_state=QueueState(4, 0))
    assert told(found) == [("UsedIdOutOfRange", 1), ("UsedLenTooBig", 2), ("UsedIdNotInFlight", 3)]
    assert [each.address for each in found] == [config.layout().at("used.ring.id", slot) for slot in (1, 2, 3)]
    assert {each.queue for each in found} == {5}
    # What the driver has taken is not judged; without its state an id is all that can be.
    assert told(check_ring(memory, config, driver_state=QueueState(4, 2))) == [("UsedLenTooBig", 2)]
    assert told(check_ring(memory, config)) == [("UsedIdOutOfRange", 1)]


def test_used_elements_are_told_by_their_index_across_its_end() -> None:
    elements = [("used.ring.id", 3, 4), ("used.ring.id", 0, 5), ("used.idx", 0, 1), ("avail.idx", 0, 1)]
    memory, config = split(*elements)
    found = check_ring(memory, config, driver_state=QueueState(1, 0xFFFE))
    assert told(found) == [("UsedIdOutOfRange", 0xFFFF), ("UsedIdOutOfRange", 0)]
    # Without the driver's word this may be the first lap, and nobody has written the element at the end.
    assert told(check_ring(memory, config)) == told(found)[1:]


@pytest.mark.row("A14")
def test_what_nobody_has_written_to_a_used_ring_is_not_broken() -> None:
    garbage = [("used.ring.id", slot, 0xDEAD_BEEF) for slot in range(4)]
    for idx in range(4):
        written = [("used.ring.id", slot, slot) for slot in range(idx)]
        memory, config = split(*garbage, *written, ("used.idx", 0, idx), ("avail.idx", 0, idx))
        assert check_ring(memory, config) == []
        if idx:
            memory, config = split(*garbage, *written[1:], ("used.idx", 0, idx), ("avail.idx", 0, idx))
            assert told(check_ring(memory, config)) == [("UsedIdOutOfRange", 0)]
    for idx in (4, 5, 0xFFFF):
        memory, config = split(*garbage, ("used.idx", 0, idx), ("avail.idx", 0, idx))
        positions = [position for _, position in told(check_ring(memory, config))]
        assert positions == [idx - 4 + ahead for ahead in range(4)], "each slot has been written"


def test_a_used_idx_that_cannot_be_is_the_devices() -> None:
    memory, config = split(*desc(0, BUFFER, 16), ("avail.idx", 0, 1), *used(idx=3))
    assert told(check_ring(memory, config, driver_state=QueueState(1, 0))) == [("UsedIdxTooFar", 0)]
    assert told(check_ring(memory, config, driver_state=QueueState(1, 0x8000))) == [
        ("AvailIdxTooFar", 3),
        ("StateOutOfRange", None),
    ]


def test_a_packed_ring_has_no_driver_state() -> None:
    memory, config = packed()
    with pytest.raises(InvalidArgument, match="packed ring"):
        check_ring(memory, config, driver_state=QueueState(0))


@pytest.mark.parametrize(
    ("make", "name", "value", "features", "rule"),
    [
        (split, "avail.flags", 2, 0, "AvailFlagsUndefined"),
        (split, "avail.flags", 1, EVENT_IDX, "AvailFlagsUndefined"),
        (split, "avail.flags", 1, 0, None),
        (split, "used.flags", 0x8000, 0, "UsedFlagsUndefined"),
        (split, "used.flags", 1, EVENT_IDX, "UsedFlagsUndefined"),
        (packed, "driver_event.flags", 2, 0, "EventFlagsUndefined"),
        (packed, "driver_event.flags", 2, EVENT_IDX, None),
        (packed, "device_event.flags", 3, EVENT_IDX, "EventFlagsUndefined"),
        (packed, "device_event.flags", 1, 0, None),
    ],
)
def test_suppression_is_told_by_strict_alone(
    make: type, name: str, value: int, features: int, rule: str | None
) -> None:
    memory, config = make((name, 0, value), features=features)
    found = check_ring(memory, config)
    assert [each.rule for each in found] == ([rule] if rule else [])
    assert all(each.address == config.layout().at(name) for each in found)
    interop = QueueConfig.from_layout(config.layout(), features=features)
    assert check_ring(memory, interop) == []


def test_an_event_beyond_the_ring_is_told() -> None:
    for place, rules in ((4, ["EventBeyondRing"]), (3 | 1 << 15, [])):
        memory, config = packed(("driver_event.flags", 0, 2), ("driver_event.off_wrap", 0, place), features=EVENT_IDX)
        assert [each.rule for each in check_ring(memory, config)] == rules


chain_lengths = st.lists(st.integers(1, 3), min_size=0, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=chain_lengths,
    is_packed=st.booleans(),
    features=st.sampled_from([0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    start=st.sampled_from([0, 5, 0xFFFE]),
    data=st.data(),
)
def test_legal_rings_are_clean_at_every_moment(
    lengths: list[int], is_packed: bool, features: int, start: int, data: st.DataObject
) -> None:
    """Whatever our own two ends have done with a ring, strict finds nothing."""
    memory = GuestMemory([(0, 0x40000)])
    layout = RingLayout.contiguous(8, RING, packed=is_packed)
    config = QueueConfig.from_layout(layout, features=features, policy=Policy.strict)
    place = start & 7 | (start & 1) << 15 if is_packed else start
    state = QueueState(place)
    if not is_packed:
        for name in ("avail.idx", "used.idx"):
            memory.write(layout.at(name), start.to_bytes(2, "little"))
    elif not place >> 15:
        # The lap before has used all of it.
        for slot in range(8):
            memory.write(layout.at("desc.flags", slot), (AVAIL | USED).to_bytes(2, "little"))
    driver, device = DriverQueue(memory, config, state=state), DeviceQueue(memory, config, state=state)
    for length in lengths:
        if driver.free >= length:
            driver.add([(BUFFER, 16)] * (length - 1), [(BUFFER, 32)])
            driver.signal()
        for _ in range(data.draw(st.integers(0, 2))):
            if (chain := device.pop()) is not None:
                device.push(chain, data.draw(st.integers(0, 32)))
        device.signal()
        assert check_ring(memory, config, state=device.state) == []
        if not is_packed:
            assert check_ring(memory, config, driver_state=driver.state) == []
        if data.draw(st.booleans()):
            driver.get_used_many()


def test_nothing_is_written_and_a_hole_in_the_ring_is_found() -> None:
    memory, config = split(*desc(0, BUFFER, 16), ("avail.idx", 0, 1))
    before = memory.read(0, 0x40000)
    assert check_ring(memory, config) == []
    assert memory.read(0, 0x40000) == before
    memory.remove_region(0, 0x40000)
    assert [each.rule for each in check_ring(memory, config)] == ["RingUnmapped"] * 3


@pytest.mark.parametrize("what", ["heads of one list", "one table for all", "used elements"])
@pytest.mark.parametrize("size", [512, 32768])
def test_an_image_cannot_keep_us(what: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a gibi of descriptors in a mebibyte; a ring of usual size is walked all the same."""
    if size > 512:
        # The bound itself takes seconds.
        monkeypatch.setattr("virtio_test.checks.lint.MOST_LOOKS", 1 << 17)
    memory = GuestMemory([(0, 1 << 23)])
    layout = RingLayout.contiguous(size, 0x1000)
    used, indirect = what == "used elements", what == "one table for all"
    linked = b"".join(pack("<QIHH", 1 << 22, 16, NEXT * (at + 1 < size), (at + 1) % size) for at in range(size))
    single = pack("<QIHH", 1 << 20, 16 * size, INDIRECT, 0) if indirect else pack("<QIHH", 1 << 22, 16, WRITE, 0)
    memory.write(1 << 20, linked)
    memory.write(layout.desc, single * size if used or indirect else linked)
    memory.write(layout.at("avail.ring"), b"".join(at.to_bytes(2, "little") for at in range(size)))
    memory.write(layout.at("avail.idx"), size.to_bytes(2, "little"))
    if used:
        memory.write(layout.at("used.ring.id"), b"".join(pack("<II", at, 17) for at in range(size)))
        memory.write(layout.at("used.idx"), size.to_bytes(2, "little"))
    config = QueueConfig.from_layout(layout, features=INDIRECT_DESC, policy=Policy.strict)

    def check() -> list[QueueViolation]:
        return check_ring(memory, config, driver_state=QueueState(0) if used else None)

    if size > 512:
        with pytest.raises(InvalidArgument, match="more than 131072 looks"):
            check()
    else:
        assert len(check()) == (size if used else 0)

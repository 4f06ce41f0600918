"""The model against itself and against the core's tables: whoever judges must first agree with himself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import RingLayout, need_event
from virtio_test.errors import InvalidArgument

from tests.property.ends import ModelDeviceEnd, ModelDriverEnd, Setup
from tests.property.model import FlatMemory, SplitRing, passed
from tests.property.play import flat, play, transcript
from tests.property.shapes import PACKED_SIZES, SPLIT_SIZES, Script, scripts

U16 = st.integers(0, 0xFFFF)


@given(scripts())
def test_the_model_completes_every_script(script: Script) -> None:
    memory = flat(script)
    events = transcript(
        play(script, memory, ModelDriverEnd(script.setup, memory), ModelDeviceEnd(script.setup, memory))
    )
    count = sum(len(round_.requests) for round_ in script.rounds)
    assert [event[0] for event in events].count("popped") == count
    assert [event[0] for event in events].count("used") == count


@pytest.mark.parametrize("size", SPLIT_SIZES)
def test_the_core_computes_the_split_layout_of_the_model(size: int) -> None:
    layout = RingLayout.contiguous(size, 0x1230)
    assert layout.desc % 16 == layout.driver % 2 == layout.device % 4 == 0
    assert layout.desc + layout.desc_bytes <= layout.driver
    assert layout.driver + layout.driver_bytes <= layout.device
    assert layout.device + layout.device_bytes == layout.end
    ring = SplitRing(FlatMemory([]), size, layout.desc, layout.driver, layout.device)
    at = layout.at
    for index in {0, size // 2, size - 1}:
        assert at("desc.addr", index) == ring.desc + 16 * index
        assert at("desc.len", index) == ring.desc + 16 * index + 8
        assert at("desc.flags", index) == ring.desc + 16 * index + 12
        assert at("desc.next", index) == ring.desc + 16 * index + 14
        assert at("avail.ring", index) == ring.avail_ring(index)
        assert at("used.ring.id", index) == ring.used_ring(index)
        assert at("used.ring.len", index) == ring.used_ring(index) + 4
    assert at("avail.flags") == ring.avail_flags()
    assert at("avail.idx") == ring.avail_idx()
    assert at("used_event") == ring.used_event() == layout.driver + layout.driver_bytes - 2
    assert at("used.flags") == ring.used_flags()
    assert at("used.idx") == ring.used_idx()
    assert at("avail_event") == ring.avail_event() == layout.end - 2


@pytest.mark.parametrize("align", [16, 4096, 65536])
@pytest.mark.parametrize("size", SPLIT_SIZES)
def test_the_legacy_layout_is_the_split_one_with_padding_before_the_used_ring(size: int, align: int) -> None:
    base = 3 * align
    layout, plain = RingLayout.legacy(size, base, align=align), RingLayout.contiguous(size, base)
    assert (layout.desc, layout.driver, layout.packed) == (plain.desc, plain.driver, False)
    assert layout.device % align == 0
    assert 0 <= layout.device - (plain.driver + plain.driver_bytes) < align
    assert layout.device_bytes == plain.device_bytes
    assert layout == RingLayout(size, desc=layout.desc, driver=layout.driver, device=layout.device)


def test_impossible_legacy_layouts_are_refused() -> None:
    for size, base, align in [
        (8, 0, 0),
        (8, 0, 3),
        (8, 0, 8),
        (8, 0, 4095),
        (8, 2048, 4096),
        (3, 0, 4096),
        (0, 0, 4096),
    ]:
        with pytest.raises(InvalidArgument):
            RingLayout.legacy(size, base, align=align)
    with pytest.raises(InvalidArgument, match="address space"):
        RingLayout.legacy(8, 2**64 - 4096)
    with pytest.raises(InvalidArgument):
        RingLayout.legacy(8, 2**64)
    assert RingLayout.legacy(8, 4096) == RingLayout.legacy(8, 4096, align=4096)


@pytest.mark.parametrize("size", PACKED_SIZES)
def test_the_core_computes_the_packed_layout_of_the_model(size: int) -> None:
    layout = RingLayout.contiguous(size, 0x1230, packed=True)
    assert layout.desc % 16 == layout.driver % 4 == layout.device % 4 == 0
    assert layout.desc + 16 * size <= layout.driver
    assert layout.driver + 4 <= layout.device
    assert layout.device + 4 == layout.end
    for index in {0, size // 2, size - 1}:
        offsets = {"desc.addr": 0, "desc.len": 8, "desc.id": 12, "desc.flags": 14}
        assert {name: layout.at(name, index) - layout.desc - 16 * index for name in offsets} == offsets
    events = {"driver_event": layout.driver, "device_event": layout.device}
    for name, address in events.items():
        assert layout.at(f"{name}.off_wrap") == address
        assert layout.at(f"{name}.flags") == address + 2


@pytest.mark.parametrize("packed", [False, True])
def test_every_field_of_a_layout_is_addressable_and_nothing_else_is(packed: bool) -> None:
    layout = RingLayout.contiguous(4, 0x1000, packed=packed)
    covered = list[int]()
    for name, (address, size, stride, count) in layout.fields().items():
        for index in range(count):
            assert layout.at(name, index) == address + stride * index
            covered += range(layout.at(name, index), layout.at(name, index) + size)
        with pytest.raises(InvalidArgument):
            layout.at(name, count)
    assert len(covered) == len(set(covered)) == layout.desc_bytes + layout.driver_bytes + layout.device_bytes
    with pytest.raises(InvalidArgument):
        layout.at("desc.next" if packed else "desc.id")


@given(U16, U16, st.integers(0, 600))
def test_need_event_is_the_counting_of_steps(event: int, old: int, count: int) -> None:
    for place in (event, old, (old + count - 1) & 0xFFFF, (old + count) & 0xFFFF):
        assert need_event(place, (old + count) & 0xFFFF, old) == passed(place, old, count)


def test_the_model_refuses_what_it_must() -> None:
    """The judge is awake: each of its rules fires (here one of each kind)."""
    setup = Setup(packed=False, size=4, base=0, start=0, features=0)
    memory = FlatMemory([(0, 4096)])
    device = setup.model_device(memory)
    memory.write(setup.layout.at("avail.idx"), b"\x05\x00")
    with pytest.raises(AssertionError, match="ahead"):
        device.pop()
    memory.write(setup.layout.at("avail.idx"), b"\x01\x00")
    memory.write(setup.layout.at("desc.flags"), b"\x01\x00")
    with pytest.raises(AssertionError, match="loop"):
        device.pop()

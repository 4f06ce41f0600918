"""Legal traffic: whatever a request is cut into, both ends of the core do what the reference model does."""

from __future__ import annotations

from hypothesis import given
from virtio_test._core import GuestMemory

from tests.property.ends import CoreDeviceEnd, CoreDriverEnd, ModelDeviceEnd, ModelDriverEnd
from tests.property.play import flat, guest, play, snapshot, transcript
from tests.property.shapes import PAGE, Script, scripts

TABLES = (1 << 41, 16)
"""Where our driver end keeps its indirect tables, and entries of each."""


def with_tables(script: Script) -> GuestMemory:
    memory = guest(script)
    address, entries = TABLES
    memory.add_region(address, max(script.setup.size * entries * 16, PAGE))
    return memory


def model_transcript(script: Script) -> list[tuple[object, ...]]:
    memory = flat(script)
    ends = ModelDriverEnd(script.setup, memory), ModelDeviceEnd(script.setup, memory)
    return transcript(play(script, memory, *ends))


@given(scripts())
def test_our_device_end_does_what_the_model_does_to_the_last_byte(script: Script) -> None:
    setup = script.setup
    ours, theirs = guest(script), flat(script)
    left = play(script, ours, ModelDriverEnd(setup, ours), CoreDeviceEnd(setup, ours))
    right = play(script, theirs, ModelDriverEnd(setup, theirs), ModelDeviceEnd(setup, theirs))
    for core, model in zip(left, right, strict=True):
        assert core == model
        assert snapshot(setup, ours, script.regions) == snapshot(setup, theirs, script.regions)


@given(scripts(plain=True))
def test_our_driver_end_is_understood_by_the_model(script: Script) -> None:
    memory = with_tables(script)
    driver = CoreDriverEnd(script.setup, memory, tables=TABLES[0], entries=TABLES[1])
    ours = transcript(play(script, memory, driver, ModelDeviceEnd(script.setup, memory)))
    assert ours == model_transcript(script)
    assert driver.queue.in_flight == 0
    assert driver.queue.free == script.setup.size


@given(scripts(plain=True))
def test_our_two_ends_understand_each_other(script: Script) -> None:
    memory = with_tables(script)
    driver = CoreDriverEnd(script.setup, memory, tables=TABLES[0], entries=TABLES[1])
    device = CoreDeviceEnd(script.setup, memory)
    assert transcript(play(script, memory, driver, device)) == model_transcript(script)
    assert device.queue.in_flight == driver.queue.in_flight == 0
    assert device.queue.state == driver.queue.state
    count = sum(len(round_.requests) for round_ in script.rounds)
    assert device.queue.counters.popped == device.queue.counters.pushed == count

"""Legal traffic: whatever a request is cut into, both ends of the core do what the reference model does."""

from __future__ import annotations

from hypothesis import given
from virtio_test._core import GuestMemory

from tests.property.ends import CoreDeviceEnd, CoreDriverEnd, ModelDeviceEnd, ModelDriverEnd
from tests.property.play import flat, guest, play, snapshot, transcript
from tests.property.shapes import PAGE, Script, scripts

TABLES = (1 << 41, 16)
"""Where our driver end keeps its indirect tables, and entries of each."""
ELSEWHERE = (1 << 42, PAGE)
"""A region that nobody uses."""


def with_tables(script: Script) -> GuestMemory:
    memory = guest(script)
    address, entries = TABLES
    memory.add_region(address, -(-script.setup.size * entries * 16 // PAGE) * PAGE)
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


class ShiftingDeviceEnd(CoreDeviceEnd):
    """Before each step the table of regions changes somewhere else: a new epoch, in which all is translated again."""

    def __init__(self, script: Script, memory: GuestMemory) -> None:
        super().__init__(script.setup, memory)
        self._memory = memory
        self._there = False

    def _shift(self) -> None:
        if self._there:
            self._memory.remove_region(*ELSEWHERE)
        else:
            self._memory.add_region(*ELSEWHERE)
        self._there = not self._there

    def pop(self) -> int | None:
        self._shift()
        return super().pop()

    def read(self, number: int) -> bytes:
        self._shift()
        return super().read(number)

    def finish(self, number: int, response: bytes) -> None:
        self._shift()
        super().finish(number, response)


@given(scripts())
def test_a_new_memory_table_that_holds_the_same_changes_nothing(script: Script) -> None:
    memory = guest(script)
    epoch = memory.epoch
    ends = ModelDriverEnd(script.setup, memory), ShiftingDeviceEnd(script, memory)
    assert transcript(play(script, memory, *ends)) == model_transcript(script)
    assert memory.epoch > epoch

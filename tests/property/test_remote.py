"""Remote memory: a queue over regions that only functions reach does what a queue over mapped ones does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import DeviceQueue, GuestMemory, Trace

from tests.property.ends import CoreDeviceEnd, CoreDriverEnd, ModelDeviceEnd, ModelDriverEnd
from tests.property.play import flat, guest, play, snapshot, transcript
from tests.property.shapes import PAGE, Script, scripts

TABLES = (1 << 41, 16)
"""Where our driver end keeps its indirect tables, and entries of each."""
masks = st.one_of(st.just(-1), st.integers(0, 255))
"""Which regions are remote: bit k for the k-th, all for -1."""


class Other:
    """Somebody else's memory, and what we see of it: some regions mapped, the others behind `read` and `write`."""

    def __init__(self, store: GuestMemory, mask: int, *, trace: Trace | None = None) -> None:
        self.store = store
        self.calls = 0
        self.memory = GuestMemory(trace=trace)
        for number, region in enumerate(store.regions):
            if mask >> number & 1:
                self.memory.add_remote(region.address, region.size, read=self.read, write=self.write)
            else:
                self.memory.add_region(region.address, region.size, fd=region.fd)

    def read(self, address: int, length: int) -> bytes:
        self.calls += 1
        return self.store.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        self.calls += 1
        self.store.write(address, data)


def other(script: Script, mask: int, *, trace: Trace | None = None) -> Other:
    store = guest(script)
    store.add_region(TABLES[0], -(-script.setup.size * TABLES[1] * 16 // PAGE) * PAGE)
    return Other(store, mask, trace=trace)


def model_transcript(script: Script) -> list[tuple[object, ...]]:
    memory = flat(script)
    ends = ModelDriverEnd(script.setup, memory), ModelDeviceEnd(script.setup, memory)
    return transcript(play(script, memory, *ends))


@given(scripts(), masks)
def test_our_device_end_does_what_the_model_does_to_the_last_byte(script: Script, mask: int) -> None:
    setup = script.setup
    ours, theirs = other(script, mask), flat(script)
    left = play(script, ours.store, ModelDriverEnd(setup, ours.store), CoreDeviceEnd(setup, ours.memory))
    right = play(script, theirs, ModelDriverEnd(setup, theirs), ModelDeviceEnd(setup, theirs))
    for core, model in zip(left, right, strict=True):
        assert core == model
        assert snapshot(setup, ours.store, script.regions) == snapshot(setup, theirs, script.regions)
    assert bool(ours.calls) >= (mask == -1)


@given(scripts(plain=True), masks)
def test_our_driver_end_is_understood_by_the_model(script: Script, mask: int) -> None:
    ours = other(script, mask)
    driver = CoreDriverEnd(script.setup, ours.memory, tables=TABLES[0], entries=TABLES[1])
    events = transcript(play(script, ours.store, driver, ModelDeviceEnd(script.setup, ours.store)))
    assert events == model_transcript(script)
    assert driver.queue.in_flight == 0
    assert driver.queue.free == script.setup.size


@given(scripts(plain=True), masks)
def test_our_two_ends_understand_each_other(script: Script, mask: int) -> None:
    ours = other(script, mask, trace=Trace())
    driver = CoreDriverEnd(script.setup, ours.memory, tables=TABLES[0], entries=TABLES[1])
    device = CoreDeviceEnd(script.setup, ours.memory)
    assert transcript(play(script, ours.memory, driver, device)) == model_transcript(script)
    assert device.queue.in_flight == driver.queue.in_flight == 0
    assert device.queue.state == driver.queue.state


@given(scripts(plain=True), masks)
def test_accesses_do_not_depend_on_what_is_remote(script: Script, mask: int) -> None:
    def log(mask: int) -> list[tuple[str, int, int]]:
        trace = Trace()
        ours = other(script, mask, trace=trace)
        ends = ModelDriverEnd(script.setup, ours.store), CoreDeviceEnd(script.setup, ours.memory)
        transcript(play(script, ours.store, *ends))
        return [(access.kind, access.address, access.length) for access in trace.log()]

    assert log(mask) == log(0)


@given(scripts(plain=True), masks)
def test_the_fast_ways_answer_the_same(script: Script, mask: int) -> None:
    def play_fast(mask: int, *, batch: bool) -> tuple[list[bytes], list[tuple[int, int]], dict[int, bytes]]:
        ours = other(script, mask)
        driver = CoreDriverEnd(script.setup, ours.memory, tables=TABLES[0], entries=TABLES[1])
        device = DeviceQueue(ours.memory, script.setup.config(), state=script.setup.state())
        seen, taken = list[bytes](), list[tuple[int, int]]()

        def answer(request: bytes) -> bytes:
            seen.append(request)
            return request[:1]

        def answer_all(requests: memoryview, responses: memoryview) -> None:
            seen.append(bytes(requests))
            responses[:] = bytes([len(responses) % 251]) * len(responses)

        for number, (request, plan) in enumerate(script.place()):
            for segment in plan.segments:
                if not segment.writable:
                    ours.store.fill(segment.address, segment.length, number % 256)
            driver.add(plan)
            driver.publish()
            if batch:
                device.process_batch(answer_all, request_size=sum(request.readable[:1]), response_size=1)
            else:
                device.process(answer)
            taken += driver.take()
        return seen, taken, snapshot(script.setup, ours.store, script.regions)

    for batch in (False, True):
        assert play_fast(mask, batch=batch) == play_fast(0, batch=batch)

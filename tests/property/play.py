"""Plays a script on a driver end and a device end, and says what the driver saw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from virtio_test._core import GuestMemory, Trace

from tests.property.ends import DeviceEnd, DriverEnd, Setup
from tests.property.model import FlatMemory, Memory, Plan
from tests.property.shapes import Script

Event = tuple[object, ...]


def flat(script: Script) -> FlatMemory:
    memory = FlatMemory(script.regions)
    script.setup.ring(memory).begin_at(script.setup.start)
    return memory


def guest(script: Script, *, trace: Trace | None = None) -> GuestMemory:
    memory = GuestMemory(script.regions, trace=trace)
    script.setup.ring(memory).begin_at(script.setup.start)
    return memory


def fill(memory: Memory, plan: Plan, data: bytes) -> None:
    """Put a request into the device-readable segments of a buffer."""
    for segment in plan.segments:
        if not segment.writable:
            memory.write(segment.address, data[: segment.length])
            data = data[segment.length :]


def play(script: Script, memory: Memory, driver: DriverEnd, device: DeviceEnd) -> Iterator[list[Event]]:
    """What happened in each round: the chains that the device saw, the buffers that the driver got back.

    A driver that has no room first waits until the device has finished its oldest buffers.
    """
    placed = list(script.place())
    events = list[Event]()
    numbers = dict[int, int]()
    waiting = list[int]()
    room, number = script.setup.size, 0

    def pop_all() -> None:
        while (popped := device.pop()) is not None:
            data = device.read(popped)
            assert data == placed[popped][0].data(popped)
            events.append(("popped", popped, data, device.segments(popped)))
            waiting.append(popped)

    def finish(index: int) -> None:
        popped = waiting.pop(index)
        device.finish(popped, placed[popped][0].response(popped))

    def take() -> int:
        freed = 0
        for token, written in driver.take():
            done = numbers.pop(token)
            request, plan = placed[done]
            answer = b"".join(memory.read(s.address, s.length) for s in plan.segments if s.writable)[:written]
            assert answer == request.response(done)
            events.append(("used", done, written, answer))
            freed += plan.slots
        return freed

    for round_ in script.rounds:
        for request in round_.requests:
            plan = placed[number][1]
            while room < plan.slots:
                driver.publish()
                pop_all()
                finish(0)
                room += take()
            fill(memory, plan, request.data(number))
            numbers[driver.add(plan)] = number
            room -= plan.slots
            number += 1
        driver.publish()
        pop_all()
        for key in round_.finish:
            if waiting:
                finish(key % len(waiting))
        room += take()
        yield events
        events.clear()
    while waiting:
        finish(0)
    take()
    assert not numbers, "a buffer never came back"
    yield events


def transcript(rounds: Iterable[list[Event]]) -> list[Event]:
    return [event for events in rounds for event in events]


def snapshot(setup: Setup, memory: Memory, regions: Iterable[tuple[int, int]]) -> dict[int, bytes]:
    """All of guest memory, but without what a device writes when it likes: how it wants to be notified (2.7.10)."""
    layout = setup.layout
    names = ["device_event.off_wrap", "device_event.flags"] if setup.packed else ["used.flags", "avail_event"]
    seen = {address: bytearray(memory.read(address, size)) for address, size in regions}
    for at in map(layout.at, names):
        for address, content in seen.items():
            if address <= at < address + len(content):
                content[at - address : at - address + 2] = bytes(2)
    return {address: bytes(content) for address, content in sorted(seen.items())}

"""A function that is no bus master, or whose memory moves: nothing of its device's touches guest memory."""

from __future__ import annotations

import threading
import time

import pytest
from virtio_test._core import Chain
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.console import ConsoleDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import StateError
from virtio_test.status import Status

from tests.unit.ways import RINGS, WAYS, Way

from .pci_world import COMMAND, DEVICE_ID, LIVE, MASTER_AND_BARS, SIZE, World
from .test_suspend import ASLEEP, Keeper, whole, world

BARS = MASTER_AND_BARS & ~4


class Keeping:
    """A world whose device has kept one chain."""

    def __init__(self, *, cancel_seconds: float = 1.0) -> None:
        self.chains: list[Chain] = []
        handlers = {0: kept(self.chains.append)}
        self.device = BaseDevice(DEVICE_ID, handlers=handlers, queue_sizes=(SIZE,), cancel_seconds=cancel_seconds)
        self.world = World(self.device)
        self.queue = self.world.live()
        self.world.post(self.queue)
        self.world.run()
        assert len(self.chains) == 1

    def answered(self) -> bytes | None:
        return self.world.answer(self.queue)


def off(world: World) -> None:
    world.set_config(COMMAND, 2, BARS)


def on(world: World) -> None:
    world.set_config(COMMAND, 2, MASTER_AND_BARS)


def test_a_completion_waits_until_the_function_is_bus_master_again() -> None:
    keeping = Keeping()
    off(keeping.world)
    before = keeping.world.memory.read(0, 1 << 20)
    late = threading.Thread(target=lambda: results.append(keeping.device.complete(keeping.chains[0], b"late")))
    results: list[bool] = []
    late.start()
    late.join()
    keeping.world.run()
    assert results == [True]
    assert not keeping.device.complete(keeping.chains[0], b"twice")
    assert keeping.world.memory.read(0, 1 << 20) == before
    on(keeping.world)
    assert keeping.answered() == b"late"
    assert keeping.device.kept == []


def test_bus_mastering_ends_after_a_completion_that_is_under_way() -> None:
    chains: list[Chain] = []
    device = BaseDevice(DEVICE_ID, handlers={0: kept(chains.append)}, queue_sizes=(SIZE,))
    world = World(device)
    inside, order = threading.Event(), list[str]()

    def write(_address: int, _data: bytes) -> None:
        inside.set()
        time.sleep(0.1)
        order.append("written")

    world.memory.add_remote(1 << 32, 4096, read=lambda _, size: bytes(size), write=write)
    queue = world.live()
    queue.add([], [(1 << 32, 64)])
    queue.signal()
    world.notify(0)
    world.run()
    thread = threading.Thread(target=lambda: device.complete(chains[0], b"slow"))
    thread.start()
    assert inside.wait(5)
    off(world)
    order.append("off")
    thread.join()
    assert order == ["written", "off"]


@pytest.mark.parametrize("end", ["status", "function", "queue"])
def test_an_answer_that_waits_for_bus_mastering_is_lost_with_its_queue(end: str) -> None:
    keeping = Keeping(cancel_seconds=5.0)
    world = keeping.world
    off(world)
    assert keeping.device.complete(keeping.chains[0], b"late")
    begin = time.monotonic()
    if end == "status":
        world.status(0)
    elif end == "function":
        world.function.reset()
    else:
        world.set("queue_select", 0)
        world.set("queue_reset", 1)
    assert time.monotonic() - begin < 2.5, "nobody is waited for"
    before = world.memory.read(0, 1 << 20)
    on(world)
    world.run()
    assert world.memory.read(0, 1 << 20) == before
    assert not world.get("device_status") & Status.DEVICE_NEEDS_RESET
    assert not keeping.device.complete(keeping.chains[0], b"later")


def test_a_console_writes_its_input_once_the_function_is_bus_master() -> None:
    console = ConsoleDevice(lambda _: None)
    world = World(console)
    world.negotiate()
    queue = world.queue()
    # The device starts its queues in DRIVER_OK, and must not even ask for no kicks now.
    off(world)
    before = world.memory.read(0, 1 << 20)
    world.status(LIVE)
    console.feed(b"one")
    world.run()
    assert world.memory.read(0, 1 << 20) == before
    queue.add([], [(0x2000, 64)])
    queue.signal()
    before = world.memory.read(0, 1 << 20)
    console.feed(b" two")
    world.run()
    assert world.memory.read(0, 1 << 20) == before
    on(world)
    world.run()
    assert world.memory.read(0x2000, 7) == b"one two"


def test_a_device_that_leaves_a_bus_is_not_held_on_the_next() -> None:
    keeping = Keeping()
    off(keeping.world)
    keeping.device.detach()
    world = World(keeping.device)
    queue = world.live()
    world.post(queue)
    world.run()
    assert keeping.device.complete(keeping.chains[1], b"here")
    assert world.answer(queue) == b"here"


def test_a_completion_into_a_ring_that_has_gone_raises_nowhere_and_breaks_the_device_at_the_next_kick() -> None:
    keeping = Keeping()
    world = keeping.world
    world.memory.remove_region(0, 1 << 20)
    assert not keeping.device.complete(keeping.chains[0], b"x")
    assert not keeping.device.complete(keeping.chains[0], b"x")
    world.notify(0)
    world.run()
    assert world.get("device_status") & Status.DEVICE_NEEDS_RESET
    assert world.rules() == {"RingUnmapped": 1}


# --- held, and suspended or saved -----------------------------------------------------------------------------------


def held_and_stuck(way: str, ring: str, *, lets_go: bool = True) -> tuple[Keeper, Way, Driver, list[Request]]:
    """The newest of three requests is answered and one answer waits, so neither of the others fits the ring again."""
    device, over, driver = world(way, ring, Keeper(lets_go=lets_go, cancel_seconds=5.0))
    assert isinstance(device, Keeper)
    requests = [driver.submit(0, [bytes([number])], [1]) for number in range(3)]
    over.run()
    assert device.complete(device.kept[2], b"c")
    over.run()
    over.bank.hold()
    assert device.complete(device.kept[0], b"late")
    return device, over, driver, requests


@pytest.mark.row("D17")
@WAYS
@RINGS
@pytest.mark.parametrize("threaded", [False, True])
def test_held_it_is_suspended_without_a_write_and_asked_again_at_the_resume(
    way: str, ring: str, threaded: bool
) -> None:
    """What cannot go back into the ring stays in flight over the suspension: nobody may write."""
    device, over, driver, requests = held_and_stuck(way, ring, lets_go=not threaded)
    before = whole(over.bank.memory)
    if threaded:
        # The other is not let go of, but its thread is done with it while its queue stops.
        threading.Timer(0.05, device.complete, (device.kept[1], b"B")).start()
    driver.suspend()
    assert over.registers.read_status() == ASLEEP
    assert (device.kept, over.bank.errors) == ([], [])
    over.bank.release()
    over.run()
    assert whole(over.bank.memory) == before, "it is suspended still"
    driver.resume()
    over.run()
    assert [chain.read() for chain in device.kept] == [b"\0", b"\1"]
    for chain in device.kept:
        device.complete(chain, b"a")
    assert [each.wait() for each in requests] == [b"a", b"a", b"c"]
    assert over.bank.errors == []


@pytest.mark.row("D17")
@WAYS
@RINGS
def test_held_it_is_not_saved_with_requests_in_flight_and_goes_on(way: str, ring: str) -> None:
    device, over, _, requests = held_and_stuck(way, ring)
    before = whole(over.bank.memory)
    with pytest.raises(StateError, match="held"):
        over.side.save()
    assert whole(over.bank.memory) == before
    over.bank.release()
    over.run()
    assert over.side.save()
    over.run()
    for chain in device.kept:
        device.complete(chain, chain.read())
    assert [each.wait() for each in requests] == [b"", b"", b"c"], "it could answer them, with nothing"
    assert over.bank.errors == []


@pytest.mark.row("D17")
@WAYS
@RINGS
def test_held_it_is_saved_when_all_of_it_fits_the_ring_again(way: str, ring: str) -> None:
    device, over, driver = world(way, ring)
    waiting = [driver.submit(0, [bytes([number])], [1]) for number in range(3)]
    over.run()
    over.bank.hold()
    before = whole(over.bank.memory)
    assert over.side.save()
    assert whole(over.bank.memory) == before
    over.bank.release()
    over.run()
    for chain in device.kept:
        device.complete(chain, chain.read())
    assert [each.wait() for each in waiting] == [b"\0", b"\1", b"\2"]

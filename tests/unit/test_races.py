"""Threads of the device against resets, and against each other: rows T11, T14, Q13, D09 and X11.

A reset that has returned is a promise: whatever a thread still holds of the old life, it writes nothing any more and
interrupts nobody. Each round lets a completion and a reset begin at once, and looks at memory from the moment on at
which the reset is over.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

import pytest
from virtio_test._core import Chain, DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import ForeignChain, StaleChain, StateError
from virtio_test.features import FeatureSet
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci

from tests.unit.ways import RINGS, Way, features, reach

SIZE = 16
ROUNDS = 60
RING, DATA = 0x1000, 0x8000
BIG = 4096


def whole(memory: GuestMemory) -> bytes:
    return hashlib.sha256(b"".join(memory.read(each.address, each.size) for each in memory.regions)).digest()


def both_ends(ring: str) -> tuple[GuestMemory, DriverQueue, DeviceQueue]:
    memory = GuestMemory([(0, 1 << 18)], backing="anonymous")
    config = QueueConfig.from_layout(RingLayout.contiguous(SIZE, RING, packed=ring == "packed"))
    return memory, DriverQueue(memory, config), DeviceQueue(memory, config)


class Beside:
    """A call in a thread of its own that begins when the block does, and has ended after it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self._call = call
        self._start = threading.Barrier(2)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._start.wait()
        try:
            self._call()
        except (StaleChain, StateError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the test waits
            self.failure = error

    def __enter__(self) -> None:
        self._thread.start()
        self._start.wait()

    def __exit__(self, *_: object) -> None:
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure


@pytest.mark.row("T11", "Q13")
@RINGS
def test_a_completion_beside_a_queue_reset(ring: str) -> None:
    memory, driver, device = both_ends(ring)
    for _ in range(ROUNDS):
        for number in range(8):
            driver.add([], [(DATA + BIG * number, BIG)])
        driver.publish()
        chains: list[Chain] = []
        while (chain := device.pop()) is not None:
            chains.append(chain)
        assert len(chains) == 8

        def complete(chains: list[Chain] = chains) -> None:
            for chain in chains:
                chain.write(b"l" * BIG)
                device.push(chain)

        with Beside(complete):
            device.reset()
            before = whole(memory)
        assert whole(memory) == before, "written after the reset"
        assert device.in_flight == 0
        assert not any(device.push(each, 0) for each in chains)
        driver.reset()
        memory.fill(DATA, 8 * BIG)


@pytest.mark.row("T14")
@RINGS
def test_two_threads_pop_and_complete_one_queue(ring: str) -> None:
    memory, driver, device = both_ends(ring)
    taken: list[list[int]] = [[], []]

    def work(mine: list[int]) -> None:
        while len(mine) < 5000:
            chain = device.pop()
            if chain is None:
                if ended.is_set():
                    return
                continue
            mine.append(int.from_bytes(chain.read(), "little"))
            device.push(chain, 0)

    ended = threading.Event()
    workers = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for each in workers:
        each.start()
    back: list[int] = []
    total = 400
    for number in range(total):
        at = DATA + 16 * (number % SIZE)
        while driver.free == 0:
            back += [token for token, _ in driver.get_used_many()]
        memory.write(at, number.to_bytes(8, "little"))
        driver.add([(at, 8)])
        driver.publish()
        while driver.in_flight > SIZE // 2:
            back += [token for token, _ in driver.get_used_many()]
    while driver.in_flight:
        back += [token for token, _ in driver.get_used_many()]
    ended.set()
    for each in workers:
        each.join(10.0)
        assert not each.is_alive()
    assert len(back) == len(set(back)) == total
    assert len(taken[0]) + len(taken[1]) == total
    assert device.latched is None
    assert driver.latched is None


def test_a_chain_of_another_queue_is_not_taken() -> None:
    _, driver, device = both_ends("split")
    _, _, other = both_ends("split")
    driver.add([(DATA, 8)])
    driver.publish()
    chain = device.pop()
    assert chain is not None
    with pytest.raises(ForeignChain):
        other.push(chain, 0)
    assert device.push(chain, 0)


def reset_status(over: Way, _: Driver) -> None:
    over.registers.write_status(0)


def reset_queue(over: Way, _: Driver) -> None:
    over.registers.reset_queue(0)


def reset_function(over: Way, _: Driver) -> None:
    assert isinstance(over.side, VirtioPci)
    over.side.reset()


def take_back(over: Way, _: Driver) -> None:
    assert isinstance(over.side, VirtioMmio)
    over.side.write(0x030, bytes(4))
    over.side.write(0x044, bytes(4))


def suspend(_: Way, driver: Driver) -> None:
    driver.suspend()


RESETS: list[tuple[str, str, Callable[[Way, Driver], None], tuple[str, ...]]] = [
    ("in process", "status 0", reset_status, ("D09", "T11")),
    ("in process", "queue reset", reset_queue, ("Q13", "T11")),
    ("mmio", "status 0", reset_status, ("D09", "T11")),
    ("mmio", "queue reset", reset_queue, ("Q13", "T11")),
    ("mmio", "QueueReady 0", take_back, ("Q13", "T11")),
    ("pci", "status 0", reset_status, ("D09", "X11", "T11")),
    ("pci", "queue reset", reset_queue, ("Q13", "T11")),
    ("pci", "function reset", reset_function, ("X11", "D09", "T11")),
    ("in process", "suspend", suspend, ("D17", "T11")),
    ("mmio", "suspend", suspend, ("D17", "T11")),
    ("pci", "suspend", suspend, ("D17", "T11")),
]


@RINGS
@pytest.mark.parametrize(
    ("way", "how"),
    [pytest.param(way, how, id=f"{way}: {name}", marks=pytest.mark.row(*rows)) for way, name, how, rows in RESETS],
)
def test_a_device_that_completes_beside_a_reset(way: str, how: Callable[[Way, Driver], None], ring: str) -> None:
    device = BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(SIZE,))
    memory = GuestMemory([(0, 1 << 18)], backing="anonymous")
    wanted = features(ring) | FeatureSet("SUSPEND")
    for _ in range(ROUNDS // 4):
        over = reach(device, way, more=FeatureSet("SUSPEND"), memory=memory)
        driver = Driver(over.registers, wanted=wanted)
        driver.initialize()
        requests: list[Request] = [driver.submit(0, [b"x"], [BIG]) for _ in range(6)]
        over.run()
        chains = device.kept
        assert len(chains) == len(requests)

        def complete(chains: list[Chain] = chains) -> None:
            for chain in chains:
                device.complete(chain, b"l" * BIG)

        with Beside(complete):
            how(over, driver)
            # Nobody answers for what is marked: it is delivered, or dropped, in turns of the loop.
            before = whole(memory)
            told: list[int] = []
            over.bank.on_call = told.append
        assert whole(memory) == before, "written after the reset"
        over.run()
        assert told == []
        for chain in chains:
            # However late, and past the device's own books.
            assert not device.complete(chain, b"late")
            with pytest.raises(StaleChain):
                chain.write(b"late")
        assert whole(memory) == before
        device.detach()


@pytest.mark.row("D17")
@RINGS
def test_a_suspension_waits_for_the_completion_that_is_under_way(ring: str) -> None:
    device = BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(SIZE,))
    over = reach(device, "in process", more=FeatureSet("SUSPEND"))
    driver = Driver(over.registers, wanted=features(ring) | FeatureSet("SUSPEND"))
    driver.initialize()
    request = driver.submit(0, [b"x"], [1])
    over.run()
    inside, ended = threading.Event(), threading.Event()
    call = over.bank.call

    def slow(queue_index: int) -> None:
        inside.set()
        time.sleep(0.05)
        ended.set()
        call(queue_index)

    over.bank.call = slow
    other = threading.Thread(target=device.complete, args=(device.kept[0], b"y"))
    other.start()
    assert inside.wait(10.0)
    driver.suspend()
    assert ended.is_set(), "suspended while a thread was still at it"
    other.join()
    driver.resume()
    assert request.wait() == b"y"

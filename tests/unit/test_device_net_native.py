"""The network device without Python: in the owner loop and in threads, one for each pair."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from virtio_test._core import DriverQueue, GuestMemory, PacketService, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import MonotonicClock
from virtio_test.device import RING_FEATURES
from virtio_test.devices.native import WaitStrategy
from virtio_test.devices.net import Backend, Generate, NetDevice
from virtio_test.driver.net import NetDriver
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.net import FEATURE_NAMES, HEADER
from virtio_test.transport.vhost_user.frontend import FrontEnd

from .class_world import RINGS, WAYS, errors, indirect, reach
from .vhost_user_world import serving
from .world import PATIENCE, eventually


def real() -> OwnerLoop:
    """A loop whose time passes by itself: threads know no other."""
    return OwnerLoop(clock=MonotonicClock())


WAITS = pytest.mark.parametrize("wait", [None, "blocking", "adaptive", "busy"])


def frame(length: int) -> bytes:
    return bytes(each * 7 & 0xFF for each in range(length))


@WAYS
@pytest.mark.parametrize("mergeable", [False, True])
def test_what_is_sent_comes_back(way: str, mergeable: bool) -> None:
    device = NetDevice(mergeable=mergeable, native=True)
    registers = reach(device, way)
    driver = NetDriver(registers, wanted=RINGS[way], indirect=indirect(way), buffer_size=600 if mergeable else None)
    driver.initialize()
    for number in range(200):
        sent = frame(1 + number * 7) + bytes([number])
        driver.send(sent)
        assert driver.receive() == sent
    assert (driver.findings, device.findings, errors(registers)) == ([], [], [])
    assert device.counters["sent"] == device.counters["received"] == 200
    assert device.counters["sent_bytes"] == device.counters["received_bytes"]


@WAITS
@pytest.mark.parametrize("packed", [False, True])
def test_in_threads(wait: WaitStrategy | None, packed: bool) -> None:
    device = NetDevice(native=True, wait=wait)
    driver = NetDriver(Loopback(device, loop=real()), wanted=RINGS["packed" if packed else "split"])
    for _ in range(2):
        driver.initialize()
        assert len(device.workers) == (wait is not None)
        for number in range(100):
            driver.send(frame(60 + number))
            driver.run_until(lambda: bool(driver.frames), "the frame", timeout=PATIENCE)
            assert driver.receive() == frame(60 + number)
        driver.set_promiscuous(on=True)
    driver.reset()
    assert device.workers == []


@WAITS
def test_frames_are_made_in_threads(wait: WaitStrategy | None) -> None:
    backend = Generate(100, count=500)
    device = NetDevice(backend, native=True, wait=wait)
    driver = NetDriver(Loopback(device, loop=real()))
    driver.initialize()
    for number in range(500):
        driver.run_until(lambda: bool(driver.frames), "a frame", timeout=PATIENCE)
        assert driver.receive() == backend.frame(driver.mac, number)
    state = device.save()
    assert state["generated"] == [500]
    device.set_link(up=False)
    driver.initialize()
    assert device.counters["received"] == 500
    device.set_link(up=True)
    driver.run_until(lambda: bool(driver.frames), "the first again", timeout=PATIENCE)
    assert driver.receive() == backend.frame(driver.mac, 0)
    driver.reset()


@pytest.mark.parametrize("backend", ["loopback", "drop", Generate(64)])
def test_a_thread_without_work_sleeps(backend: Backend) -> None:
    """Receive buffers are no work, unless there is something to put in; nor are those in which nothing fits."""
    device = NetDevice(backend, native=True, wait="adaptive", spin=10.0, mergeable=False)
    driver = NetDriver(Loopback(device), buffer_size=20)
    driver.initialize()
    (worker,) = device.workers

    def still() -> bool:
        before = worker.turns
        time.sleep(0.02)
        return worker.turns == before

    assert eventually(still)
    driver.reset()


def test_what_breaks_a_rule_is_told_of() -> None:
    device = NetDevice(native=True)
    driver = NetDriver(Loopback(device))
    driver.initialize()
    driver.submit(1, [HEADER.pack(1, 0, 0, 0, 0, 0, 0) + frame(60)]).wait()
    driver.submit(1, [b"short"]).wait()
    assert [(each.rule, each.clause, each.queue) for each in device.findings] == [
        ("OffloadNotNegotiated", "5.1.9.2.1", 1),
        ("HeaderTooShort", "5.1.9", 1),
    ]
    assert device.counters == {"broken": 2}
    assert len(device.findings) == 2


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_thread_for_each_pair_over_a_socket(tmp_path: Path, pairs: int) -> None:
    """Each is kicked through an fd of its own, and calls on one."""
    device = NetDevice(pairs=pairs, native=True, wait="blocking")
    names = ("MRG_RXBUF", "MQ") if pairs > 1 else ("MRG_RXBUF",)
    with serving(tmp_path / "s", device) as server, FrontEnd(server.path, timeout=PATIENCE) as front:
        front.negotiate(FeatureSet("VERSION_1", *names, device=FEATURE_NAMES))
        memory = GuestMemory([(0, 1 << 20)])
        front.share(memory)
        queues = [
            DriverQueue(memory, QueueConfig.from_layout(RingLayout.contiguous(64, 0x1000 * (n + 1)), index=n))
            for n in range(2 * pairs)
        ]
        rings = [front.setup_ring(queue.config) for queue in queues]
        for index in range(2 * pairs):
            front.enable(index)
        assert eventually(lambda: len(device.workers) == pairs)
        for number in range(100):
            for pair in range(pairs):
                place = 0x20000 + 0x1000 * pair
                memory.write(place, bytes(12) + b"%d of pair %d" % (number, pair))
                queues[2 * pair].add([], [(place + 0x800, 100)])
                queues[2 * pair].publish()
                queues[2 * pair + 1].add([(place, 12 + len(b"%d of pair %d" % (number, pair)))], [])
                queues[2 * pair + 1].publish()
                rings[2 * pair + 1].kick.notify()
            for pair in range(pairs):
                assert eventually(lambda pair=pair: queues[2 * pair].has_used() and queues[2 * pair + 1].has_used())
                assert queues[2 * pair].get_used() is not None
                assert queues[2 * pair + 1].get_used() is not None
                expected = b"%d of pair %d" % (number, pair)
                assert memory.read(0x20000 + 0x1000 * pair + 0x80C, len(expected)) == expected
        assert device.counters["received"] == 100 * pairs
    assert device.workers == []


def test_the_third_queue_is_nobodys_pair_without_mq() -> None:
    device = NetDevice(pairs=2, native=True, wait="blocking")
    driver = NetDriver(Loopback(device), wanted=RING_FEATURES)
    driver.initialize()
    assert device.control_queue == 2
    assert len(device.workers) == 1
    driver.set_promiscuous(on=True)
    assert device.control.modes == {0}
    driver.reset()


def test_impossible() -> None:
    with pytest.raises(InvalidArgument, match="calls no function"):
        NetDevice(lambda _: None, native=True)
    with pytest.raises(InvalidArgument, match="native=True"):
        NetDevice(wait="busy")
    with pytest.raises(StateError, match="from elsewhere"):
        NetDevice(native=True).deliver(b"frame")
    wrong: list[dict[str, Any]] = [
        {"header": 11}, {"header": 0}, {"longest": 65554}, {"frame": bytes(65554)},
        {"frame": bytes(20), "number_at": 13},
        {"number_at": 0}, {"frame": bytes(20), "number_at": 2**64 - 1}, {"header": -1},
    ]  # fmt: skip
    service = PacketService("generate", count=3)
    for options in wrong:
        with pytest.raises(InvalidArgument):
            service.set_up(**options)
    for mode, count in (("loop", None), ("drop", 1), ("loopback", 0), ("generate", -1)):
        with pytest.raises(InvalidArgument):
            PacketService(mode, count=count)  # type: ignore[arg-type]
    assert service.generated == 0
    service.generated = 7
    assert service.generated == 7

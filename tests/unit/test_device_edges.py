"""Devices at the edges of what they accept: the last value that can be, the first that cannot, and where they meet."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from virtio_test._core import Chain, DeviceQueue, PacketService
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, Batched, Kept, batched, kept
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.chains import ChainDevice
from virtio_test.devices.console import ConsoleDevice, ConsolePort
from virtio_test.devices.image import FileImage
from virtio_test.devices.native import NativeDevice, Threads
from virtio_test.devices.rng import RngDevice
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.rng import RngDriver
from virtio_test.errors import InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import HEADER, RequestStatus, RequestType
from virtio_test.spec.console import CONTROL, FEATURE_NAMES, MAX_PORTS, ControlEvent

SIZE = 1 << 20


def nothing(_: bytes) -> None:
    """A handler, and an output."""


def rows(_requests: memoryview, _responses: memoryview) -> None:
    """A handler of many requests."""


def many(count: int) -> list[ConsolePort]:
    return [ConsolePort(nothing)] * count


# --- declarations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("possible", "impossible"),
    [
        (lambda: BaseDevice(1, handlers={}), lambda: BaseDevice(0, handlers={})),
        (lambda: BaseDevice(0xFFFF, handlers={}), lambda: BaseDevice(0x10000, handlers={})),
        (
            lambda: BaseDevice(7, handlers={}, queue_sizes=(1, 32768)),
            lambda: BaseDevice(7, handlers={}, queue_sizes=(1, 32769)),
        ),
        (
            lambda: BaseDevice(7, handlers={1: nothing}, queue_sizes=(8, 8)),
            lambda: BaseDevice(7, handlers={2: nothing}, queue_sizes=(8, 8)),
        ),
        (
            lambda: batched(rows, request_size=0, response_size=0, limit=1),
            lambda: batched(rows, request_size=0, response_size=-1, limit=1),
        ),
        (
            lambda: batched(rows, request_size=0, response_size=0, limit=32768),
            lambda: batched(rows, request_size=0, response_size=0, limit=32769),
        ),
        (lambda: BlkDevice(bytearray(SIZE), block_size=512), lambda: BlkDevice(bytearray(SIZE), block_size=256)),
        (lambda: BlkDevice(bytearray(SIZE), block_size=32768), lambda: BlkDevice(bytearray(SIZE), block_size=65536)),
        (
            lambda: BlkDevice(bytearray(SIZE), lifetime=(0, 0, 0)),
            lambda: BlkDevice(bytearray(SIZE), lifetime=(0, 0, -1)),
        ),
        (lambda: BlkDevice(bytearray(SIZE), num_queues=0xFFFF), lambda: BlkDevice(bytearray(SIZE), num_queues=0x10000)),
        (lambda: ConsoleDevice(ports=many(MAX_PORTS)), lambda: ConsoleDevice(ports=many(MAX_PORTS + 1))),
        (
            lambda: ConsoleDevice(ports=[ConsolePort(nothing, name="x" * 255)]),
            lambda: ConsoleDevice(ports=[ConsolePort(nothing, name="x" * 254 + "ö")]),
        ),
        (lambda: RngDevice(limit=1), lambda: RngDevice(limit=0)),
        (lambda: RngDevice(native=True), lambda: RngDevice(native=True, source=bytes)),
        (lambda: Threads(spin=0), lambda: Threads(spin=-1e-9)),
        (lambda: Threads(spin=1e6), lambda: Threads(spin=1e6 + 1)),
        (lambda: Threads(cpus=(0,)), lambda: Threads(cpus=())),
    ],
)
def test_the_last_value_that_can_be(possible: Callable[[], object], impossible: Callable[[], object]) -> None:
    possible()
    with pytest.raises(InvalidArgument):
        impossible()


def test_a_queue_of_two_services_is_refused() -> None:
    services = {(0, 1): PacketService("drop"), (1, 2): PacketService("drop")}
    with pytest.raises(InvalidArgument, match="queue 1 does not exist, or is served twice"):
        NativeDevice(1, services=services, chains={}, queue_sizes=(8, 8, 8))
    with pytest.raises(InvalidArgument, match="queue 2"):
        NativeDevice(1, services={(2, 1): PacketService("drop")}, chains={}, queue_sizes=(8, 8))


def test_it_is_active_while_its_driver_is_live() -> None:
    device = BaseDevice(7, handlers={0: nothing})
    driver = Driver(Loopback(device))
    assert not device.active
    driver.initialize()
    assert device.active
    driver.reset()
    assert not device.active


def test_a_queue_that_does_not_run_is_not_kicked() -> None:
    devices = [
        BaseDevice(7, handlers={0: nothing}),
        BlkDevice(bytearray(SIZE)),
        RngDevice(native=True),
        NativeDevice(1, services={(0, 1): PacketService("drop")}, chains={}, queue_sizes=(8, 8)),
    ]
    assert [device.kicked(0) for device in devices] == [False] * 4


def test_a_queue_without_a_handler_is_left_alone() -> None:
    device = ChainDevice(7, chains={}, queue_sizes=(8,))
    loopback = Loopback(device)
    driver = Driver(loopback)
    driver.initialize()
    driver.submit(0, [b"x"])
    assert not device.kicked(0)
    assert loopback.queue(0).counters.popped == 0


@pytest.mark.parametrize("handler", [nothing, batched(rows, request_size=1, response_size=0), kept(lambda _: None)])
def test_a_broken_ring_is_no_error_of_the_handler(handler: Callable[[bytes], None] | Batched | Kept) -> None:
    device = BaseDevice(7, handlers={0: handler})
    loopback = Loopback(device)
    driver = Driver(loopback)
    driver.initialize()
    driver.queues[0].add([(1 << 50, 1)], [])
    driver.queues[0].signal()
    loopback.loop.run_pending()
    assert device.handler_errors == 0
    assert [str(error).split(" ")[0] for error in loopback.errors] == ["UnmappedAddress"]


# --- kept chains that are completed while their queue stops ----------------------------------------------------


class Keeper(BaseDevice):
    """Takes chains, and hands the inside of a completion and of a stop out."""

    def __init__(self) -> None:
        super().__init__(7, handlers={0: kept(lambda _: None)}, cancel_seconds=5)
        self.inside: Callable[[Chain], object] = lambda _: None
        self.given_back: Callable[[], object] = lambda: None
        self.lets_go: Callable[[Chain], bool] = super().cancel

    def cancel(self, chain: Chain) -> bool:
        return self.lets_go(chain)

    def _push(self, queue: DeviceQueue, chain: Chain, written: int | None) -> bool:
        self.inside(chain)
        return super()._push(queue, chain, written)

    def _give_back(self, queue: DeviceQueue, chain: Chain) -> None:
        super()._give_back(queue, chain)
        self.given_back()


@contextmanager
def one_kept() -> Generator[tuple[Keeper, Driver, Loopback, Chain]]:
    device = Keeper()
    loopback = Loopback(device)
    driver = Driver(loopback)
    driver.initialize()
    driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    yield device, driver, loopback, device.kept[0]
    assert loopback.errors == []
    assert device.kept == []


def test_a_chain_that_cancel_has_completed_is_not_given_back() -> None:
    with one_kept() as (device, driver, loopback, chain):
        (request,) = driver.in_flight
        device.lets_go = lambda chain: device.complete(chain, b"last")
        device.stop_queue(0)
        assert not device.complete(chain, b"more")
        assert loopback.queue(0).counters.pushed == 1
        loopback.loop.run_pending()
        assert request.data == b"last"


def test_a_completion_under_way_is_nobody_elses() -> None:
    with one_kept() as (device, driver, loopback, chain):
        (request,) = driver.in_flight
        inside, go = threading.Event(), threading.Event()

        def wait(_: Chain) -> None:
            inside.set()
            assert go.wait(5)

        device.inside = wait
        device.lets_go, device.given_back = lambda _: True, go.set
        thread = threading.Thread(target=device.complete, args=(chain, b"mine"))
        thread.start()
        assert inside.wait(5)
        assert not device.complete(chain, b"late")
        device.stop_queue(0)
        thread.join()
        loopback.loop.run_pending()
        assert request.data == b"mine"
        assert loopback.queue(0).counters.pushed == 1


# --- the block device --------------------------------------------------------------------------------------


@contextmanager
def a_file(size: int) -> Generator[int]:
    fd = os.memfd_create("disk")
    try:
        os.truncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("sector", "status"), [(SIZE // 512 - 1, RequestStatus.OK), (SIZE // 512, RequestStatus.IOERR)]
)
def test_a_write_behind_the_last_sector_does_not_lengthen_the_file(sector: int, status: RequestStatus) -> None:
    with a_file(SIZE) as fd:
        device = BlkDevice(fd)
        driver = Driver(Loopback(device))
        driver.initialize()
        request = driver.submit(0, [HEADER.pack(RequestType.OUT, 0, sector), b"x" * 512], [1])
        assert request.wait() == bytes((status,))
        assert os.fstat(fd).st_size == SIZE
        device.close()


def test_no_part_of_a_sector_is_read() -> None:
    driver = Driver(Loopback(BlkDevice(bytearray(SIZE))))
    driver.initialize()
    for length, status in ((512, RequestStatus.OK), (511, RequestStatus.IOERR), (513, RequestStatus.IOERR)):
        request = driver.submit(0, [HEADER.pack(RequestType.IN, 0, 0)], [length + 1])
        assert request.wait() == bytes(length) + bytes((status,))


def test_either_cache_mode_is_restored_whatever_the_device_begins_with() -> None:
    for first in (False, True):
        device = BlkDevice(bytearray(SIZE), write_cache=first)
        for saved in (False, True):
            device.restore(BlkDevice(bytearray(SIZE), write_cache=saved).save())
            assert device.config.writeback == saved


def blocks(image: FileImage) -> int:
    return os.fstat(image.fileno()).st_blocks


def test_only_what_may_be_unmapped_becomes_a_hole() -> None:
    with a_file(SIZE) as fd:
        image = FileImage(fd)
        image.write(memoryview(b"x" * SIZE), 0)
        before = blocks(image)
        image.zero(0, SIZE, unmap=False)
        assert blocks(image) == before
        image.write(memoryview(b"x" * SIZE), 0)
        image.zero(0, SIZE // 2, unmap=True)
        assert blocks(image) <= before // 2
        assert os.pread(fd, SIZE, 0) == bytes(SIZE // 2) + b"x" * (SIZE // 2)
        image.close()


def test_where_no_holes_can_be_made_zeros_are_written() -> None:
    with a_file(8192) as fd:
        image = FileImage(fd)
        image._punches = False  # pyright: ignore[reportPrivateUsage] - as it is after the host has refused one
        image.write(memoryview(b"x" * 8192), 0)
        image.discard(0, 4096)
        assert os.pread(fd, 8192, 0) == b"x" * 8192
        image.zero(0, 4096, unmap=True)
        assert os.pread(fd, 8192, 0) == bytes(4096) + b"x" * 4096
        image.close()


def test_a_file_that_takes_no_more_is_no_reason_to_try_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([3, 0])
    with a_file(512) as fd:
        image = FileImage(fd)

        def pwrite(_fd: int, _data: memoryview, _offset: int) -> int:
            return next(taken)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="takes no more bytes"):
            image.write(memoryview(b"12345"), 0)
        image.close()


# --- the console -------------------------------------------------------------------------------------------

MULTIPORT = FeatureSet("MULTIPORT", device=FEATURE_NAMES)


def ports(count: int = 2, **options: Any) -> ConsoleDevice:
    return ConsoleDevice(ports=[ConsolePort(nothing) for _ in range(count)], **options)


def spoken_to(device: ConsoleDevice, features: FeatureSet = RING_FEATURES) -> Driver:
    driver = Driver(Loopback(device), wanted=features)
    driver.initialize()
    return driver


def test_a_control_message_is_never_cut() -> None:
    device = ports(1)
    driver = spoken_to(device, RING_FEATURES | MULTIPORT)
    small, exact = driver.submit(2, [], [CONTROL.size - 1]), driver.submit(2, [], [CONTROL.size])
    driver.submit(3, [CONTROL.pack(0, ControlEvent.DEVICE_READY, 1)]).wait()
    assert small.wait() == b""
    assert exact.wait() == CONTROL.pack(0, ControlEvent.DEVICE_ADD, 0)
    assert device.odd == 1


def test_without_multiport_nothing_is_said() -> None:
    device = ports()
    driver = spoken_to(device)
    driver.submit(3, [CONTROL.pack(0, ControlEvent.DEVICE_READY, 1)]).wait()
    assert device.odd == 1
    assert not any(port.added for port in device.ports)
    state: Any = json.loads(json.dumps(device.save()))
    for port in state["ports"]:
        port["ready"] = True
    device.restore(state)
    device.resize(7, 8, port=1)
    device.set_open(on=False)
    assert device.save()["messages"] == []


def test_a_console_that_is_held_keeps_its_input() -> None:
    device = ConsoleDevice(nothing)
    driver = spoken_to(device)
    request = driver.submit(0, [], [4])
    driver.loop.run_pending()
    device.hold()
    assert device.feed(b"abc") == 3
    assert not device.kicked(0)
    driver.loop.run_pending()
    assert not request.done
    device.release()
    device.kicked(0)
    assert request.wait() == b"abc"


def test_the_last_state_of_a_console_that_can_be() -> None:
    device = ports(max_input=3)
    state: Any = json.loads(json.dumps(device.save()))
    longest = CONTROL.pack(1, ControlEvent.PORT_NAME, 1) + b"x" * 255
    good = {
        **state,
        "messages": [longest.hex(), CONTROL.pack(0, ControlEvent.PORT_OPEN, 1).hex()],
        "ports": [{**state["ports"][0], "waiting": "010203"}, state["ports"][1]],
    }
    device.restore(good)
    assert bytes(device.ports[0].waiting) == b"\1\2\3"
    bad: list[dict[str, object]] = [
        {"messages": [(longest + b"x").hex()]},
        {"messages": [CONTROL.pack(0, ControlEvent.PORT_OPEN, 1)[:-1].hex()]},
        {"messages": [CONTROL.pack(2, ControlEvent.PORT_OPEN, 1).hex()]},
        {"messages": [CONTROL.pack(0, 99, 1).hex()]},
        {"messages": [CONTROL.pack(0, ControlEvent.PORT_OPEN, value).hex() for value in (0, 1)]},
        {"messages": {}},
        {"ports": [{**state["ports"][0], "waiting": "01020304"}, state["ports"][1]]},
    ]
    for change in bad:
        with pytest.raises(SavedStateError):
            device.restore({**good, **change})
    for one, other in ((ports(1), ConsoleDevice(nothing)), (ConsoleDevice(nothing), ports(1))):
        with pytest.raises(SavedStateError, match="ports"):
            one.restore(other.save())


# --- others ------------------------------------------------------------------------------------------------


def test_a_buffer_may_get_one_byte_at_a_time() -> None:
    driver = RngDriver(Loopback(RngDevice(source=lambda count: b"r" * count, limit=1)))
    driver.initialize()
    assert driver.read(3) == b"rrr"


@pytest.mark.parametrize(("ticks", "good"), [(0, True), (0xFFFF_FFFF, True), (-1, False), (1 << 32, False)])
def test_ticks_are_32_bits(ticks: int, good: bool) -> None:
    device = TestDevice()
    state = {**device.save(), "ticks": ticks}
    if good:
        device.restore(state)
        assert device.ticks == ticks
    else:
        with pytest.raises(SavedStateError):
            device.restore(state)


def test_a_thread_that_has_ended_leaves_its_queues_to_the_owner() -> None:
    device = RngDevice(native=True, wait="blocking")
    driver = RngDriver(Loopback(device))
    driver.initialize()
    (worker,) = device.workers
    worker.stop()
    assert len(driver.read(64)) == 64
    assert worker.chains == 0
    device.close()

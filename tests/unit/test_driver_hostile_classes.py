"""Devices of a class that lie in what they show and answer, within the rules of the ring."""

from __future__ import annotations

import time

import pytest
from virtio_test._core import Chain
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.blk import BlkDevice
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.console import ConsoleDriver
from virtio_test.driver.test import TestDriver
from virtio_test.errors import AnswerViolation, InvalidArgument, PeerTimeout, QueueFull, RequestFailed
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec import console
from virtio_test.spec.blk import FEATURE_NAMES, RequestStatus
from virtio_test.spec.console import ControlEvent
from virtio_test.spec.testdevice import CONFIG_FIELDS
from virtio_test.spec.testdevice import FEATURE_NAMES as TEST_FEATURES

SPLIT = RING_FEATURES - FeatureSet("RING_PACKED")


# --- block ------------------------------------------------------------------------------------------------------


class Shown(Loopback):
    """Shows other values in the configuration space than the device has, from the `turn`-th read of each on."""

    def __init__(self, device: BaseDevice, values: dict[str, int], *, turn: int = 1) -> None:
        self._lies = values
        self._turn = turn
        self._reads: dict[str, int] = {}
        super().__init__(device)

    def read_config(self, offset: int, length: int) -> bytes:
        for field in self.device.config.layout.overlapping(offset, length):
            if field.offset == offset and field.name in self._lies:
                self._reads[field.name] = self._reads.get(field.name, 0) + 1
                if self._reads[field.name] >= self._turn:
                    return field.encode(self._lies[field.name])
        return super().read_config(offset, length)


def test_segments_of_a_byte_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = BlkDriver(Loopback(BlkDevice(bytearray(1 << 22))))
    driver.initialize()
    monkeypatch.setattr(driver, "_size_max", 1)
    used = driver.arena.used
    start = time.monotonic()
    with pytest.raises(InvalidArgument):
        driver.submit_read(0, 1 << 13)
    with pytest.raises(InvalidArgument):
        driver.submit_read(0, 8)
    assert time.monotonic() - start < 1
    assert driver.arena.used == used


def test_limits_that_leave_no_room_for_a_sector() -> None:
    device = BlkDevice(bytearray(1 << 20))
    device.features |= FeatureSet("SIZE_MAX", device=FEATURE_NAMES)
    driver = BlkDriver(Shown(device, {"size_max": 3}))
    with pytest.raises(AnswerViolation) as found:
        driver.initialize()
    assert found.value.rule == "BadSegments"


def test_num_queues_counts_as_it_was_read_at_bring_up() -> None:
    driver = BlkDriver(Shown(BlkDevice(bytearray(1 << 20), num_queues=2), {"num_queues": 0xFFFF}, turn=2))
    driver.initialize()
    assert driver.num_queues == 2
    with pytest.raises(AnswerViolation) as found:
        driver.initialize()
    assert found.value.rule == "BadNumQueues"


def test_what_is_not_said_to_be_written_is_no_data() -> None:
    class Refusing(BlkDevice):
        def answer(self, chain: Chain) -> int:
            chain.write(bytes([RequestStatus.IOERR]), offset=chain.writable - 1)
            return 1

    driver = BlkDriver(Loopback(Refusing(bytearray(1 << 20))))
    driver.initialize()
    # What lies in the memory of the next request is what another one has left there.
    driver.submit_request(1, 0, b"secret".ljust(512))
    driver.loop.run_pending()
    read = driver.submit_read(0, 1)
    with pytest.raises(RequestFailed):
        read.wait()
    assert (read.status, read.data) == (RequestStatus.IOERR, b"")


# --- console ----------------------------------------------------------------------------------------------------


class Ports(BaseDevice):
    """A console with three ports; everything that it gets is kept, and its answers are the test's."""

    def __init__(self, loop: OwnerLoop) -> None:
        self.loop = loop
        super().__init__(
            3,
            handlers={index: kept(lambda _: None) for index in range(8)},
            queue_sizes=(16,) * 8,
            features=FeatureSet("MULTIPORT", device=console.FEATURE_NAMES),
            config=ConfigSpace(ConfigLayout(*console.CONFIG_FIELDS), max_nr_ports=3),
        )

    def next_of(self, index: int) -> Chain:
        return next(chain for chain in self.kept if chain.queue_index == index)

    def tell(self, port: int, event: int, value: int = 0, more: bytes = b"") -> None:
        self.complete(self.next_of(console.CONTROL_RECEIVE_QUEUE), console.CONTROL.pack(port, event, value) + more)
        self.loop.run_pending()

    def give(self, port: int, data: bytes) -> None:
        self.complete(self.next_of(2 * port + 2), data)
        self.loop.run_pending()


def console_driver() -> tuple[Ports, ConsoleDriver]:
    loop = OwnerLoop(clock=VirtualClock())
    driver = ConsoleDriver(Loopback(device := Ports(loop), loop=loop), wanted=SPLIT, buffers=4)
    driver.initialize()
    driver.loop.run_pending()
    return device, driver


def test_a_port_that_comes_back_takes_the_buffers_that_are_still_there() -> None:
    device, driver = console_driver()
    device.tell(1, ControlEvent.DEVICE_ADD)
    device.give(1, b"one")
    assert driver.receive(port=1) == b"one"
    device.give(1, b"nobody reads this")
    device.tell(1, ControlEvent.DEVICE_REMOVE)
    with pytest.raises(InvalidArgument, match="no port 1"):
        driver.receive(port=1)
    device.tell(1, ControlEvent.DEVICE_ADD)
    device.give(1, b"two")
    assert driver.receive(port=1) == b"two"


def test_a_port_that_comes_and_goes_for_ever_takes_no_more_memory() -> None:
    device, driver = console_driver()
    device.tell(1, ControlEvent.DEVICE_ADD)
    driver.loop.run_pending()
    assert driver.ports[1].offered == 4
    for turn in range(100):
        device.tell(1, ControlEvent.DEVICE_REMOVE)
        if turn % 2:
            device.give(1, b"into nowhere")
        device.tell(1, ControlEvent.DEVICE_ADD)
        offered = sum(request.queue_index == 4 for request in driver.in_flight)
        assert driver.ports[1].offered == offered == 4
    driver.detach()
    assert driver.arena.used == 0


# --- test device ------------------------------------------------------------------------------------------------


def test_many_requests_behind_a_queue_full_of_unanswered_ones() -> None:
    device = BaseDevice(
        45,
        handlers={0: kept(lambda _: None)},
        queue_sizes=(4,),
        features=FeatureSet("CAN_PRINT", device=TEST_FEATURES),
        config=ConfigSpace(ConfigLayout(*CONFIG_FIELDS)),
    )
    driver = TestDriver(Loopback(device), console=lambda _: None, timeout=1.0)
    driver.initialize()
    for _ in range(2):
        with pytest.raises(PeerTimeout):
            driver.request(1)
    with pytest.raises(QueueFull):
        driver.request_many([1, 2])

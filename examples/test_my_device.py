"""Your own handler and your own driver, before everything that the other side may do.

Needs Hypothesis (pip install "virtio-test[hypothesis]"), and is run by:        pytest examples/test_my_device.py
"""

from hypothesis import given
from hypothesis import strategies as st
from virtio_test import BaseDevice, DeviceQueue, Driver, DriverQueue, Loopback
from virtio_test.errors import QueueViolation
from virtio_test.strategies import RingCase, chains, defects, partitions


def checksum(request: bytes) -> bytes:
    """The device under test: what it reads, added up."""
    return sum(request).to_bytes(4, "little")


class Collector:
    """The driver under test: it keeps what came back, and gives up the queue when the device lies."""

    def __init__(self, queue: DriverQueue) -> None:
        self.queue, self.done, self.broken = queue, list[tuple[int, int]](), ""

    def interrupt(self) -> None:
        """Something may have been used."""
        try:
            self.done += self.queue.get_used_many()
        except QueueViolation as violation:
            self.broken = violation.rule
            self.queue.detach()


@given(chains(st.binary(max_size=200), st.integers(0, 8)))
def test_the_handler_gets_each_request_whole(case: RingCase) -> None:
    """However it is cut into descriptors, in whatever queue: an answer that does not fit is none."""
    with case.play() as scene:
        assert isinstance(scene.device, DeviceQueue)
        scene.device.process(checksum)
        for number, written, answer in scene.returned():
            assert answer == checksum(case.buffers[number].data)[:written]


@given(st.binary(min_size=1, max_size=64), st.data())
def test_the_whole_device_does_too(request: bytes, data: st.DataObject) -> None:
    """The same with feature bits, status and kicks around it."""
    driver = Driver(Loopback(BaseDevice(60, handlers={0: checksum})))
    driver.initialize()
    lengths = data.draw(partitions(len(request)))
    pieces = [request[sum(lengths[:at]) :][:length] for at, length in enumerate(lengths)]
    assert driver.submit(0, pieces, [4]).wait() == checksum(request)


@given(defects(("G01", "G02", "G05", "G06")))
def test_the_driver_survives_a_lying_device(case: RingCase) -> None:
    """`case.interop` knows which rule is broken; `scene.spoil` makes the device's writes."""
    with case.play() as scene:
        driver = Collector(scene.driver)
        scene.spoil()
        driver.interrupt()
        assert driver.queue.in_flight == 0 or not driver.broken

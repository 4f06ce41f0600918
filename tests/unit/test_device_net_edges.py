"""The network device at its edges: the smallest and the largest frame, counts, tables, what must not be generated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from virtio_test._core import Notifier
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.net import Generate, NetDevice
from virtio_test.devices.netcontrol import MAX_TABLE
from virtio_test.devices.netframes import LONGEST
from virtio_test.driver.base import Driver
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.net import FEATURE_NAMES, HEADER, REQUIRES

MAC = bytes.fromhex("525400123456")
HEADER_OF_ONE = HEADER.pack(0, 0, 0, 0, 0, 0, 1)
EVERYTHING = RING_FEATURES | FeatureSet("MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "MQ", device=FEATURE_NAMES)


class Bare(Driver):
    """Gives each receive buffer, frame and command by hand."""

    requires = REQUIRES

    def command(self, kind: int, number: int, data: bytes, *, queue: int = 2) -> bytes:
        return self.submit(queue, [bytes((kind, number)) + data], [1]).wait()


def live(device: NetDevice, wanted: FeatureSet = RING_FEATURES) -> Bare:
    driver = Bare(Loopback(device), wanted=wanted)
    driver.initialize()
    return driver


# --- declarations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("possible", "impossible"),
    [
        (lambda: Generate(14), lambda: Generate(13)),
        (lambda: Generate(LONGEST), lambda: Generate(LONGEST + 1)),
        (lambda: Generate(count=0), lambda: Generate(count=-1)),
        (lambda: Generate(count=(1 << 64) - 1), lambda: Generate(count=1 << 64)),
    ],
)
def test_the_last_value_that_can_be(possible: Callable[[], object], impossible: Callable[[], object]) -> None:
    possible()
    with pytest.raises(InvalidArgument):
        impossible()


@pytest.mark.parametrize("length", [5, 7])
def test_an_address_has_six_bytes(length: int) -> None:
    assert NetDevice(mac=bytes(6)).config.mac == bytes(6)
    with pytest.raises(InvalidArgument, match="no address of 6 bytes"):
        NetDevice(mac=bytes(length))


# --- frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, LONGEST])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_smallest_and_the_largest_frame_go_through(length: int, elsewhere: bool) -> None:
    device = NetDevice(lambda _: [b"f" * length])
    driver = live(device)
    request = driver.submit(0, [], [12 + length])
    if elsewhere:
        assert device.deliver(b"f" * length)
    else:
        driver.submit(1, [bytes(12) + b"go"]).wait()
    assert request.wait() == HEADER_OF_ONE + b"f" * length


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_a_back_end_must_not_go_beyond(length: int) -> None:
    device = NetDevice(lambda _: [b"f" * length])
    driver = live(device)
    with pytest.raises(DeviceNeedsReset):
        driver.submit(1, [bytes(12) + b"go"]).wait()
    assert device.handler_errors == 1


def test_a_first_buffer_without_room_for_the_header_is_not_merged() -> None:
    device = NetDevice()
    driver = live(device, EVERYTHING - FeatureSet("MQ", device=FEATURE_NAMES))
    small, large = driver.submit(0, [], [11]), driver.submit(0, [], [100])
    assert not device.deliver(b"frame")
    driver.loop.run_pending()
    assert not small.done
    assert not large.done
    assert [each.rule for each in device.findings] == ["BufferTooSmall"]


@pytest.mark.parametrize("native", [False, True])
def test_a_receive_buffer_needs_no_kick_where_nothing_is_made(native: bool) -> None:
    driver = live(NetDevice(native=native))
    driver.submit(0, [], [100], publish=False)
    assert not driver.flush(0)
    driver = live(NetDevice(Generate(60, count=2), native=native))
    for number in range(2):
        request = driver.submit(0, [], [100], publish=False)
        assert driver.flush(0)
        driver.loop.run_pending()
        assert len(request.data) == 72, number
    assert device_of(driver).counters["received"] == 2


def device_of(driver: Driver) -> NetDevice:
    assert isinstance(driver.registers, Loopback)
    assert isinstance(driver.registers.device, NetDevice)
    return driver.registers.device


@pytest.mark.parametrize("native", [False, True])
def test_a_queue_with_nothing_in_it_is_not_looked_at_again(native: bool) -> None:
    device = NetDevice(native=native)
    assert not device.kicked(0)
    live(device)
    assert [device.kicked(queue) for queue in range(4)] == [False] * 4


def test_a_generator_that_has_no_queue_makes_nothing() -> None:
    assert not NetDevice(Generate(60)).kicked(0)


@pytest.mark.parametrize("why", ["held", "link", "pair"])
def test_a_generator_that_must_not_makes_nothing(why: str) -> None:
    """Until it may again; and the other way round once it has begun."""
    device = NetDevice(Generate(60, count=3), pairs=2)
    driver = live(device, EVERYTHING)
    queue = 2 if why == "pair" else 0

    def forbid() -> None:
        if why == "held":
            device.hold()
        elif why == "link":
            device.set_link(up=False)
        else:
            assert driver.command(4, 0, b"\1\0", queue=4) == b"\0"

    def allow() -> None:
        if why == "held":
            device.release()
        elif why == "link":
            device.set_link(up=True)
        else:
            assert driver.command(4, 0, b"\2\0", queue=4) == b"\0"

    for number in range(1, 4):
        forbid()
        request = driver.submit(queue, [], [100])
        driver.loop.run_pending()
        assert not device.kicked(queue)
        assert not request.done
        allow()
        device.kicked(queue)
        driver.loop.run_pending()
        assert request.done
        assert device.counters["received"] == number


def test_kicks_of_queues_that_nobody_knows_yet_are_not_taken() -> None:
    device = NetDevice(native=True, wait="blocking", pairs=2)
    kick = Notifier.eventfd()
    assert [device.take_kick(queue, kick.fileno()) for queue in range(5)] == [True, True, False, False, False]
    driver = live(device, EVERYTHING)
    assert [device.take_kick(queue, kick.fileno()) for queue in range(5)] == [True] * 4 + [False]
    driver.reset()
    plain = NetDevice(native=True)
    assert not plain.take_kick(0, kick.fileno())
    device.close()


# --- commands and saved states -----------------------------------------------------------------------------


def table(*counts: int, given: tuple[int, ...] | None = None) -> bytes:
    real = counts if given is None else given
    return b"".join(struct.pack("<I", count) + MAC * there for count, there in zip(counts, real, strict=True))


@pytest.mark.parametrize(
    ("data", "ack"),
    [
        (table(MAX_TABLE, MAX_TABLE), b"\0"),
        (table(MAX_TABLE + 1, 0), b"\1"),
        (table(0, MAX_TABLE + 1), b"\1"),
        (table(0, 2, given=(0, 1)), b"\1"),
        (table(0, 1)[:-1], b"\1"),
        (table(1, 0) + b"\0", b"\1"),
        (table(0), b"\1"),
    ],
)
def test_the_table_of_addresses(data: bytes, ack: bytes) -> None:
    device = NetDevice()
    driver = live(device, EVERYTHING)
    assert driver.command(1, 0, data) == ack
    assert len(device.findings) == ack[0]
    assert len(device.control.multicast) == (0 if ack == b"\1" else MAX_TABLE)


@pytest.mark.parametrize(("data", "ack"), [(b"\2\0", b"\0"), (b"\2", b"\1"), (b"\2\0\0", b"\1"), (b"\3\0", b"\1")])
def test_a_number_of_pairs_has_two_bytes(data: bytes, ack: bytes) -> None:
    device = NetDevice(pairs=2)
    assert live(device, EVERYTHING).command(4, 0, data, queue=4) == ack
    assert device.pairs_in_use == (2 if ack == b"\0" else 1)


def test_the_last_state_that_can_be() -> None:
    device = NetDevice(pairs=2)
    state: Any = json.loads(json.dumps(device.save()))
    full = {**state["control"], "unicast": [MAC.hex()] * MAX_TABLE, "multicast": [MAC.hex()] * MAX_TABLE, "pairs": 2}
    most = [(1 << 64) - 1] * 2
    device.restore({**state, "control": full, "generated": most})
    assert (len(device.control.unicast), device.control.pairs, device.save()["generated"]) == (MAX_TABLE, 2, most)
    for change in (
        {"control": {**full, "multicast": [MAC.hex()] * (MAX_TABLE + 1)}},
        {"control": {**full, "pairs": 3}},
        {"generated": [1, 2, -1]},
        {"generated": [1, 2, 1 << 64]},
        {"generated": [1, 2, 3]},
        {"generated": [1, 1 << 64]},
    ):
        with pytest.raises(SavedStateError):
            device.restore({**state, **change})

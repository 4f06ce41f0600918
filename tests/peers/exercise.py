"""What each device class has to do: the same for every transport, ring and interrupt, with data that is checked."""

from __future__ import annotations

import socket
from collections.abc import Callable

from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.console import ConsoleDriver
from virtio_test.driver.net import NetDriver
from virtio_test.driver.registers import Registers
from virtio_test.driver.rng import RngDriver
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import FEATURE_NAMES

from tests.peers.machines import IMAGE_SIZE, Kind, Spot, World

SECTOR = 512


def drive(world: World, spot: Spot, registers: Registers, wanted: FeatureSet) -> FeatureSet:
    """Bring the device up, use all of it, reset queues and device, use it again; what was agreed on."""
    driver = _MAKE[spot.kind](registers, wanted)
    agreed = driver.initialize()
    _USE[spot.kind](world, spot.number, driver)
    if "RING_RESET" in agreed:
        # Not the receive queues of net and console, whose buffers their drivers put in when they come up.
        for index in list(driver.queues) if spot.kind in ("rng", "blk") else [1]:
            driver.reset_queue(index)
        _USE[spot.kind](world, spot.number, driver)
    assert driver.initialize() == agreed
    _USE[spot.kind](world, spot.number, driver)
    driver.detach()
    return agreed


def ring(features: FeatureSet) -> str:
    """How the ring worked that was agreed on, in words."""
    words = ["packed" if "RING_PACKED" in features else "split"]
    words += [name.lower() for name in ("IN_ORDER", "EVENT_IDX") if name in features]
    return ", ".join(words)


def _rng(registers: Registers, wanted: FeatureSet) -> Driver:
    return RngDriver(registers, wanted=wanted, indirect="INDIRECT_DESC" in wanted)


def _use_rng(_world: World, _number: int, driver: Driver) -> None:
    assert isinstance(driver, RngDriver)
    data = driver.read(300)
    assert len(data) == 300
    assert len(set(data)) > 100, "these are no random bytes"
    # More than the ring holds at once, so that it goes round; every answer has to be another.
    seen: set[bytes] = set()
    for _ in range(6):
        requests = [driver.submit_read(16) for _ in range(5)]
        seen |= {request.wait() for request in requests}
    assert len(seen) == 30


def _blk(registers: Registers, wanted: FeatureSet) -> Driver:
    return BlkDriver(registers, wanted=wanted | _CLASS, indirect="INDIRECT_DESC" in wanted)


def _use_blk(world: World, number: int, driver: Driver) -> None:
    assert isinstance(driver, BlkDriver)
    assert driver.capacity == IMAGE_SIZE // SECTOR
    assert driver.identify() == f"disk-{number}"
    pattern = bytes(range(256)) * 2
    data = b"".join(bytes([index]) + pattern[1:] for index in range(32))
    driver.write(100, data)
    driver.flush_cache()
    assert world.image(number).read_bytes()[100 * SECTOR :][: len(data)] == data
    flying = [driver.submit_read(100 + index, 1) for index in range(32)]
    for index, request in enumerate(flying):
        assert request.wait()[:SECTOR] == data[index * SECTOR :][:SECTOR]
    if "WRITE_ZEROES" in driver.features:
        driver.write_zeroes(104, 2)
        assert driver.read(103, 4) == data[3 * SECTOR : 4 * SECTOR] + bytes(2 * SECTOR) + data[6 * SECTOR : 7 * SECTOR]
    if "DISCARD" in driver.features:
        driver.discard(100, 32)
    if "MQ" in driver.features:
        assert driver.num_queues == 2
        driver.write(7, b"second queue".ljust(SECTOR), queue=1)
        assert driver.read(7, 1, queue=0).startswith(b"second queue")


def _net(registers: Registers, wanted: FeatureSet) -> Driver:
    return NetDriver(registers, wanted=wanted, indirect="INDIRECT_DESC" in wanted)


def _use_net(world: World, number: int, driver: Driver) -> None:
    assert isinstance(driver, NetDriver)
    assert driver.mac == world.mac(number)
    wire = world.wire(number)
    for index in range(5):
        frame = bytes(6) + driver.mac + b"\x88\xb5" + bytes([index]) * (50 + 200 * index)
        driver.send(frame)
        assert wire.recv(65536) == frame
    for index in range(40):
        # To this device, and more than there are buffers.
        frame = driver.mac + bytes(6) + b"\x88\xb5" + bytes([index]) * (60 + 30 * index)
        world.put_on_wire(number, frame)
        assert driver.receive(timeout=5)[: len(frame)] == frame
    assert driver.findings == []


def _console(registers: Registers, wanted: FeatureSet) -> Driver:
    return ConsoleDriver(registers, wanted=wanted, indirect="INDIRECT_DESC" in wanted)


def _use_console(world: World, number: int, driver: Driver) -> None:
    assert isinstance(driver, ConsoleDriver)
    driver.run_until(lambda: {0, 1} <= set(driver.ports), "both ports", timeout=5)
    with world.terminal(number, 0) as first, world.terminal(number, 1) as second:
        driver.run_until(lambda: driver.ports[1].open, "the port's other end", timeout=5)
        driver.set_open(on=True, port=1)
        for index, terminal in ((0, first), (1, second)):
            driver.send(b"hello %d" % index, port=index)
            assert _exactly(terminal, 7) == b"hello %d" % index
            terminal.sendall(b"typed %d" % index * 300)
            got = b""
            while len(got) < 2100:
                got += driver.receive(port=index, timeout=5)
            assert got == b"typed %d" % index * 300
    driver.run_until(lambda: not driver.ports[1].open, "the port's other end to go", timeout=5)
    assert driver.findings == []


def _exactly(terminal: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += terminal.recv(count - len(data))
    return data


_CLASS = FeatureSet(*(name for name in FEATURE_NAMES if name != "ZONED"), device=FEATURE_NAMES)
_MAKE: dict[Kind, Callable[[Registers, FeatureSet], Driver]] = {
    "rng": _rng,
    "blk": _blk,
    "net": _net,
    "console": _console,
}
_USE: dict[Kind, Callable[[World, int, Driver], None]] = {
    "rng": _use_rng,
    "blk": _use_blk,
    "net": _use_net,
    "console": _use_console,
}

"""What has been found in QEMU's devices, done to devices of ours: what they write, how much, and whom they trust."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from virtio_test._core import Chain, DeviceQueue
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.devices.base import BaseDevice, batched, kept
from virtio_test.devices.rng import RngDevice
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.driver.net import NetDriver
from virtio_test.errors import InvalidArgument, QueueViolation
from virtio_test.features import FeatureSet
from virtio_test.spec.net import FEATURE_NAMES, HEADER, HEADER_LEGACY
from virtio_test.transport.mmio import VirtioMmio

from tests.hostile.net_device import HASH_BYTES, MAC, NetDevice
from tests.hostile.world import (
    FORMATS,
    MIB,
    PAGE,
    Attacker,
    attacker,
    memory,
    spare,
    wanted,
)
from tests.unit.disks import NATIVE, disk
from tests.unit.world import mapped_files, open_fds

# --- what is written, and how much ---------------------------------------------------------------------------------


@pytest.mark.row("CVE-2024-8612", "U02")
@FORMATS
def test_a_length_larger_than_what_was_written(packed: bool) -> None:
    """No copy of ours stands between device and guest, so nothing of ours can leak: the rest is what the guest had."""

    def take(chain: Chain) -> None:
        assert chain.write(b"12345678") == 8
        device.queue(0).push(chain, 64)
        device.queue(0).signal()

    device = BaseDevice(45, handlers={0: kept(take)}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    request = driver.submit(0, [], [64], publish=False)
    driver.memory.fill(request.writable[0][0], 64, 0x5C)
    driver.flush(0)
    assert request.wait() == b"12345678" + b"\x5c" * 56


@pytest.mark.row("CVE-2024-8612", "U01")
@FORMATS
def test_a_length_larger_than_the_buffer(packed: bool) -> None:
    found: list[object] = []

    def take(chain: Chain) -> None:
        before = driver.memory.read(0, MIB)
        with pytest.raises(InvalidArgument) as caught:
            device.queue(0).push(chain, 65)
        found.append(caught.value)
        assert driver.memory.read(0, MIB) == before
        device.queue(0).push(chain, 0)
        device.queue(0).signal()

    device = BaseDevice(45, handlers={0: kept(take)}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    assert driver.submit(0, [], [64]).wait() == b""
    assert len(found) == 1


@pytest.mark.row("CVE-2021-3545")
@FORMATS
def test_a_response_that_nobody_filled_in_is_zeros(packed: bool) -> None:
    """What a batch handler leaves alone holds nothing of the batch, or of the memory, before."""
    turn = 0

    def handler(requests: memoryview, responses: memoryview) -> None:
        nonlocal turn
        turn += 1
        assert bytes(responses) == bytes(len(responses))
        if turn % 2:
            responses[:] = b"\xa5" * len(responses)

    device = BaseDevice(16, handlers={0: batched(handler, request_size=16, response_size=4096)}, queue_sizes=(64,))
    _, driver = attacker(device, packed=packed)
    for number in range(6):
        answers = [driver.submit(0, [bytes(16)], [4096], publish=False) for _ in range(16)]
        driver.flush(0)
        expected = bytes(4096) if number % 2 else b"\xa5" * 4096
        assert {each.wait() for each in answers} == {expected}


@pytest.mark.row("CVE-2021-3544", "CVE-2022-26353", "CVE-2022-26354", "U12")
@FORMATS
def test_ten_thousand_failures_leave_nothing(packed: bool) -> None:
    """Whatever fails lets go of what it had: no chain, no fd, no mapping stays, of broken rings or of bad requests."""
    refuse: list[int] = []

    def take(chain: Chain) -> None:
        if chain.readable < 44:
            refuse.append(1)
            message = "no header of a vsock packet"
            raise ValueError(message)
        device.complete(chain, b"")

    device = BaseDevice(19, handlers={0: kept(take)}, queue_sizes=(8,), on_handler_error="complete0")
    _, driver = attacker(device, packed=packed)
    queue = device.queue(0)
    import logging

    logging.getLogger("virtio_test.device").setLevel(logging.CRITICAL)
    try:
        before = open_fds(), mapped_files()
        for _ in range(1000):
            for _ in range(8):
                driver.submit(0, [bytes(43)], publish=False)
            driver.flush(0)
            driver.loop.run_pending()
        assert len(refuse) == device.handler_errors == 8000
        assert (queue.in_flight, device.kept, driver.in_flight) == (0, [], [])
        for _ in range(2000):
            driver.pen().chain((0x9000_0000, 1, 0))
            with pytest.raises(QueueViolation):
                fresh(driver, queue)
            assert queue.in_flight == 0
        assert (open_fds(), mapped_files()) == before
        honest_vsock(driver)
    finally:
        logging.getLogger("virtio_test.device").setLevel(logging.NOTSET)


def fresh(driver: Attacker, queue: DeviceQueue) -> None:
    """The device end begins anew over what stands in the ring."""
    queue.reset()
    queue.pop()


def honest_vsock(driver: Attacker) -> None:
    driver.initialize()
    assert driver.submit(0, [bytes(44)]).wait() == b""


@pytest.mark.row("CVE-2021-3546", "CVE-2023-3180", "CVE-2024-7730")
@FORMATS
@pytest.mark.parametrize("way", ["request", "batch", "kept", "chain"])
def test_an_answer_longer_than_its_buffer(packed: bool, way: str) -> None:
    """A destination shorter than the source, a period longer than the buffer: not a byte is written outside it."""
    long = b"\x77" * 16

    def batch(requests: memoryview, responses: memoryview) -> None:
        responses[:] = b"\x77" * len(responses)

    def whole(_request: bytes) -> bytes:
        return long

    def chain_write(chain: Chain) -> None:
        assert chain.write(long) == 8
        assert chain.fill(0x77, offset=8) == 0
        device.complete(chain, b"")

    handlers: dict[str, Any] = {
        "request": whole,
        "batch": batched(batch, request_size=16, response_size=16),
        "kept": kept(lambda chain: device.complete(chain, long)),
        "chain": kept(chain_write),
    }
    device = BaseDevice(20, handlers={0: handlers[way]}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    request = driver.submit(0, [bytes(16)], [8], publish=False)
    (address, _) = request.writable[0]
    driver.memory.fill(address, 4096, 0x11)
    driver.flush(0)
    assert request.wait() == (long[:8] if way == "chain" else b"")
    assert driver.memory.read(address + 8, 4088) == b"\x11" * 4088


@pytest.mark.row("CVE-2026-48914")
@pytest.mark.parametrize("length", range(0, 33, 4))
@pytest.mark.parametrize("room", [0, 1, 4, 17])
@NATIVE
def test_a_scsi_command_that_ends_early(length: int, room: int, *, native: bool) -> None:
    """Requests of the legacy kind 2, with all of their parts, some, or none: a status, or nothing."""
    device = disk(bytes(8 * 512), native=native)
    _, driver = attacker(device)
    request = driver.submit(
        0, [struct.pack("<IIQ", 2, 0, 0)[: max(1, length)], bytes(max(1, length - 16))], [room][:room]
    )
    answer = request.wait()
    if room and length >= 16:
        assert answer[-1:] in (b"\1", b"\2")
        assert answer[:-1] == bytes(len(answer) - 1)
    else:
        assert len(answer) <= room
    honest_disk(driver)


def honest_disk(driver: Attacker) -> None:
    disk = BlkDriver(driver.registers, arena=spare(driver.memory))
    disk.initialize()
    disk.write(0, b"sector!!" * 64)
    assert disk.read(0, 1) == b"sector!!" * 64


# --- the network ---------------------------------------------------------------------------------------------------


def net(*without: str, packed: bool = False, ring: tuple[str, ...] = ()) -> tuple[NetDevice, NetDriver]:
    offer = NetDevice().features - FeatureSet(*without, device=FEATURE_NAMES)
    device = NetDevice(offer)
    ram = memory()
    loopback = Loopback(device, memory=ram)
    driver = NetDriver(
        loopback, buffers=8, buffer_size=64, wanted=wanted(packed=packed, without=ring), arena=spare(ram)
    )
    driver.initialize()
    driver.loop.run_pending()
    return device, driver


@pytest.mark.row("CVE-2021-3748", "U09")
@FORMATS
def test_a_frame_over_two_buffers_of_which_the_second_is_bad(packed: bool) -> None:
    """Nothing is written into the first, and nothing is shown; the reset mends it."""
    device, driver = net(packed=packed)
    # The second buffer of the ring lies nowhere.
    queue = driver.queues[0]
    layout = queue.layout()
    driver.memory.write(layout.at("desc.addr", 1), (0x9000_0000).to_bytes(8, "little"))
    first = int.from_bytes(driver.memory.read(layout.at("desc.addr", 0), 8), "little")
    driver.memory.fill(first, 64 + HEADER.size, 0x33)
    ring = driver.memory.read(layout.desc, layout.end - layout.desc)
    assert device.receive(b"f" * 100) is False
    driver.loop.run_pending()
    assert driver.memory.read(first, 64 + HEADER.size) == b"\x33" * (64 + HEADER.size)
    assert driver.memory.read(layout.desc, layout.end - layout.desc) == ring
    assert driver.broken is not None
    driver.initialize()
    driver.loop.run_pending()
    assert device.receive(b"f" * 100) is True
    driver.loop.run_pending()
    assert driver.receive() == b"f" * 100


@pytest.mark.row("CVE-2021-3748")
@FORMATS
def test_a_frame_whose_second_buffer_is_taken_away(packed: bool) -> None:
    """Its memory goes between the taking and the writing: all go back to the ring, none is shown."""
    device, driver = net(packed=packed)
    driver.memory.add_region(64 * MIB, PAGE)
    layout = driver.queues[0].layout()
    driver.memory.write(layout.at("desc.addr", 1), (64 * MIB).to_bytes(8, "little"))
    queue = device.queue(0)
    fill = device.fill

    def gone(chains: list[Chain], frame: bytes) -> None:
        driver.memory.remove_region(64 * MIB, PAGE)
        fill(chains, frame)

    device.fill = gone
    before = driver.memory.read(layout.device, layout.device_bytes)
    assert device.receive(b"f" * 100) is False
    assert queue.in_flight == 0
    assert driver.memory.read(layout.device, layout.device_bytes) == before
    assert queue.pop() is not None
    with pytest.raises(QueueViolation, match="UnmappedAddress"):
        queue.pop()


@pytest.mark.row("CVE-2023-6693", "qemu@52c7bb36", "qemu@77248856")
@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 12, 13, 19, 20, 21])
@pytest.mark.parametrize("names", [(), ("HASH_REPORT",), ("HASH_REPORT", "MRG_RXBUF")])
def test_a_header_of_another_length_than_negotiated(length: int, names: tuple[str, ...]) -> None:
    """How much is header was agreed upon; a request that is no longer than that carries no frame."""
    device, driver = net(*names)
    hashed = FeatureSet("HASH_REPORT", device=FEATURE_NAMES)
    driver.wanted |= hashed
    driver.initialize()
    expected = HEADER.size + HASH_BYTES * ("HASH_REPORT" in driver.features)
    assert device.header_bytes == expected
    request = driver.submit(1, [b"\xee" * max(1, length)])
    assert request.wait() == b""
    assert device.sent == ([b"\xee" * (length - expected)] if length > expected else [])
    assert device.odd == (length <= expected)
    driver.submit(1, [bytes(expected) + b"frame"]).wait()
    assert device.sent[-1] == b"frame"


@pytest.mark.row("CVE-2023-6693")
def test_a_legacy_header_is_shorter() -> None:
    names = ("HASH_REPORT", "MRG_RXBUF", "RSS")
    device = NetDevice(NetDevice().features - FeatureSet(*names, device=FEATURE_NAMES))
    target = VirtioMmio(device, version=1, memory=memory())
    legacy = NetDriver(MmioRegisters(MmioLoopback(target)), buffers=4, arena=spare(target.memory))
    legacy.initialize()
    assert device.header_bytes == HEADER_LEGACY.size
    legacy.send(b"f" * 60)
    legacy.loop.run_pending()
    assert device.sent[-1] == b"f" * 60


@pytest.mark.row("CVE-2014-0150")
@pytest.mark.parametrize(
    ("first", "second", "given"),
    [(0xFFFF_FFFF, 1, 2), (0x2AAA_AAAB, 0, 1), (1, 0xFFFF_FFFF, 2), (0x8000_0000, 0x8000_0000, 4), (3, 0, 2)],
)
def test_a_table_of_addresses_whose_size_wraps(first: int, second: int, given: int) -> None:
    """VIRTIO_NET_ERR, and the table is as it was."""
    device, driver = net()
    good = struct.pack("<BBI", 1, 0, 1) + MAC + struct.pack("<I", 0)
    assert driver.submit(2, [good], [1]).wait() == b"\0"
    assert device.addresses == [MAC]
    bad = struct.pack("<BBI", 1, 0, first) + MAC * given + struct.pack("<I", second)
    assert driver.submit(2, [bad], [1]).wait() == b"\1"
    assert device.addresses == [MAC]


@pytest.mark.row("CVE-2024-6505")
@pytest.mark.parametrize(
    ("mask", "entries"), [(1, (0, 1)), (0, (0xFFFF,)), (2, (0, 0, 0)), (0xFFFF, (0,)), (127, (0,))]
)
def test_an_indirection_table_beyond_the_queues(mask: int, entries: tuple[int, ...]) -> None:
    device, driver = net()

    def command(mask: int, entries: tuple[int, ...]) -> bytes:
        body = struct.pack("<BBIHH", 4, 1, 0, mask, 0) + struct.pack(f"<{len(entries)}H", *entries)
        return driver.submit(2, [body], [1]).wait()

    assert command(1, (0, 0)) == b"\0"
    assert command(mask, entries) == b"\1"
    assert device.table == [0, 0]


@pytest.mark.row("CVE-2021-3545")
@NATIVE
def test_a_disk_never_shows_old_memory(*, native: bool) -> None:
    """What a request leaves of its writable buffers is zeroed before it counts as written."""
    device = disk(b"\xa5" * 4096, serial="x", native=native)
    _, driver = attacker(device)
    request = driver.submit(0, [struct.pack("<IIQ", 8, 0, 0)], [20, 1])
    answer = request.wait()
    assert b"\xa5" not in answer
    assert answer == b"x".ljust(20, b"\0") + b"\0"
    # Refused, and all of what it offers zeroed: the image is not shown, nor what the guest had there.
    request = driver.submit(0, [struct.pack("<IIQ", 8, 0, 0)], [64, 1], publish=False)
    driver.memory.fill(request.writable[0][0], 64, 0x11)
    driver.flush(0)
    assert request.wait() == bytes(64) + b"\1"


@pytest.mark.row("CVE-2026-50624")
def test_a_source_that_resets_the_device(tmp_path: Path) -> None:
    """The entropy is asked for, and the device is reset before it is there."""

    def source(count: int) -> bytes:
        driver.registers.write_status(0)
        return b"\x22" * count

    device = RngDevice(source=source)
    _, driver = attacker(device)
    request = driver.submit(0, [], [64])
    address = request.writable[0][0]
    driver.memory.fill(address, 64, 0x11)
    driver.loop.run_pending()
    assert driver.memory.read(address, 64) == b"\x11" * 64
    device.source = b"\x33".__mul__
    driver.initialize()
    assert driver.submit(0, [], [8]).wait() == b"\x33" * 8

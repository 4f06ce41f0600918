"""What has been found in QEMU's rings and registers, done to us: each test is one vulnerability, by its id.

What belongs to saved state, to the record of what is in flight and to the dirty log stands with the tests of those;
what cannot concern us is among the rows of `virtio_test.checks`, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from virtio_test._core import Chain, Trace
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.spec.pci import NO_VECTOR
from virtio_test.transport.mmio import LEGACY as LEGACY_ROWS
from virtio_test.transport.mmio import VirtioMmio

from tests.hostile.world import (
    BUFFER,
    FORMATS,
    INDIRECT,
    MIB,
    NEXT,
    PAGE,
    TABLE,
    WRITE,
    Attacker,
    Target,
    Way,
    attacker,
    broken,
    honest,
    memory,
    reach,
    spare,
    upper,
    wanted,
)
from tests.unit.pci_world import World

LAST_PAGE: Final = 4 * MIB - PAGE


def one_by_one(target: Target, driver: Attacker, rule: str, trace: Trace | None = None) -> None:
    """The rule is told once, and the reset is all that it takes."""
    broken(target, driver, rule)
    target.forget()
    honest(driver)


# --- rings and chains ----------------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2011-2212")
@FORMATS
@pytest.mark.parametrize("entries", [1025, 65536])
def test_a_table_longer_than_any_array(packed: bool, entries: int) -> None:
    """Refused for its length alone: not one entry of it is read."""
    trace = Trace()
    target, driver = attacker(packed=packed, trace=trace)
    pen = driver.pen()
    length = pen.table(entries, BUFFER, 1, WRITE, at=2 * MIB)
    assert length == 16 * entries
    pen.chain((2 * MIB, length, INDIRECT))
    trace.clear()
    pen.kick()
    driver.run()
    assert not [each for each in trace.log() if 2 * MIB <= each.address < 2 * MIB + length]
    one_by_one(target, driver, "IndirectTooLong")


@pytest.mark.row("CVE-2016-5403")
@FORMATS
def test_buffers_that_are_given_and_never_waited_for(packed: bool) -> None:
    """A device that keeps all it gets holds a ring of chains, and not one more."""
    held: list[Chain] = []
    device = BaseDevice(45, handlers={0: kept(held.append)}, queue_sizes=(8,))
    target, driver = attacker(device, packed=packed)
    pen = driver.pen()
    for at in range(8):
        pen.chain((BUFFER, 16, 0), at=at, available=at + 1)
    pen.kick()
    driver.run()
    assert len(held) == device.queue(0).in_flight == 8
    if packed:
        # The next lap begins, although nothing of the first came back.
        pen.put("desc.flags", 1 << 15, 0)
    else:
        pen.put("avail.idx", 9)
    pen.kick()
    driver.run()
    assert len(held) == 8
    broken(target, driver, "TooManyInFlight")
    assert driver.reset() == []
    assert device.kept == []


@pytest.mark.row("CVE-2016-6490")
@FORMATS
def test_buffers_of_no_length_do_not_hold_the_device(packed: bool) -> None:
    """Each of 128 descriptors of 0 bytes is read once; then it is an empty request like any other."""
    trace = Trace()
    target, driver = attacker(packed=packed, trace=trace)
    pen = driver.pen()
    pen.chain(*[(BUFFER, 0, 0)] * 64, *[(BUFFER, 0, WRITE)] * 64)
    trace.clear()
    pen.kick()
    driver.run()
    assert len([each for each in trace.log() if each.kind != "fence"]) < 10 * 128
    assert target.found() == []
    assert target.bank is not None
    assert target.bank.queue(0).counters.pushed == 1
    honest(driver)


@pytest.mark.row("CVE-2016-7422")
@FORMATS
@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(
    ("address", "length"), [(LAST_PAGE, 0xFFFF_FFFF), (LAST_PAGE, PAGE + 1), (0, 4 * MIB + 1), (PAGE, 4 * MIB)]
)
def test_a_length_beyond_what_can_be_mapped(packed: bool, flags: int, address: int, length: int) -> None:
    target, driver = attacker(packed=packed)
    driver.pen().chain((address, length, flags))
    driver.pen().kick()
    one_by_one(target, driver, "UnmappedAddress")


@pytest.mark.row("CVE-2026-16457")
@FORMATS
@pytest.mark.parametrize("way", ["loopback", "pci", "mmio 2"])
def test_a_head_that_is_broken_does_not_stay_at_the_front(packed: bool, way: Way) -> None:
    """INDIRECT and NEXT: the loop over the device comes to its end, in a handful of turns."""
    ram = memory()
    with reach(upper(), way, ram=ram) as target:
        driver = Attacker(target.registers, wanted=wanted(packed=packed), arena=spare(ram))
        driver.initialize()
        pen = driver.pen()
        pen.chain((TABLE, pen.table(4, BUFFER, 1, 0), INDIRECT | NEXT))
        pen.kick()
        assert driver.loop.run_pending() < 10
        broken(target, driver, "IndirectAndNext")
        for _ in range(10):
            pen.kick()
            assert driver.loop.run_pending() <= 1
        target.forget()
        honest(driver)


@pytest.mark.row("qemu@6dbdc271")
@FORMATS
def test_a_table_without_entries(packed: bool) -> None:
    target, driver = attacker(packed=packed)
    driver.pen().chain((TABLE, 0, INDIRECT))
    driver.pen().kick()
    one_by_one(target, driver, "IndirectBadLen")


# --- registers -----------------------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2011-2512")
@pytest.mark.parametrize("way", ["mmio 1", "mmio 2", "legacy pci"])
def test_a_kick_for_a_queue_with_a_negative_number(way: Way) -> None:
    ram = memory()
    with reach(upper(), way, ram=ram) as target:
        driver = Driver(target.registers, arena=spare(ram))
        driver.initialize()
        driver.loop.run_pending()
        for number in (1, 2, 0x7FFF, 0x8000, 0xFFFF):
            target.registers.kick_notifier(number, lambda: 0).notify()
            assert driver.loop.run_pending() == 0
        honest(driver, initialize=False)


@pytest.mark.row("CVE-2011-2512")
@pytest.mark.parametrize("value", [1, 2, 0x7FFF, 0x8000, 0xFFFF])
def test_a_notification_beside_all_queues(value: int) -> None:
    """PCI says by the place which queue it is: where there is none, whatever is written kicks nobody."""
    world = World(upper(16))
    queue = world.live()
    world.run()
    where = world.layout.notify
    world.write(where, world.layout.multiplier * 1, 2, value)
    world.write(where, where.length - 2, 2, value)
    assert world.run() == 0
    assert world.works(queue)


@pytest.mark.row("CVE-2017-17381")
@pytest.mark.parametrize("align", [0, 1, 2, 3, 4095, 0x8000_0001, 0xFFFF_FFFF])
def test_an_alignment_to_divide_by(align: int) -> None:
    """QueueAlign 0 of the legacy registers, and queue size 0: no queue is placed, nothing is divided."""
    mmio = VirtioMmio(upper(16), version=1, memory=memory())
    rows = {row.name: offset for offset, row in LEGACY_ROWS.items()}

    def put(name: str, value: int) -> None:
        mmio.write(rows[name], value.to_bytes(4, "little"))

    for size in (0, 16):
        put("Status", 0)
        put("GuestPageSize", PAGE)
        put("QueueSel", 0)
        put("QueueNum" if "QueueNum" in rows else "QueueSize", size)
        put("QueueAlign", align)
        put("QueuePFN", 4)
        put("Status", 7)
        mmio.loop.run_pending()
        slot = mmio.bank.slots[0]
        # An alignment that is none is not taken over: the queue is where the last good one puts it, or nowhere.
        assert not slot.enabled or (slot.device % PAGE == 0 and slot.size == 16)
    driver = Driver(MmioRegisters(MmioLoopback(mmio)), arena=spare(mmio.memory))
    honest(driver)


@pytest.mark.row("CVE-2026-50626")
@pytest.mark.parametrize("size", [128, 256, 1024, 32768, 0xFFFF])
def test_a_queue_larger_than_what_was_made_for_it(size: int) -> None:
    """A size above the queue's own is not taken over: all goes on with the 64 that there are."""
    world = World(upper(64))
    world.negotiate()
    world.set("queue_size", size)
    assert world.get("queue_size") == 64
    queue = world.queue(size=64)
    world.status(0xF)
    assert world.bank.queue(0).size == 64
    for _ in range(200):
        assert world.works(queue)
    assert world.rules()["BadQueueSize"] == 1


@pytest.mark.row("CVE-2024-4693")
def test_a_vector_that_was_taken_away(tmp_path: Path) -> None:
    """Chosen, then MSI-X is off, then a configuration change and a used buffer: no message, but the line."""
    world = World()
    world.msix(0, 1)
    world.negotiate()
    world.set("config_msix_vector", 1)
    world.set("queue_msix_vector", 0)
    queue = world.queue()
    world.status(0xF)
    world.run()
    world.control(enabled=False)
    world.device.config["count"] = 1
    world.run()
    world.post(queue)
    assert world.answer(queue) == b"HELLO"
    assert world.sink.messages == []
    assert True in world.sink.levels
    # The vectors of a device that was reset are none: what comes now is told to nobody.
    world.control(enabled=True)
    world.status(0)
    assert world.get("config_msix_vector") == NO_VECTOR
    world.device.config["count"] = 2
    world.run()
    assert world.sink.messages == []


# --- who may touch what, and when ----------------------------------------------------------------------------------


@pytest.mark.row("CVE-2024-3446", "qemu@df12999c", "B14")
@FORMATS
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_buffer_in_the_devices_own_registers(packed: bool, flags: int) -> None:
    """Where its BAR lies the device finds no memory: it cannot be made to kick or reset itself."""
    ram = memory()
    with reach(upper(), "pci", ram=ram) as target:
        driver = Attacker(target.registers, wanted=wanted(packed=packed), arena=spare(ram))
        driver.initialize()
        places = getattr(getattr(target.registers, "_access"), "_placed")  # noqa: B009 - no name of the public face
        assert places
        for address, size, io in places.values():
            if io:
                continue
            target.forget()
            driver.initialize()
            pen = driver.pen()
            pen.chain((address, min(size, 64), flags))
            pen.kick()
            broken(target, driver, "UnmappedAddress")
        target.forget()
        honest(driver)


@pytest.mark.row("CVE-2024-3446", "T15")
@FORMATS
def test_a_kick_out_of_the_handler_is_a_turn_of_its_own(packed: bool) -> None:
    depth: list[int] = []
    inside = 0

    def handler(request: bytes) -> bytes:
        nonlocal inside
        inside += 1
        depth.append(inside)
        for _ in range(3):
            driver.pen().kick()
        inside -= 1
        return request.upper()

    device = BaseDevice(45, handlers={0: handler}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    honest(driver)
    assert set(depth) == {1}


@pytest.mark.row("CVE-2026-50624", "D09")
@FORMATS
def test_entropy_that_arrives_after_the_reset(packed: bool) -> None:
    """The answer to a request of before the reset goes nowhere, and the memory may be another's by then."""
    device = BaseDevice(4, handlers={0: kept(lambda _: None)}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    request = driver.submit(0, [], [64])
    address = request.writable[0][0]
    driver.run()
    (chain,) = device.kept
    driver.initialize()
    driver.memory.fill(address, 64, 0x11)
    assert device.complete(chain, b"\x22" * 64) is False
    driver.run()
    assert driver.memory.read(address, 64) == b"\x11" * 64
    assert device.kept == []
    assert device.queue(0).in_flight == 0

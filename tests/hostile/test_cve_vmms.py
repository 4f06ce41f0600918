"""What has been found in other monitors, back-ends and libraries, done to us: each test is one finding, by its id."""

from __future__ import annotations

import struct
from typing import Any, Final, Literal, cast

import pytest
from virtio_test._core import (
    Chain,
    DeviceQueue,
    DriverQueue,
    GuestMemory,
    Policy,
    QueueConfig,
    RingLayout,
    Trace,
    need_event,
)
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.devices.base import BaseDevice, batched, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.errors import DeviceNeedsReset, QueueViolation, StaleMemory
from virtio_test.spec.pci import COMMON, NO_VECTOR
from virtio_test.transport.mmio import VirtioMmio

from tests.hostile.world import (
    BUFFER,
    FORMATS,
    INDIRECT,
    MIB,
    PAGE,
    TABLE,
    WRITE,
    Attacker,
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
from tests.unit.disks import NATIVE, disk
from tests.unit.pci_world import LIVE, World

END: Final = 4 * MIB


# --- addresses and lengths -----------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2019-18960", "CVE-2018-1059")
@FORMATS
@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(("address", "length"), [(END - 8, 9), (END - 1, 2), (END - PAGE, 2 * PAGE), (END, 1)])
def test_a_buffer_over_the_end_of_memory(packed: bool, flags: int, address: int, length: int) -> None:
    """Its first byte is there; every byte is looked up."""
    target, driver = attacker(packed=packed)
    driver.pen().chain((address, length, flags))
    driver.pen().kick()
    broken(target, driver, "UnmappedAddress")
    target.forget()
    honest(driver)


@pytest.mark.row("CVE-2020-10725", "CVE-2023-5158")
@FORMATS
@pytest.mark.parametrize("address", [0x9000_0000, 2**64 - 1, END, 0])
def test_the_address_of_no_bytes_is_not_used(packed: bool, address: int) -> None:
    """Between others, and alone: an empty buffer is passed over, in a number of steps that its chain bounds."""
    trace = Trace()
    target, driver = attacker(packed=packed, trace=trace)
    driver.memory.write(BUFFER, b"hello")
    pen = driver.pen()
    pen.chain((BUFFER, 5, 0), (address, 0, 0), (address, 0, WRITE), (BUFFER + 64, 5, WRITE))
    trace.clear()
    pen.kick()
    driver.run()
    assert len([each for each in trace.log() if each.kind != "fence"]) < 60
    assert target.found() == []
    assert driver.memory.read(BUFFER + 64, 5) == b"HELLO"
    honest(driver)


@pytest.mark.row("virtio-queue@0.8")
@FORMATS
def test_a_chain_of_more_than_4_gib(packed: bool) -> None:
    """17 descriptors of 256 MiB over the same memory."""
    target, driver = attacker(packed=packed, size=256 * MIB)
    driver.pen().chain(*[(0, 256 * MIB, 0)] * 16, (0, 1, 0))
    driver.pen().kick()
    broken(target, driver, "ChainTooBig")
    target.forget()
    honest(driver)


@pytest.mark.row("virtio-queue@0.7.1")
@FORMATS
@pytest.mark.parametrize("offset", [1, 8, 15, PAGE - 8])
def test_a_table_at_any_address_is_legal(packed: bool, offset: int) -> None:
    target, driver = attacker(packed=packed)
    driver.memory.write(BUFFER, b"hello")
    pen = driver.pen()
    length = pen.table(1, BUFFER, 5, 0, at=TABLE + offset)
    pen.chain((TABLE + offset, length, INDIRECT))
    pen.kick()
    driver.run()
    assert target.found() == []
    assert target.bank is not None
    assert target.bank.queue(0).counters.pushed == 1


@pytest.mark.row("openvmm#3990", "openvmm#4047")
@FORMATS
def test_addresses_that_wrap_and_a_list_that_fills_the_ring(packed: bool) -> None:
    target, driver = attacker(packed=packed, queue_size=8)
    for address, length in ((2**64 - 1, 1), (2**64 - 8, 16), (2**64 - 1, 0xFFFF_FFFF)):
        driver.pen().chain((address, length, 0))
        driver.pen().kick()
        broken(target, driver, "AddressWraps")
        target.forget()
        driver.initialize()
    # As long as the ring, three times round it: legal, and the next lap begins where it should.
    for _ in range(3):
        assert driver.submit(0, [b"a"] * 4, [1] * 4).wait() == b"AAAA"
        assert driver.submit(0, [b"b"] * 3, [3]).wait() == b"BBB"


@pytest.mark.row("CVE-2023-41051")
@pytest.mark.parametrize("short", [0, 1, 7])
def test_memory_of_a_program_that_gives_too_little(short: int) -> None:
    """Each answer is counted: one byte less than was asked for is a failed access, and nothing is made of it."""
    store = GuestMemory([(0, 0x10000)])
    cut = False

    def read(address: int, length: int) -> bytes:
        data = store.read(address, length)
        return data[:short] if cut and address >= 0x8000 else data

    remote = GuestMemory()
    remote.add_remote(0, 0x10000, read=read, write=store.write)
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000))
    driver, queue = DriverQueue(store, config), DeviceQueue(remote, config)
    store.write(0x8000, b"12345678")
    driver.add([(0x8000, 8)], [(0x9000, 8)])
    driver.publish()
    chain = queue.pop()
    assert chain is not None
    cut = True
    with pytest.raises(StaleMemory):
        chain.read()
    with pytest.raises(StaleMemory):
        chain.read_into(bytearray(8))
    cut = False
    assert chain.read() == b"12345678"


# --- rings ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("virtio-queue#196", "openvmm#4045", "openvmm#2986", "openvmm#4046", "openvmm#4048")
@pytest.mark.parametrize("idx", [9, 0x100, 0x8000, 0xFFFF])
def test_an_index_that_is_further_than_the_ring(idx: int) -> None:
    """One load of it, one error, and no turn of the loop more."""
    trace = Trace()
    target, driver = attacker(trace=trace, queue_size=8)
    pen = driver.pen()
    pen.put("avail.idx", idx)
    trace.clear()
    pen.kick()
    driver.run()
    assert len([each for each in trace.log() if each.kind == "load"]) <= 3
    broken(target, driver, "AvailIdxTooFar")
    for _ in range(10):
        pen.kick()
        assert driver.loop.run_pending() <= 1
    target.forget()
    honest(driver)


@pytest.mark.row("vm-memory#97", "T05")
@FORMATS
def test_an_index_is_one_load(packed: bool) -> None:
    """Two bytes at once, and only once: a driver that writes it meanwhile is seen before or after, never half."""
    trace = Trace()
    _, driver = attacker(packed=packed, trace=trace)
    layout = driver.queues[0].layout()
    honest(driver, initialize=False)
    at = {layout.at("desc.flags", slot) for slot in range(layout.size)} if packed else {layout.at("avail.idx")}
    loads = [each for each in trace.log() if each.kind in ("load", "read") and each.address < min(at) + 2]
    touching = [each for each in loads if any(each.address <= word < each.address + each.length for word in at)]
    assert touching
    assert {(each.kind, each.length) for each in touching if each.address in at} == {("load", 2)}


@pytest.mark.row("openvmm#2983")
@pytest.mark.parametrize("size", [1, 3, 5, 7, 127])
def test_a_packed_ring_of_an_odd_size_goes_round(size: int) -> None:
    _, driver = attacker(upper(128), packed=True, queue_size=size)
    assert driver.queues[0].size == size
    for number in range(3 * size):
        text = bytes([65 + number % 26])
        assert driver.submit(0, [text.lower()]).wait() == b""
        if size > 1:
            assert driver.submit(0, [text.lower()], [1]).wait() == text


@pytest.mark.row("openvmm#4145")
@pytest.mark.parametrize("packed", [False, True])
def test_a_malformed_ring_is_no_reason_to_look_again(packed: bool) -> None:
    """However often the queue is asked after its error, it has no work and reads nothing."""
    trace = Trace()
    target, driver = attacker(packed=packed, trace=trace)
    driver.pen().chain((0x9000_0000, 8, 0))
    driver.pen().kick()
    broken(target, driver, "UnmappedAddress")
    assert target.bank is not None
    queue = target.bank.queue(0)
    trace.clear()
    for _ in range(100):
        assert queue.pop() is None
        assert not queue.has_work()
        assert not queue.enable_kicks()
        assert target.device.kicked(0) is False
    assert trace.log() == []


@pytest.mark.row("CVE-2020-16843", "N06")
@FORMATS
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_buffer_that_comes_while_the_device_stops_to_listen(packed: bool, event_idx: bool) -> None:
    """At every access of the last look a driver makes one more available: it is served, or the driver is to kick."""
    features = (1 << 29) * event_idx | (1 << 34) * packed
    accesses = step = 0
    while step <= accesses:
        trace = Trace()
        ram = GuestMemory([(0, MIB)], trace=trace)
        config = QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000, packed=packed), features=features)
        driver, queue = DriverQueue(ram, config), DeviceQueue(ram, config)
        device = upper(8)
        Loopback(device)
        device.start_queue(queue)
        ram.write(BUFFER, b"hello")
        driver.add([(BUFFER, 5)], [(BUFFER + 64, 5)])
        driver.publish()
        driver.add([(BUFFER, 5)], [(BUFFER + 128, 5)])
        layout = config.layout()
        # One word shows the second: let the driver end write it, take it back, and give it at access `step`.
        shows = layout.at("desc.flags", 2) if packed else layout.at("avail.idx")
        before = ram.read(shows, 2)
        driver.publish()
        word = ram.read(shows, 2)
        ram.write(shows, before)
        trace.clear()
        trace.change_at(step, shows, word)
        more = device.kicked(0)
        accesses = len(trace.log())
        assert trace.missed == 0
        if accesses > step and not more and queue.counters.pushed == 1:
            assert wants_a_kick(ram, layout, event_idx=event_idx), f"lost at access {step}"
        if more:
            while device.kicked(0):
                pass
            assert queue.counters.pushed == 2
        step += 1
    assert step > 10


def wants_a_kick(ram: GuestMemory, layout: RingLayout, *, event_idx: bool) -> bool:
    """Whether a driver that makes a second buffer available must kick, by what stands in the ring."""

    def word(name: str) -> int:
        return int.from_bytes(ram.read(layout.at(name), 2), "little")

    if layout.packed:
        flags = word("device_event.flags")
        return flags == 0 or (flags == 2 and word("device_event.off_wrap") in (2 | 1 << 15, 3 | 1 << 15))
    return need_event(word("avail_event"), 2, 1) if event_idx else word("used.flags") == 0


# --- registers -----------------------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2026-5747", "Q05")
@FORMATS
@pytest.mark.parametrize("size", [32768, 0, 64, 8])
def test_a_queue_is_frozen_while_it_is_enabled(packed: bool, size: int) -> None:
    """Enabled with 16, then larger, then 0, then elsewhere: nothing is taken over, and no byte outside written."""
    world = World(upper(16))
    queue = world.live() if not packed else packed_queue(world)
    for name, value in (
        ("queue_size", size),
        ("queue_desc", 0x9_0000),
        ("queue_device", 0xF_F000),
        ("queue_enable", 0),
    ):
        world.set("queue_select", 0)
        world.set(name, value)
    before = world.memory.read(0x8_0000, 0x8_0000)
    for _ in range(40):
        assert world.works(queue)
    assert world.memory.read(0x8_0000, 0x8_0000) == before
    assert world.bank.queue(0).size == 16
    assert world.rules()["EnabledQueueWritten"] >= 3


def packed_queue(world: World) -> DriverQueue:
    accepted = world.bank.offered
    world.status(0)
    world.status(1)
    world.status(3)
    world.features(accepted)
    world.status(11)
    queue = world.queue()
    world.status(LIVE)
    world.run()
    return queue


@pytest.mark.row("firecracker#5353", "cloud-hypervisor@3b431afba", "X02")
@pytest.mark.parametrize("vector", [2, 3, 64, 0x7FF, 0x800, 0x8000, 0xFFFE])
def test_a_vector_beyond_the_table(vector: int) -> None:
    world = World(upper(16), vectors=2)
    world.msix(0, 1)
    for name in ("config_msix_vector", "queue_msix_vector"):
        world.set(name, vector)
        assert world.get(name) == NO_VECTOR
    queue = world.live()
    assert world.works(queue)
    assert world.sink.messages == []
    assert world.rules()["BadVector"] == 2


@pytest.mark.row("cloud-hypervisor@082fdc4d0", "Q12")
@pytest.mark.parametrize("select", [1, 2, 64, 0x8000, 0xFFFF])
def test_a_selected_queue_that_is_not_there(select: int) -> None:
    world = World(upper(16))
    world.negotiate()
    world.set("queue_select", select)
    for name, place in COMMON.items():
        if name.startswith("queue_") and name != "queue_select":
            world.set(name, (1 << 8 * place.size) - 1)
            # No queue has no vector; all else reads as nothing.
            assert world.get(name) == (NO_VECTOR if name == "queue_msix_vector" else 0)
    queue = world.queue()
    world.status(LIVE)
    world.run()
    assert world.works(queue)


@pytest.mark.row("cloud-hypervisor@22eeb3f80", "cloud-hypervisor@2d2931a76", "D11")
@pytest.mark.parametrize("way", ["loopback", "pci", "mmio 2"])
def test_a_queue_that_cannot_be_is_heard_of(way: Way) -> None:
    """The driver that set it up finds NEEDS_RESET, instead of a device that does nothing."""
    ram = memory()
    with reach(upper(), way, ram=ram) as target:
        driver = Attacker(target.registers, arena=spare(ram))
        enable = target.registers.enable_queue
        target.registers.enable_queue = lambda config: enable(
            QueueConfig(config.size, desc=0x9000_0000, driver=config.driver, device=config.device)
        )
        with pytest.raises(DeviceNeedsReset):
            driver.initialize()
        assert target.found() == ["RingUnmapped"]
        target.registers.enable_queue = enable
        target.forget()
        honest(driver)


@pytest.mark.row("cloud-hypervisor@cfec13077", "X05")
@pytest.mark.parametrize("bar", [0, 1, 4, 5, 6, 255])
def test_a_window_beyond_every_structure(bar: int) -> None:
    world = World(upper(16))
    queue = world.live()
    at = world.capability("pci_cfg")
    for offset in (0, 0x3C, 0x40, 0xFFC, 0x1000, 0x7FFF_FFFC, 0xFFFF_FFFC):
        for length in (1, 2, 4, 3, 8, 0, 0xFFFF_FFFF):
            world.set_config(at + 4, 1, bar)
            world.set_config(at + 8, 4, offset)
            world.set_config(at + 12, 4, length)
            assert world.config(at + 16, 4) >= 0
    assert world.works(queue)


@pytest.mark.row("cloud-hypervisor@fe6bcd037", "D08")
def test_a_reset_leaves_nothing_of_before() -> None:
    world = World(upper(16))
    fresh = {name: world.get(name) for name in COMMON}
    world.msix(0, 1)
    world.live()
    for name, value in (("config_msix_vector", 1), ("queue_msix_vector", 1), ("queue_select", 1), ("queue_size", 4)):
        world.set(name, value)
    world.status(0)
    for name in ("queue_select", "device_feature_select", "driver_feature_select"):
        world.set(name, 0)
    after = {name: world.get(name) for name in COMMON}
    assert after == fresh


@pytest.mark.row("mvm#1860", "virtio-queue@0.4")
@pytest.mark.parametrize("size", [0, 65536, 65536 + 8, 0x1_0000_0000 >> 1, 0xFFFF_0000])
@pytest.mark.parametrize("way", ["mmio 1", "mmio 2"])
def test_a_size_that_would_be_cut_to_16_bits(way: Way, size: int) -> None:
    ram = memory()
    with reach(upper(8), way, ram=ram) as target:
        driver = Driver(target.registers, arena=spare(ram))
        honest(driver)
        registers = cast("Any", target.registers)
        registers.write("Status", 0)
        registers.write("QueueSel", 0)
        registers.write("QueueSize", size)
        assert target.bank is not None
        assert target.bank.slots[0].size == 8
        assert target.bank.ignored["BadQueueSize"] == 1
        honest(driver)


@pytest.mark.row("openvmm#3934", "X09")
@pytest.mark.parametrize("version", [1, 2])
def test_a_configuration_space_that_is_not_there(version: Literal[1, 2]) -> None:
    """Every byte where it would be is written to and read, and beyond: nothing is there, and the device serves."""
    mmio = VirtioMmio(upper(8), version=version, memory=memory())
    driver = Driver(MmioRegisters(MmioLoopback(mmio)), arena=spare(mmio.memory))
    driver.initialize()
    for offset in range(0x100, 0x1000, 4):
        for length in (1, 2, 4, 8):
            if offset + length <= 0x1000:
                mmio.write(offset, b"\xff" * length)
                assert mmio.read(offset, length) == bytes(length)
    assert mmio.bank.ignored["ConfigOutOfRange"] > 0
    honest(driver, initialize=False)
    world = World(upper(8))
    queue = world.live()
    assert world.layout.config is None
    assert world.works(queue)


@pytest.mark.row("openvmm#4049", "openvmm#4226", "D12")
@pytest.mark.parametrize("way", ["loopback", "mmio 1", "mmio 2", "pci", "transitional"])
def test_no_configuration_change_comes_with_driver_ok(way: Way) -> None:
    ram = memory()
    with reach(upper(8), way, ram=ram) as target:
        driver = Attacker(target.registers, arena=spare(ram))
        for _ in range(3):
            honest(driver)
        assert driver.told == 0


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.row("CVE-2026-45782", "T11", "D09")
@FORMATS
@pytest.mark.parametrize("end", ["reset", "queue reset", "broken", "detached"])
def test_a_completion_for_a_queue_that_has_gone(packed: bool, end: str) -> None:
    """A request is taken, and answered when its queue, its device or its bus is no more: nothing is written."""
    taken: list[Chain] = []
    device = BaseDevice(2, handlers={0: kept(taken.append)}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed)
    request = driver.submit(0, [b"read"], [64])
    address = request.writable[0][0]
    driver.run()
    driver.memory.fill(address, 64, 0x11)
    queue = device.queue(0)
    if end == "reset":
        driver.reset()
    elif end == "queue reset":
        driver.reset_queue(0)
    elif end == "broken":
        driver.pen().chain((0x9000_0000, 1, 0), at=2, available=2)
        if packed:
            driver.pen().chain((0x9000_0000, 1, 0), at=2)
        queue.latch(QueueViolation("DeviceBroken", "2.1.2", "the device is broken", queue=0))
    else:
        device.detach()
    assert device.complete(taken[0], b"\x22" * 64) is False
    assert driver.memory.read(address, 64) == b"\x11" * 64
    if end != "detached":
        driver.initialize()
        assert device.queue(0).in_flight == 0


@pytest.mark.row("CVE-2020-14374", "CVE-2020-14375", "CVE-2020-14376", "CVE-2020-14377", "CVE-2020-14378", "T08")
@FORMATS
@pytest.mark.parametrize("way", ["request", "batch", "chain"])
def test_a_request_that_changes_after_it_was_checked(packed: bool, way: str) -> None:
    """The handler's bytes are its own: each byte of the buffer is read once, whatever becomes of it meanwhile."""
    seen: list[tuple[bytes, bytes]] = []
    where = 0

    def look(request: bytes) -> None:
        first = bytes(request)
        driver.memory.write(where, b"changed!")
        seen.append((first, bytes(request)))

    def batch(requests: memoryview, responses: memoryview) -> None:
        first = bytes(requests)
        driver.memory.write(where, b"changed!")
        seen.append((first, bytes(requests)))

    def chain(each: Chain) -> None:
        look(each.read())
        device.complete(each, b"")

    handlers: dict[str, Any] = {
        "request": look,
        "batch": batched(batch, request_size=8, response_size=0),
        "chain": kept(chain),
    }
    trace = Trace()
    device = BaseDevice(20, handlers={0: handlers[way]}, queue_sizes=(8,))
    _, driver = attacker(device, packed=packed, trace=trace)
    request = driver.submit(0, [b"original"], publish=False)
    where = request.readable[0][0]
    trace.clear()
    driver.flush(0)
    request.wait()
    assert seen == [(b"original", b"original")]
    reads = [each for each in trace.log() if each.kind == "read" and where <= each.address < where + 8]
    assert sum(each.length for each in reads) == 8


@pytest.mark.row("CVE-2022-2132", "vmd-2021")
@FORMATS
@pytest.mark.parametrize("cut", [1, 4, 8, 15])
@NATIVE
def test_a_header_over_many_descriptors(packed: bool, cut: int, *, native: bool) -> None:
    """However it is cut it is read as one; and one that is too short is answered, not filled up from what follows."""
    device = disk(b"s" * 4096, native=native)
    _, driver = attacker(device, packed=packed)
    header = struct.pack("<IIQ", 0, 0, 1)
    pieces = [header[at : at + cut] for at in range(0, 16, cut)]
    assert driver.submit(0, pieces, [512, 1]).wait() == b"s" * 512 + b"\0"
    short = driver.submit(0, [header[:cut]], [512, 1]).wait()
    assert short[-1:] != b"\0"
    assert b"s" not in short
    honest = BlkDriver(driver.registers, arena=spare(driver.memory))
    honest.initialize()
    assert honest.read(0, 1) == b"s" * 512


@pytest.mark.row("vmd-2021")
@FORMATS
def test_a_length_of_the_drivers_fills_no_object_of_ours(packed: bool) -> None:
    """A request that is longer than any object it is read into: what is asked for is what is read."""

    def take(chain: Chain) -> None:
        target = bytearray(b"\xee" * 24)
        assert chain.readable == MIB
        assert chain.read_into(memoryview(target)[:8]) == 8
        assert target == b"x" * 8 + b"\xee" * 16
        assert len(chain.read(16)) == 16
        device.complete(chain, b"ok")

    device = BaseDevice(1, handlers={0: kept(take)}, queue_sizes=(8,))
    ram = memory(8 * MIB)
    driver = Attacker(Loopback(device, memory=ram), wanted=wanted(packed=packed), arena=spare(ram))
    driver.initialize()
    assert driver.submit(0, [b"x" * MIB], [2]).wait() == b"ok"


def test_the_policy_in_force_is_that_of_what_is_served() -> None:
    """All of the above is done to what serves by default."""
    target, _ = attacker()
    assert target.bank is not None
    assert target.bank.policy == Policy.interop

"""The block device: what it shows, when a write is stable, what a host in trouble does to it, its images, its state."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from virtio_test._core import Chain, GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.image import FileImage, Image, RamImage
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.errors import InvalidArgument, RequestFailed, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import (
    CONFIG_FIELDS,
    FEATURE_NAMES,
    FIELD_FEATURES,
    FLUSH_OUT,
    HEADER,
    RequestStatus,
    RequestType,
)
from virtio_test.spec.ids import DeviceId

from .class_world import RINGS, WAYS, indirect, reach

SIZE = 1 << 20


def pattern(size: int = SIZE) -> bytearray:
    return bytearray(b"".join(number.to_bytes(4, "little") for number in range(size // 4)))


def bits(*names: str) -> FeatureSet:
    return FeatureSet(*names, device=FEATURE_NAMES) | RING_FEATURES


class Recording(RamImage):
    """An image that writes down what is asked of it, and fails when it is told to."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(pattern(size))
        self.log: list[str] = []
        self.fails: dict[str, Exception] = {}

    def note(self, what: str) -> None:
        self.log.append(what)
        if what in self.fails:
            raise self.fails[what]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.note("read")
        super().read_into(buffer, offset)

    def write(self, data: memoryview, offset: int) -> None:
        self.note("write")
        super().write(data, offset)

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        self.note("unmap" if unmap else "zero")
        super().zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.note("discard")
        super().zero(offset, length, unmap=True)

    def sync(self) -> None:
        self.note("sync")


def live(device: BlkDevice, *, wanted: FeatureSet | None = None, way: str = "split") -> BlkDriver:
    driver = BlkDriver(reach(device, way), wanted=wanted, indirect=indirect(way))
    driver.initialize()
    return driver


# --- what it shows -----------------------------------------------------------------------------------------


def test_the_configuration_space_is_that_of_5_2_4() -> None:
    offsets = {"capacity": 0, "seg_max": 12, "blk_size": 20, "opt_io_size": 28, "writeback": 32, "num_queues": 34}
    offsets |= {"max_discard_sectors": 36, "max_write_zeroes_sectors": 48, "max_secure_erase_sectors": 60, "model": 92}
    device = BlkDevice(bytearray(SIZE))
    layout = device.config.layout
    assert {name: layout[name].offset for name in offsets} == offsets
    assert layout.size == 96
    assert [each.name for each in layout if each.driver_writable] == ["writeback"]
    assert set(FIELD_FEATURES) <= {each[0] for each in CONFIG_FIELDS}


def test_the_usual_offer() -> None:
    device = BlkDevice(bytearray(SIZE))
    assert device.device_id == DeviceId.BLOCK
    usual = ("SEG_MAX", "BLK_SIZE", "FLUSH", "TOPOLOGY", "CONFIG_WCE", "DISCARD", "WRITE_ZEROES")
    assert device.features == bits(*usual)
    assert "IN_ORDER" in device.features
    assert (device.config.capacity, device.config.seg_max, device.config.num_queues) == (SIZE // 512, 126, 0)
    reduced = BlkDevice(bytearray(SIZE), flush=False, discard=False, write_zeroes=False)
    assert reduced.features == bits("SEG_MAX", "BLK_SIZE", "TOPOLOGY")


def test_everything_that_can_be_said() -> None:
    device = BlkDevice(
        bytearray(SIZE),
        block_size=4096,
        num_queues=3,
        queue_size=64,
        serial="twenty bytes of text",
        size_max=8192,
        seg_max=5,
        geometry=(100, 16, 63),
        physical_block_exp=1,
        alignment_offset=2,
        min_io_size=8,
        opt_io_size=256,
        lifetime=(1, 5, 11),
    )
    driver = live(device)
    assert driver.features == device.features
    assert (driver.capacity, driver.block_size, driver.num_queues, driver.geometry) == (2048, 4096, 3, (100, 16, 63))
    names = ("size_max", "seg_max", "physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size")
    assert [driver.field(name) for name in names] == [8192, 5, 1, 2, 8, 256]
    assert driver.field("discard_sector_alignment") == 8
    assert driver.field("write_zeroes_may_unmap") == 1
    assert driver.identify() == "twenty bytes of text"
    assert tuple(driver.get_lifetime()) == (1, 5, 11)
    assert list(device.queue_sizes) == [64, 64, 64]


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 511},
        {"block_size": 1536},
        {"block_size": 65536},
        {"num_queues": 0},
        {"num_queues": 65536},
        {"serial": "x" * 21},
        {"serial": "größe"},
        {"lifetime": (4, 0, 0)},
        {"lifetime": (0, 0, 12)},
        {"lifetime": (0, -1, 0)},
        {"size_max": 2**32},
        {"geometry": (0, 256, 0)},
        {"queue_size": 0},
        {"image": bytearray(513)},
        {"image": "/nowhere/at/all"},
    ],
)
def test_what_cannot_be_is_refused(wrong: Mapping[str, Any]) -> None:
    options: dict[str, Any] = {"image": bytearray(SIZE), **wrong}
    with pytest.raises(InvalidArgument):
        BlkDevice(**options)


# --- requests ----------------------------------------------------------------------------------------------


@WAYS
def test_every_request(way: str) -> None:
    image = pattern()
    device = BlkDevice(image, num_queues=2)
    driver = live(device, way=way, wanted=FeatureSet(*FEATURE_NAMES, device=FEATURE_NAMES) | RINGS[way])
    assert driver.identify() == "virtio-test"
    assert driver.read(0, SIZE // 512) == image
    assert driver.read(3, 0) == b""
    driver.write(7, b"\xab" * 512 * 1000)
    assert image[7 * 512 : 1007 * 512] == b"\xab" * 512 * 1000
    driver.write(5, b"\xcd" * 512, queue=1)
    assert driver.read(4, 3, queue=1) == pattern()[4 * 512 : 5 * 512] + b"\xcd" * 512 + pattern()[6 * 512 : 7 * 512]
    driver.discard(100, 10)
    driver.write_zeroes(200, 20)
    driver.write_zeroes(300, 30, unmap=True)
    driver.submit_write_zeroes([(400, 1), (402, 1)]).wait()
    for first, count in ((100, 10), (200, 20), (300, 30), (400, 1), (402, 1)):
        assert driver.read(first, count) == bytes(count * 512)
    assert driver.read(401, 1) == b"\xab" * 512
    driver.flush_cache()
    assert device.counters.ioerr == device.counters.unsupp == device.counters.no_status == 0


@WAYS
def test_many_in_flight_over_several_queues(way: str) -> None:
    image = pattern()
    driver = live(BlkDevice(image, num_queues=4), way=way)
    reads = [driver.submit_read(number, 1, queue=number % 4, publish=False) for number in range(128)]
    for queue in range(4):
        driver.flush(queue)
    assert [request.wait() for request in reads] == [bytes(image[at : at + 512]) for at in range(0, 128 * 512, 512)]


def test_a_read_only_device_writes_nothing() -> None:
    image = pattern()
    device = BlkDevice(image, read_only=True)
    driver = live(device)
    assert driver.read_only
    assert not {"DISCARD", "WRITE_ZEROES"} & set(driver.features)
    with pytest.raises(RequestFailed, match="OUT at sector 0 was answered IOERR"):
        driver.write(0, bytes(512))
    for kind, status in ((RequestType.DISCARD, RequestStatus.UNSUPP), (RequestType.WRITE_ZEROES, RequestStatus.UNSUPP)):
        request = driver.submit_request(kind, 0, bytes(8) + b"\1" + bytes(7))
        with pytest.raises(RequestFailed):
            request.wait()
        assert request.status == status
    assert driver.read(0, 2) == image[:1024]
    # RO holds whether it was accepted or not.
    blind = live(BlkDevice(image, read_only=True), wanted=RING_FEATURES)
    with pytest.raises(RequestFailed):
        blind.write(0, bytes(512))
    assert image == pattern()


@pytest.mark.parametrize("kind", [RequestType.DISCARD, RequestType.WRITE_ZEROES, RequestType.GET_LIFETIME])
def test_what_was_not_negotiated_is_unsupported(kind: RequestType) -> None:
    image = pattern()
    driver = live(BlkDevice(image, lifetime=(1, 1, 1)), wanted=RING_FEATURES)
    request = driver.submit_request(kind, 0, bytes(8) + b"\1" + bytes(7), 6)
    with pytest.raises(RequestFailed):
        request.wait()
    assert request.status == RequestStatus.UNSUPP
    assert image == pattern()


def test_flush_out_is_a_legacy_word() -> None:
    modern = live(BlkDevice(bytearray(SIZE))).submit_request(FLUSH_OUT, 0)
    with pytest.raises(RequestFailed):
        modern.wait()
    assert modern.status == RequestStatus.UNSUPP
    legacy = live(BlkDevice(bytearray(SIZE)), way="legacy")
    assert isinstance(legacy.registers, MmioRegisters)
    assert legacy.registers.legacy
    assert legacy.submit_request(FLUSH_OUT, 0).wait() == b""


def test_a_large_request_is_copied_in_pieces() -> None:
    image = Recording(4 << 20)
    device = BlkDevice(image)
    driver = BlkDriver(Loopback(device, memory=GuestMemory([(0, 32 << 20)])), max_transfer=4 << 20)
    driver.initialize()
    assert driver.submit_read(0, 8192).wait() == image.data
    assert image.log == ["read"] * 16
    driver.submit_write(0, bytes(4 << 20)).wait()
    assert image.data == bytes(4 << 20)
    assert device.counters.read == device.counters.written == 4 << 20


def test_no_room_for_a_status_is_no_answer() -> None:
    image = pattern()
    device = BlkDevice(image)
    driver = live(device)
    assert driver.submit(0, [HEADER.pack(RequestType.OUT, 0, 0), b"\xff" * 512]).wait() == b""
    assert device.counters.no_status == 1
    assert image == pattern()
    assert driver.identify() == "virtio-test"


# --- stable writes (5.2.6.2) -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "through"),
    [((), True), (("FLUSH",), False), (("CONFIG_WCE",), True), (("FLUSH", "CONFIG_WCE"), False)],
)
def test_when_a_write_is_stable(names: tuple[str, ...], through: bool) -> None:
    image = Recording()
    driver = live(BlkDevice(image), wanted=bits(*names, "WRITE_ZEROES"))
    driver.write(0, bytes(512))
    driver.write_zeroes(1, 1)
    assert image.log == (["write", "sync", "zero", "sync"] if through else ["write", "zero"])


def test_the_driver_chooses_the_cache_mode() -> None:
    image = Recording()
    driver = live(BlkDevice(image))
    assert driver.writeback
    driver.write(0, bytes(512))
    driver.writeback = False
    driver.write(0, bytes(512))
    driver.write_field("writeback", 7)
    assert driver.field("writeback") == 1
    driver.write(0, bytes(512))
    driver.flush_cache()
    assert image.log == ["write", "write", "sync", "write", "sync"]
    driver.writeback = False
    driver.initialize()
    assert driver.writeback


def test_without_config_wce_the_field_is_what_follows() -> None:
    image = Recording()
    driver = live(BlkDevice(image), wanted=bits("FLUSH"))
    driver.registers.write_config(32, b"\0")
    assert driver.registers.read_config(32, 1) == b"\1"
    driver.write(0, bytes(512))
    assert image.log == ["write"]


def test_write_through_from_the_start() -> None:
    image = Recording()
    driver = live(BlkDevice(image, write_cache=False))
    assert not driver.writeback
    driver.write(0, bytes(512))
    assert image.log == ["write", "sync"]


def test_a_legacy_driver_may_flush_what_it_did_not_negotiate() -> None:
    image = Recording()
    driver = live(BlkDevice(image), way="legacy", wanted=FeatureSet())
    assert driver.submit_request(RequestType.FLUSH, 0).wait() == b""
    without = live(BlkDevice(image, flush=False)).submit_request(RequestType.FLUSH, 0)
    with pytest.raises(RequestFailed, match="UNSUPP"):
        without.wait()
    assert image.log == ["sync"]


# --- a host in trouble -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["read", "write", "zero", "unmap", "discard", "sync"])
def test_trouble_of_the_host_is_an_error_of_one_request(what: str, caplog: pytest.LogCaptureFixture) -> None:
    image = Recording()
    image.fails[what] = OSError(errno.ENOSPC, "no space left on device")
    device = BlkDevice(image)
    driver = live(device)
    send = {
        "read": lambda: driver.read(0, 1),
        "write": lambda: driver.write(0, bytes(512)),
        "zero": lambda: driver.write_zeroes(0, 1),
        "unmap": lambda: driver.write_zeroes(0, 1, unmap=True),
        "discard": lambda: driver.discard(0, 1),
        "sync": driver.flush_cache,
    }[what]
    for _ in range(5):
        with pytest.raises(RequestFailed, match="IOERR"):
            send()
    assert device.counters.host_errors == 5
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert "no space left" in caplog.text
    image.fails.clear()
    send()
    assert device.handler_errors == 0


def test_half_a_read_shows_neither_half_nor_old_memory() -> None:
    class Half(Recording):
        def read_into(self, buffer: memoryview, offset: int) -> None:
            if offset:
                raise OSError(errno.EIO, "bad sector")
            super().read_into(buffer, offset)

    device = BlkDevice(Half())
    driver = live(device)
    request = driver.submit(0, [HEADER.pack(RequestType.IN, 0, 0)], [1 << 19, 1], publish=False)
    driver.memory.write(request.writable[0][0], b"\xee" * (1 << 19))
    driver.flush(0)
    answer = request.wait()
    assert answer == bytes(1 << 19) + b"\1"


def test_an_image_that_raises_anything_else_breaks_the_device() -> None:
    image = Recording()
    image.fails["read"] = RuntimeError("a bug")
    registers = Loopback(BlkDevice(image))
    driver = BlkDriver(registers)
    driver.initialize()
    request = driver.submit_read(0, 1)
    registers.loop.run_pending()
    assert request.done
    assert "a bug" in str(registers.errors[0])


def test_memory_that_goes_away_leaves_a_status_where_it_can() -> None:
    memory = GuestMemory([(0, 1 << 20), (1 << 20, 1 << 16)])
    image = pattern()
    device = BlkDevice(image)
    driver = BlkDriver(Loopback(device, memory=memory))
    driver.initialize()
    # The data lies in a region that vanishes between the look at the chain and the copy.

    class Vanishing(RamImage):
        def read_into(self, buffer: memoryview, offset: int) -> None:
            super().read_into(buffer, offset)
            memory.remove_region(1 << 20, 1 << 16)

    device.image = Vanishing(image)
    header = driver.arena.allocate(16)
    status = driver.arena.allocate(1)
    memory.write(header, HEADER.pack(RequestType.IN, 0, 0))
    memory.write(status, b"\0")
    driver.queues[0].add([(header, 16)], [(1 << 20, 512), (status, 1)])
    queue = driver.queues[0]
    queue.disable_calls()
    queue.signal()
    # The driver must not look: this chain is none of its requests.
    driver.registers.listen(call=lambda _: None, config_changed=lambda: None)
    driver.loop.run_pending()
    used = queue.get_used()
    assert used is not None
    assert used[1] == 0
    assert memory.read(status, 1) == b"\1"
    assert device.counters.ioerr == 1


# --- images ------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(pattern())
    return file


@pytest.mark.parametrize("by", ["path", "text", "fd"])
def test_a_file(path: Path, by: str) -> None:
    fd = os.open(path, os.O_RDWR)
    device = BlkDevice({"path": path, "text": str(path), "fd": fd}[by])
    os.close(fd)
    driver = live(device)
    assert driver.read(0, SIZE // 512) == pattern()
    driver.write(2, b"\x99" * 1024)
    driver.flush_cache()
    assert path.read_bytes() == pattern()[:1024] + b"\x99" * 1024 + pattern()[2048:]
    driver.write_zeroes(0, 8)
    driver.write_zeroes(16, 8, unmap=True)
    assert path.read_bytes()[:4096] == path.read_bytes()[8192:12288] == bytes(4096)
    device.close()
    device.close()


def test_a_hole_takes_no_place(path: Path) -> None:
    file = FileImage(path)
    before = path.stat().st_blocks
    file.discard(0, SIZE)
    assert path.stat().st_blocks < before
    assert path.read_bytes() == bytes(SIZE)
    assert (file.size, isinstance(file, Image), isinstance(RamImage(512), Image)) == (SIZE, True, True)


def test_a_host_without_holes_writes_zeros(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        asked = 0

        def fallocate64(self, *_: object) -> int:
            self.asked += 1
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    libc = Libc()
    monkeypatch.setattr("virtio_test.devices.image.ctypes.CDLL", lambda *_, **_k: libc)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    file = FileImage(path)
    file.zero(0, 4096, unmap=True)
    assert path.read_bytes()[:4096] == bytes(4096)
    file.discard(8192, 4096)
    assert path.read_bytes()[8192:12288] == pattern()[8192:12288]
    assert libc.asked == 1


def test_a_file_opened_for_reading_is_not_written_to(path: Path) -> None:
    driver = live(BlkDevice(path, read_only=True))
    with pytest.raises(RequestFailed):
        driver.write(0, bytes(512))
    image = FileImage(path, read_only=True)
    device = BlkDevice(image)
    with pytest.raises(RequestFailed, match="IOERR"):
        live(device).write(0, bytes(512))
    assert device.counters.host_errors == 1
    assert path.read_bytes() == pattern()


def test_a_file_that_becomes_shorter(path: Path) -> None:
    device = BlkDevice(path)
    driver = live(device)
    with path.open("r+b") as file:
        file.truncate(SIZE // 2)
    with pytest.raises(RequestFailed, match="IOERR"):
        driver.read(0, SIZE // 512)
    assert driver.capacity == SIZE // 512
    assert device.refresh_capacity() == SIZE // 1024
    driver.loop.run_pending()
    assert driver.capacity == SIZE // 1024
    with pytest.raises(InvalidArgument):
        driver.read(0, SIZE // 512)


def test_memory_that_becomes_shorter() -> None:
    data = pattern()
    device = BlkDevice(data)
    driver = live(device)
    del data[SIZE // 2 :]
    with pytest.raises(RequestFailed):
        driver.write(SIZE // 512 - 1, bytes(512))
    with pytest.raises(RequestFailed):
        driver.write_zeroes(SIZE // 512 - 1, 1)
    assert len(data) == SIZE // 2
    assert device.refresh_capacity() == SIZE // 1024


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_image(tmp_path: Path, kind: str) -> None:
    read, write = os.pipe()
    with pytest.raises(InvalidArgument):
        FileImage(read if kind == "pipe" else tmp_path)
    os.close(read)
    os.close(write)


# --- saved state -------------------------------------------------------------------------------------------


def test_state_goes_round_with_requests_in_flight() -> None:
    image = pattern()
    registers = Loopback(BlkDevice(image))
    driver = BlkDriver(registers)
    driver.initialize()
    driver.writeback = False
    registers.queue(0).stop()
    request = driver.submit_read(3, 1)
    registers.queue(0).resume()
    state = json.loads(json.dumps(registers.save()))
    other = Recording()
    registers.restore(state, device=BlkDevice(other))
    assert request.wait() == image[3 * 512 : 4 * 512]
    assert not driver.writeback
    driver.write(0, bytes(512))
    assert other.log == ["read", "write", "sync"]


@pytest.mark.parametrize(
    "change", [{"capacity": 1}, {"writeback": 2}, {"seg_max": 7}, {"num_queues": 2}, {"unused0": 1}]
)
def test_a_state_of_another_disk_is_refused(change: dict[str, int]) -> None:
    device = BlkDevice(bytearray(SIZE))
    state: Any = json.loads(json.dumps(device.save()))
    state["config"]["values"].update(change)
    before = device.save()
    with pytest.raises(SavedStateError):
        device.restore(state)
    assert device.save() == before


def test_a_handler_gets_chains_one_by_one_and_stops_at_its_bound() -> None:
    class Slow(BlkDevice):
        seen = 0

        def answer(self, chain: Chain) -> int:
            self.seen += 1
            return super().answer(chain)

    device = Slow(bytearray(SIZE), queue_size=1024)
    registers = Loopback(device)
    driver = BlkDriver(registers)
    driver.initialize()
    for _ in range(300):
        driver.submit_request(RequestType.GET_ID, 0, b"", 20, publish=False)
    driver.flush(0)
    assert registers.loop.run(until=lambda: device.seen > 0)
    assert device.seen == 256  # one turn: what is left waits for the next
    registers.loop.run_pending()
    assert device.seen == 300


@pytest.mark.parametrize(("what", "first"), [("zeroes", 1), ("discard", 1), ("flush", 1), ("nothing", 16)])
def test_small_requests_that_are_much_work_leave_the_loop_to_others(what: str, first: int) -> None:
    device = BlkDevice(RamImage(4 << 20))
    driver = live(device)
    whole = [(0, 8192)]
    submits = {
        "zeroes": lambda: driver.submit_write_zeroes(whole),
        "discard": lambda: driver.submit_discard(whole),
        "nothing": lambda: driver.submit_discard([(0, 0)] * 64),
        "flush": driver.submit_flush,
    }
    requests = [submits[what]() for _ in range(20)]
    # One turn after the other, as the loop does it.
    done = [0]
    while device.kicked(0):
        done.append(device.counters.ok)
    assert done[:2] == [0, first]
    assert device.counters.ok == 20
    assert [request.wait() for request in requests] == [b""] * 20

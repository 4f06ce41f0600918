"""Our driver on QEMU's block device behind vhost-user: qemu-storage-daemon, with no QEMU and no guest around it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
from virtio_test.cli.drive import drive
from virtio_test.driver.blk import BlkDriver
from virtio_test.errors import MessageError, PeerDisconnected, PeerError, PeerTimeout, RequestFailed
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import SECTOR
from virtio_test.spec.ids import DeviceId
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import Config, VringState
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from tests.combinations import record
from tests.kernel.cache import BuildError
from tests.peers.daemon import Daemon

F = ProtocolFeature


@pytest.fixture
def daemon() -> Generator[Callable[..., Daemon]]:
    """Starts daemons; the arguments are those of `Daemon`."""
    with ExitStack() as stack:

        def start(**options: object) -> Daemon:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtio-test-")))
            try:
                return stack.enter_context(Daemon(folder, **options))  # pyright: ignore[reportArgumentType]
            except BuildError as error:
                pytest.fail(str(error), pytrace=False)

        yield start


@pytest.fixture
def drives() -> Generator[Callable[..., BlkDriver]]:
    """Brings drivers up; options are those of the registers, and `indirect`."""
    with ExitStack() as stack:

        def connect(daemon: Daemon, *, indirect: bool = False, timeout: float = 20.0, **options: object) -> BlkDriver:
            registers = VhostUserRegisters(
                daemon.path,
                device_id=DeviceId.BLOCK,
                timeout=timeout,
                **options,  # pyright: ignore[reportArgumentType]
            )
            stack.callback(registers.close)
            driver = BlkDriver(registers, indirect=indirect, timeout=timeout)
            driver.initialize()
            return driver

        yield connect


def registers_of(driver: BlkDriver) -> VhostUserRegisters:
    assert isinstance(driver.registers, VhostUserRegisters)
    return driver.registers


def ran(driver: BlkDriver, what: str) -> None:
    ring = "packed" if "RING_PACKED" in driver.features else "split"
    record(
        device=f"blk, {what}",
        transport="vhost-user",
        carrier="vhost-user",
        ring=f"{ring}, indirect" if driver.indirect else ring,
        peer=f"qemu-storage-daemon {Daemon.version()}",
    )


def test_what_it_offers(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    driver = drives(daemon())
    registers = registers_of(driver)
    assert {"INDIRECT_DESC", "EVENT_IDX", "VERSION_1", "FLUSH", "MQ", "DISCARD", "WRITE_ZEROES"} <= set(driver.features)
    assert F.MQ | F.REPLY_ACK | F.BACKEND_REQ | F.CONFIG | F.CONFIGURE_MEM_SLOTS in registers.protocol
    # QEMU 11.1 has neither a packed ring nor a record of what is in flight here; whichever has them, uses them.
    assert ("RING_PACKED" in driver.features) == ("RING_PACKED" in FeatureSet.from_bits(registers.device_features()))
    assert (registers.inflight is None) == (F.INFLIGHT_SHMFD not in registers.protocol)
    driver.detach()


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("queues", [1, 2])
def test_identify_read_write_flush(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver], queues: int, indirect: bool
) -> None:
    disk = daemon(queues=queues)
    driver = drives(disk, indirect=indirect)
    assert driver.identify() == "vhost_user_blk"
    assert (driver.capacity, driver.block_size, driver.num_queues) == (len(disk.content) // SECTOR, 512, queues)
    assert driver.read(0, driver.capacity) == disk.content
    wanted = bytearray(disk.content)
    for queue in range(queues):
        data = os.urandom(300 * SECTOR)
        sector = 1000 + 2000 * queue
        driver.write(sector, data, queue=queue)
        wanted[sector * SECTOR : sector * SECTOR + len(data)] = data
    driver.flush_cache()
    assert disk.image.read_bytes() == wanted
    assert driver.read(0, driver.capacity, queue=queues - 1) == wanted
    driver.write_zeroes(8, 16)
    driver.discard(32, 8)
    wanted[8 * SECTOR : 24 * SECTOR] = bytes(16 * SECTOR)
    assert driver.read(0, 32) == wanted[: 32 * SECTOR]
    assert registers_of(driver).errors == []
    driver.detach()
    ran(driver, f"{queues} queue{'s' * (queues > 1)}")


def test_it_marks_what_it_writes(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    """libvhost-user marks each page by itself: what it read from the disk is in pages that it says it wrote."""
    disk = daemon()
    driver = drives(disk)
    registers = registers_of(driver)
    assert F.LOG_SHMFD in registers.protocol
    registers.start_log()
    before = registers.memory.read(0, 16 << 20)
    assert driver.read(0, 256) == disk.content[: 256 * SECTOR]
    after = registers.memory.read(0, 16 << 20)
    marked = set(registers.dirty_pages())
    read = {page for page in range(0, 16 << 20, 4096) if before[page : page + 4096] != after[page : page + 4096]}
    assert len(marked & read) >= 256 * SECTOR // 4096
    registers.stop_log()
    assert driver.read(0, 8) == disk.content[: 8 * SECTOR]
    assert registers.errors == []
    driver.detach()


@pytest.mark.parametrize("queues", [1, 2])
def test_32_in_flight_come_back_with_their_own_data(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver], queues: int
) -> None:
    disk = daemon(queues=queues)
    driver = drives(disk)
    for _ in range(20):
        reads = [driver.submit_read(7 * each, 3, queue=each % queues, publish=False) for each in range(32)]
        assert len(driver.in_flight) == 32
        for queue in range(queues):
            driver.flush(queue)
        for each, request in enumerate(reads):
            assert request.wait() == disk.content[7 * each * SECTOR : (7 * each + 3) * SECTOR]
    writes = [driver.submit_write(each, bytes((each,)) * SECTOR, queue=each % queues) for each in range(32)]
    for request in writes:
        request.wait()
    driver.flush_cache()
    assert disk.image.read_bytes()[: 32 * SECTOR] == b"".join(bytes((each,)) * SECTOR for each in range(32))
    driver.detach()


def test_read_only(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    disk = daemon(writable=False)
    driver = drives(disk)
    assert driver.read_only
    with pytest.raises(RequestFailed):
        driver.write(0, bytes(SECTOR))
    driver.detach()
    assert disk.image.read_bytes() == disk.content


def test_the_configuration_space(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    disk = daemon()
    driver = drives(disk)
    # It begins by saying that nothing is cached, whatever its block device does.
    for on in (False, True, False):
        driver.writeback = on
        assert driver.writeback is on
    # A change of its own: the disk grows while we look.
    seen: list[int] = []
    follow = driver.config_changed

    def changed() -> None:
        follow()
        seen.append(driver.capacity)

    driver.config_changed = changed
    disk.qmp("block_resize", **{"node-name": "file", "size": 8 << 20})
    assert driver.loop.run(until=lambda: bool(seen), timeout=20.0)
    assert seen == [(8 << 20) // SECTOR]
    assert driver.read(seen[0] - 8, 8) == bytes(8 * SECTOR)
    driver.detach()


def test_reset_and_again(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    disk = daemon(queues=2)
    driver = drives(disk)
    for _ in range(5):
        driver.initialize()
        assert driver.read(0, 64, queue=1) == disk.content[: 64 * SECTOR]
    assert registers_of(driver).errors == []
    driver.detach()


@pytest.mark.parametrize("queues", [1, 2])
def test_killed_with_requests_in_flight_and_started_again(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver], queues: int
) -> None:
    # 32 requests at 16 a second: after the burst that a throttle allows, most of them wait.
    disk = daemon(queues=queues, slow=16)
    driver = drives(disk)
    registers = registers_of(driver)
    lost: list[PeerError] = []
    registers.on_lost = lost.append
    finished: list[object] = []
    reads = [driver.submit_read(each, 1, queue=each % queues, on_done=finished.append) for each in range(32)]
    assert driver.loop.run(until=lambda: bool(finished), timeout=20.0)
    driver.loop.run(timeout=0.3)
    disk.kill()
    assert driver.loop.run(until=lambda: bool(lost), timeout=20.0)
    answered = [each for each in reads if each.error is None]
    assert 1 <= len(answered) < 32
    assert len(finished) == len(set(finished)) == 32
    assert all(isinstance(each.error, PeerDisconnected) for each in reads if each not in answered)
    with pytest.raises(PeerDisconnected):
        registers.reconnect()
    disk.slow = None
    disk.start()
    # QEMU 11.1 records nothing, so nothing can be handed over: the driver begins anew and asks again.
    assert registers.reconnect() is False
    driver.initialize()
    again = [driver.submit_read(each, 1, queue=each % queues) for each in range(32)]
    for each, request in enumerate(again):
        assert request.wait() == disk.content[each * SECTOR : (each + 1) * SECTOR]
    assert driver.arena.used > 0
    driver.detach()
    assert driver.arena.used == 0
    ran(driver, "killed and reconnected")


def test_it_is_there_for_one_front_end_after_the_other(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]
) -> None:
    disk = daemon()
    for _ in range(3):
        driver = drives(disk)
        assert driver.read(5, 1) == disk.content[5 * SECTOR : 6 * SECTOR]
        # Without a word, in the middle of its life.
        registers_of(driver).close()
    assert disk.alive


def test_with_as_little_as_it_can_do_with(daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]) -> None:
    disk = daemon()
    driver = drives(disk, protocol_features=F.CONFIG)
    assert registers_of(driver).protocol == F.CONFIG
    assert driver.read(0, driver.capacity) == disk.content
    driver.detach()


# --- what it does wrong (QEMU 11.1) ---------------------------------------------------------------------------------


def test_it_may_look_at_no_offset_of_the_configuration_space(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver]
) -> None:
    """Asked for the bytes from 20 on, it gives the first ones; so our registers ask for all of them."""
    driver = drives(daemon())
    registers = registers_of(driver)
    whole = registers.read_config(0, 24)
    assert registers.front.get_config(20, 4) in (whole[:4], whole[20:])
    assert registers.read_config(20, 4) == whole[20:] == (512).to_bytes(4, "little")
    driver.detach()


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(Request.SET_CONFIG, Config(0, 4, 0, bytes(4))), (Request.SET_VRING_ENABLE, VringState(7, 1))],
    ids=["config", "queue"],
)
def test_what_it_cannot_do_is_found_out(
    daemon: Callable[..., Daemon], drives: Callable[..., BlkDriver], request_: Request, payload: Config | VringState
) -> None:
    """It acknowledges it with success, and closes the connection."""
    disk = daemon()
    driver = drives(disk)
    registers = registers_of(driver)
    reads = [driver.submit_read(each, 1) for each in range(8)]
    refused = False
    try:
        registers.front.request(request_, payload)
    except MessageError as error:
        refused = error.rule == "Refused"
    if not refused:
        assert driver.loop.run(until=lambda: driver.broken is not None, timeout=20.0)
        assert isinstance(registers.lost, PeerDisconnected)
        assert all(each.done for each in reads)
    assert disk.alive


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_drive(daemon: Callable[..., Daemon], write: bool, indirect: bool) -> None:
    disk = daemon(queues=2)
    shown: list[str] = []
    text = drive(disk.path, device="blk", count=600, write=write, indirect=indirect, as_json=True, show=shown.append)
    facts = json.loads(text)
    assert shown == [text]
    assert (facts["requests"], facts["findings"], facts["queues"]) == (600, [], 2)
    assert facts["bytes"] == 600 * 4096
    assert (facts["id"], facts["capacity"]) == ("vhost_user_blk", len(disk.content) // SECTOR)
    assert disk.image.read_bytes() == disk.content, "what was overwritten was put back"


def test_drive_takes_it_for_something_else(daemon: Callable[..., Daemon]) -> None:
    disk = daemon()
    shown: list[str] = []
    with pytest.raises((PeerTimeout, PeerDisconnected, MessageError)):
        drive(disk.path, device="rng", timeout=1.0, show=shown.append)
    assert "findings   1" in shown[0]

"""The driver model over vhost-user, in front of our own back-end in another thread."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory, QueueConfig, RingLayout
from virtio_test.device import RING_FEATURES
from virtio_test.devices.test import TestDevice
from virtio_test.driver.alloc import Arena
from virtio_test.driver.registers import Registers
from virtio_test.driver.test import TestDriver
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, PeerDisconnected, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import TEST_DEVICE_ID
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .vhost_user_world import serving
from .world import PATIENCE, eventually, open_fds

F = ProtocolFeature
RINGS = pytest.mark.parametrize("ring", ["split", "packed"])
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_leaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    before = open_fds()
    yield
    # A log entry holds the error that it is about, and that the frames it came through.
    caplog.get_records("call").clear()
    assert eventually(lambda: open_fds() == before), f"{open_fds()} fds are open, {before} were"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a server listens; the server itself is not passed on, so that its fds are gone when they are counted."""
    with serving(tmp_path / "s") as server:
        yield server.path


def connected(path: Path, **options: object) -> VhostUserRegisters:
    return VhostUserRegisters(path, device_id=TEST_DEVICE_ID, timeout=PATIENCE, **options)  # type: ignore[arg-type]


def driver_of(registers: Registers, ring: str = "split", **options: object) -> TestDriver:
    wanted = RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")
    lines: list[str] = []
    driver = TestDriver(registers, wanted=wanted, console=lines.append, **options)  # type: ignore[arg-type]
    driver.initialize()
    assert ("RING_PACKED" in driver.features) == (ring == "packed")
    return driver


def test_they_are_registers(path: Path) -> None:
    with connected(path) as registers:
        assert isinstance(registers, Registers)
        assert (registers.transport, registers.legacy, registers.device_id()) == ("vhost-user", False, TEST_DEVICE_ID)
        assert registers.queue_max_sizes() == [128]
        assert not registers.device_features() & (1 << 30 | 1 << 26)
        assert "status 0" in repr(registers)


@RINGS
@pytest.mark.parametrize("indirect", [False, True])
def test_requests(path: Path, ring: str, indirect: bool) -> None:
    with connected(path) as registers:
        driver = driver_of(registers, ring, indirect=indirect)
        assert [each.ret for each in driver.request_many(range(256))] == [(n + 1) % 256 + 100 for n in range(256)]
        assert driver.detach() == []
        assert registers.errors == []


@RINGS
def test_a_reset_and_everything_again(path: Path, ring: str) -> None:
    with connected(path) as registers:
        driver = driver_of(registers, ring)
        for number in range(20):
            assert driver.request(number).ret == number + 101
            if number % 2:
                driver.initialize()
            else:
                assert driver.reset_queue(0) == []
        driver.reset()
        assert registers.read_status() == 0
        assert driver.arena.used == 0


@RINGS
@pytest.mark.parametrize(
    "offered",
    [F(0), F.CONFIG, F.CONFIG | F.REPLY_ACK, F.CONFIG | F.STATUS, F.CONFIG | F.CONFIGURE_MEM_SLOTS, F.CONFIG | F.MQ],
    ids=str,
)
def test_with_less(tmp_path: Path, ring: str, offered: ProtocolFeature) -> None:
    with serving(tmp_path / "s", protocol_features=offered) as server, connected(server.path) as registers:
        assert registers.protocol == offered
        if not offered & F.CONFIG:
            assert registers.config_size() == 0
            return
        driver = driver_of(registers, ring)
        driver.request_many(range(200))
        driver.initialize()
        driver.request(1)
        driver.detach()


def test_only_what_is_wanted_is_taken(path: Path) -> None:
    with connected(path, protocol_features=F.CONFIG | F.REPLY_ACK) as registers:
        assert registers.protocol == F.CONFIG | F.REPLY_ACK
        driver = driver_of(registers)
        driver.request(1)
        assert registers.front.channel is None


def test_the_timer_variant(tmp_path: Path) -> None:
    lines: list[str] = []
    device = TestDevice(timer=True, first_after=0.01, every=0.01, console=lines.append)
    with serving(tmp_path / "s", device) as server, connected(server.path) as registers:
        shown: list[str] = []
        driver = TestDriver(registers, timer=True, console=shown.append)
        driver.initialize()
        assert driver.loop.run(until=lambda: driver.acknowledged >= 5, timeout=PATIENCE)
        driver.detach()
        # One configuration change may stand for several ticks, but none goes without its answer.
        assert shown.count("virttest get ack") == driver.acknowledged >= 5


def test_a_queue_size_of_ones_own(path: Path) -> None:
    with connected(path, queue_size=8) as registers:
        driver = driver_of(registers)
        assert registers.queue_max_sizes() == [8]
        assert driver.queues[0].size == 8
        assert len(driver.request_many(range(100))) == 100


def test_the_configuration_space(path: Path) -> None:
    with connected(path, config_size=12) as registers:
        driver = driver_of(registers)
        assert registers.config_size() == 12
        driver.write_field("event", 0x1234_5678)
        assert driver.read_field("event") == 0x1234_5678
        assert registers.read_config(8, 4) == struct.pack("<I", 0x1234_5678)


def test_a_connection_instead_of_a_path(path: Path) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    with VhostUserRegisters(connection=connection, device_id=TEST_DEVICE_ID, timeout=PATIENCE) as registers:
        driver = driver_of(registers)
        driver.request(1)
        with pytest.raises(StateError, match="no path to connect to again"):
            registers.reconnect()
        assert driver.request(2).ret == 103, "and nothing has happened to the first one"


def test_going_to_another_back_end_on_purpose(path: Path, tmp_path: Path) -> None:
    with connected(path) as registers, serving(tmp_path / "t") as other:
        driver = driver_of(registers)
        driver.request(1)
        waiting = driver.submit_number(2, publish=False)
        assert registers.reconnect(other.path) is False
        assert isinstance(waiting.error, PeerDisconnected)
        assert registers.errors == [], "nobody did anything wrong"
        driver.initialize()
        driver.request(3)
        # That is now the place to go to again.
        registers.reconnect()
        driver.initialize()
        driver.request(4)
        driver.detach()
        assert eventually(lambda: len(other.lines) > 0)


def test_a_server_that_stops_and_starts_again(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server:
        registers = connected(server.path)
        driver = driver_of(registers)
        driver.request(1)
    assert driver.loop.run(until=lambda: driver.broken is not None, timeout=PATIENCE)
    with serving(tmp_path / "s"):
        registers.reconnect()
        driver.initialize()
        assert driver.request(2).ret == 103
        driver.detach()
    registers.close()


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [True, False])
def test_memory_that_comes_and_goes(path: Path, slots: bool) -> None:
    wanted = F.CONFIG | F.REPLY_ACK | (F.CONFIGURE_MEM_SLOTS if slots else F(0))
    memory = GuestMemory([(0, MIB)])
    with connected(path, memory=memory, protocol_features=wanted) as registers:
        driver_of(registers).request(1)
        memory.add_region(16 * MIB, MIB)
        registers.share_memory()
        arena = Arena(memory, address=16 * MIB)
        driver = driver_of(registers, arena=arena)
        assert driver.queues[0].config.desc >= 16 * MIB
        driver.request(2)
        memory.remove_region(0, MIB)
        registers.share_memory()
        driver.request(3)
        assert registers.errors == []


def test_memory_that_nobody_could_map_is_our_own_mistake(path: Path) -> None:
    with connected(path, memory=GuestMemory([(0, MIB)], backing="anonymous")) as registers:
        with pytest.raises(StateError, match="anonymous"):
            driver_of(registers)
        assert registers.lost is None


def test_more_memory_than_a_table_holds(path: Path) -> None:
    memory = GuestMemory([(each * MIB, 4096) for each in range(8)] + [(16 * MIB, MIB)])
    with (
        connected(path, memory=memory, protocol_features=F.CONFIG) as registers,
        pytest.raises(StateError, match="a table holds 8"),
    ):
        driver_of(registers)
    with connected(path, memory=memory) as registers:
        driver_of(registers).request(1)


# --- what goes wrong --------------------------------------------------------------------------------------------


@RINGS
def test_a_ring_that_the_back_end_gives_up_is_a_finding(path: Path, ring: str) -> None:
    with connected(path) as registers:
        driver = driver_of(registers, ring)
        driver.request(1)
        layout = driver.queues[0].layout()
        request = driver.submit_number(2, publish=False)
        if ring == "split":
            # More available than the ring holds.
            driver.memory.write(layout.at("avail.idx"), struct.pack("<H", 1000))
        else:
            # A chain that goes round for ever.
            for slot in range(128):
                driver.memory.write(layout.at("desc.flags", slot), struct.pack("<H", 1 | 1 << 7))
        registers.kick_notifier(0, lambda: 0).notify()
        with pytest.raises(DeviceNeedsReset):
            request.wait()
        (error,) = registers.errors
        assert isinstance(error, DeviceNeedsReset)
        assert "queue 0" in str(error)
        assert registers.lost is None
        driver.initialize()
        assert driver.request(3).ret == 104


def test_misuse(path: Path) -> None:
    with connected(path) as registers:
        config = QueueConfig.from_layout(RingLayout.contiguous(8, 0), index=1)
        with pytest.raises(InvalidArgument, match="queue 1 of a device with 1"):
            registers.enable_queue(config)
        with pytest.raises(InvalidArgument, match="not enabled"):
            registers.reset_queue(0)
        registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(8, 0)))
        with pytest.raises(StateError, match="enabled already"):
            registers.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(8, 0)))
        registers.reset_queue(0)
    with pytest.raises(PeerDisconnected):
        registers.read_config(0, 4)
    registers.close()


def test_either_a_path_or_a_connection() -> None:
    with pytest.raises(StateError, match="either a path or a connection"):
        VhostUserRegisters(device_id=1)


def test_the_wrong_message_still_goes_out(path: Path) -> None:
    with connected(path) as registers:
        front = registers.front
        front.send_bytes(struct.pack("=III", 99, 0x9, 0))
        assert front.receive().request == 99
        front.send(Request.SET_FEATURES, None)
        with pytest.raises(PeerDisconnected):
            front.receive()

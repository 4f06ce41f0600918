"""A vfio-user server through our own client: what commands do, in the order in which a client uses them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.capabilities import Capabilities, parse_capabilities
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import encode
from virtio_test.carrier.vfio_user.messages import Command, RegionIndex
from virtio_test.carrier.vfio_user.payloads import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    MigrationData,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    RegionIoFds,
    Version,
    WriteCount,
    WriteMulti,
    WriteOne,
)
from virtio_test.carrier.vfio_user.server import VfioUserServer
from virtio_test.clock import VirtualClock
from virtio_test.devices.test import TestDevice
from virtio_test.driver.access import PciAccess
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.function import VirtioPci

from .vfio_user_world import (
    MODERN_BAR,
    PAGE,
    STATUS,
    Server,
    Watched,
    a_file,
    bring_up,
    served,
    serving,
    silent,
    small_memory,
)
from .world import eventually, open_fds

CONFIG = RegionIndex.CONFIG


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[VfioUserClient]:
    with VfioUserClient(server.path, memory=small_memory()) as made:
        yield made


def failed(client: VfioUserClient, command: Command, payload: Payload | None, fds: tuple[int, ...] = ()) -> int | None:
    """The errno that a command is answered with."""
    reply = client.command(command, payload, fds=fds)
    assert reply is not None
    return reply.errno


# --- who it is ------------------------------------------------------------------------------------------------


def test_what_the_device_says_of_itself(client: VfioUserClient) -> None:
    assert isinstance(client, PciAccess)
    assert client.info == DeviceInfo(16, 3, 9, 5)
    assert {index: info.size for index, info in client.regions.items() if info.size} == {
        0: 64,
        1: 4096,
        4: 16384,
        CONFIG: 256,
    }
    # The notification page is never mappable, and nothing else is.
    assert {info.flags for info in client.regions.values()} == {0, 3}
    assert client.irqs == {
        0: IrqInfo(16, 7, 0, 1),
        1: IrqInfo(16, 0, 1, 0),
        2: IrqInfo(16, 3, 2, 2),
        3: IrqInfo(16, 9, 3, 1),
        4: IrqInfo(16, 9, 4, 1),
    }
    assert client.read_config(0, 4) == 0x1013_1AF4
    assert client.request(Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(16, 0, 4), RegionIoFds) == RegionIoFds(16, 0, 4)
    assert client.capabilities == Capabilities(
        max_msg_fds=16,
        max_dma_maps=509,
        write_multiple=True,
        named=frozenset({"max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple"}),
    )


def test_a_function_without_line_and_vectors(tmp_path: Path) -> None:
    from virtio_test.transport.pci.flavours import declare

    device = TestDevice(console=silent)
    made = declare(device, flavour="non-transitional", vectors=0, pin=0)
    endpoint = VirtioPci(device, declaration=made, loop=OwnerLoop(), memory=GuestMemory())
    with serving(tmp_path / "s", endpoint) as server, VfioUserClient(server.path, memory=small_memory()) as client:
        assert [client.irqs[index].count for index in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("proposed", [b"", b"{}\0", b'{"capabilities":{"max_dma_maps":7,"write_multiple":true}}\0'])
def test_no_capability_is_named_that_the_client_did_not_name(server: Server, proposed: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.connect(str(server.path))
        raw.sendall(encode(Command.VERSION, 77, Version(0, 3, proposed)))
        reply = raw.recv(4096)
    # The reply has the id, major version and at most the minor version that were sent.
    assert reply[:4] == b"\x4d\x00\x01\x00"
    found = Version.parse(reply[16:])
    assert (found.major, found.minor) == (0, 0)
    capabilities = parse_capabilities(found.data)
    assert capabilities.named == parse_capabilities(proposed).named
    assert capabilities.max_dma_maps == (7 if capabilities.named else 65535)


# --- a driver -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", ["modern", "legacy"])
@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("posted", [True, False])
def test_our_driver_drives_the_device(server: Server, interface: str, interrupts: str, posted: bool) -> None:
    before = open_fds()
    drive(server, interface, interrupts, posted=posted)
    assert server.idle()
    assert open_fds() == before


def drive(server: Server, interface: str, interrupts: str, *, posted: bool) -> None:
    with VfioUserClient(server.path, memory=small_memory(), posted=posted) as client:
        registers = open_pci(client, interface=interface, interrupts=interrupts)  # type: ignore[arg-type]
        driver = TestDriver(registers, console=silent)
        for _ in range(2):
            driver.initialize()
            assert driver.request(7).ret == 108
            assert [each.ret for each in driver.request_many(range(200))] == [(number + 101) for number in range(200)]
        assert client.served == 0
        assert server.server.session is not None
        assert server.endpoint.external_table


def test_one_client_after_the_other_with_the_device_as_new(server: Server) -> None:
    served(server)
    before = open_fds()

    def drive_once() -> None:
        with VfioUserClient(server.path, memory=small_memory()) as client:
            assert client.read_config(4, 2) == 0
            assert client.read_bar(MODERN_BAR, STATUS, 1) == 0xFF
            assert bring_up(client).request(3).ret == 104
            assert client.read_bar(MODERN_BAR, STATUS, 1) == 0xF

    for _ in range(20):
        drive_once()
    assert server.idle()
    assert open_fds() == before
    assert server.server.sessions == 21
    assert server.last_error is None


def test_a_second_client_waits_for_the_first_to_go(server: Server) -> None:
    first = VfioUserClient(server.path, memory=small_memory())
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting.connect(str(server.path))
    waiting.sendall(encode(Command.VERSION, 1, Version(0, 0)))
    waiting.settimeout(0.1)
    with pytest.raises(TimeoutError):
        waiting.recv(16)
    assert first.read_config(0, 2) == 0x1AF4
    first.close()
    waiting.settimeout(10.0)
    assert waiting.recv(16)[2] == Command.VERSION
    waiting.close()
    served(server)


def test_a_reset_takes_the_driver_s_settings(client: VfioUserClient) -> None:
    bring_up(client)
    client.reset()
    assert client.read_config(4, 2) == 0
    driver = bring_up(client)
    assert driver.request(1).ret == 102


# --- memory ---------------------------------------------------------------------------------------------------


def unmap(address: int, size: int, flags: int = 0) -> DmaUnmap:
    return DmaUnmap(24, flags, address, size)


def regions(server: Server) -> list[tuple[int, int, bool]]:
    return [(each.address, each.size, each.writable) for each in server.endpoint.memory.regions]


def test_regions_come_and_go(server: Server, client: VfioUserClient) -> None:
    fd = a_file(8 * PAGE)
    os.pwrite(fd, b"last page", 7 * PAGE)
    client.export(0x10_0000, PAGE, fd=fd, offset=7 * PAGE)
    client.export(0x20_0000, 2 * PAGE, fd=fd, writable=False)
    assert regions(server) == [(0, 1 << 20, True), (0x10_0000, PAGE, True), (0x20_0000, 2 * PAGE, False)]
    assert server.endpoint.memory.read(0x10_0000, 9) == b"last page"
    server.endpoint.memory.write(0x10_0000, b"LAST")
    assert os.pread(fd, 9, 7 * PAGE) == b"LAST page"
    client.withdraw(0x10_0000, PAGE)
    assert regions(server) == [(0, 1 << 20, True), (0x20_0000, 2 * PAGE, False)]
    client.export(0x10_0000, PAGE, fd=fd)
    os.close(fd)
    assert len(regions(server)) == 3


def test_unmapping_nothing_or_several_regions_succeeds(server: Server, client: VfioUserClient) -> None:
    fd = a_file(PAGE)
    for number in range(4):
        client.export(0x40_0000 + 0x1_0000 * number, PAGE, fd=fd)
    os.close(fd)
    assert failed(client, Command.DMA_UNMAP, unmap(0x1000_0000, 0x1000_0000)) is None
    assert failed(client, Command.DMA_UNMAP, unmap(0, 1 << 63)) is None
    assert regions(server) == []
    # The upper half of the address space, to its very end.
    assert failed(client, Command.DMA_UNMAP, unmap(1 << 63, 1 << 63)) is None
    client.export(0, 1 << 20, fd=client.memory.regions[0].fd)
    reply = client.request(Command.DMA_UNMAP, unmap(0, 0, 2), DmaUnmap)
    assert reply == unmap(0, 0, 2)
    assert regions(server) == []


MAP_REFUSED = [
    (errno.EEXIST, DmaMap(32, 3, 0, 0, PAGE), 1),
    (errno.EEXIST, DmaMap(32, 3, 0, (1 << 20) - PAGE, PAGE), 1),
    (errno.EEXIST, DmaMap(32, 3, 0, 0, 1 << 30), 0),
    (errno.EINVAL, DmaMap(32, 0, 0, 1 << 30, PAGE), 1),
    (errno.EINVAL, DmaMap(32, 7, 0, 1 << 30, PAGE), 1),
    (errno.EINVAL, DmaMap(32, 3, 0, 1 << 30, 0), 1),
    (errno.EINVAL, DmaMap(32, 3, 0, 1 << 30, 2 * PAGE), 1),
    (errno.EINVAL, DmaMap(32, 3, PAGE, 1 << 30, PAGE), 1),
    (errno.EINVAL, DmaMap(32, 3, 0, (1 << 30) + 1, PAGE - 8), 1),
    (errno.EINVAL, DmaMap(32, 3, 0, (1 << 64) - PAGE, 2 * PAGE), 1),
    (errno.EINVAL, DmaMap(32, 3, (1 << 64) - PAGE, 0, 2 * PAGE), 1),
    (errno.EINVAL, DmaMap(32, 3, 0, (1 << 64) - 1, (1 << 64) - 1), 0),
]


@pytest.mark.parametrize(("number", "asked", "count"), MAP_REFUSED)
def test_what_cannot_be_mapped_changes_nothing(
    server: Server, client: VfioUserClient, number: int, asked: DmaMap, count: int
) -> None:
    before = open_fds()
    fds = tuple(a_file() for _ in range(count))
    assert failed(client, Command.DMA_MAP, asked, fds) == number
    for fd in fds:
        os.close(fd)
    assert regions(server) == [(0, 1 << 20, True)]
    assert open_fds() == before
    assert bring_up(client).request(1).ret == 102


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_only_files_are_memory(server: Server, client: VfioUserClient, path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    assert failed(client, Command.DMA_MAP, DmaMap(32, 3, 0, 1 << 30, PAGE), (fd,)) == errno.EINVAL
    os.close(fd)
    assert len(regions(server)) == 1


def test_a_file_that_may_only_be_read_is_no_memory_to_write_to(server: Server, client: VfioUserClient) -> None:
    fd = a_file()
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert failed(client, Command.DMA_MAP, DmaMap(32, 3, 0, 1 << 30, PAGE), (read_only,)) == errno.EINVAL
    assert failed(client, Command.DMA_MAP, DmaMap(32, 1, 0, 1 << 30, PAGE), (read_only,)) is None
    os.close(fd)
    os.close(read_only)
    assert regions(server)[1:] == [(1 << 30, PAGE, False)]


@pytest.mark.parametrize(
    ("number", "asked"),
    [
        (errno.ENOTSUP, DmaUnmap(48, 1, 0, 1 << 20, b"\0" * 16)),
        (errno.EINVAL, unmap(0, 1 << 20, 4)),
        (errno.EINVAL, DmaUnmap(40, 0, 0, 1 << 20, b"\0" * 16)),
        (errno.EINVAL, unmap(0, 1 << 20, 2)),
        (errno.EINVAL, unmap(0, 0)),
        (errno.EINVAL, unmap(PAGE, (1 << 64) - PAGE + 1)),
        (errno.EINVAL, unmap(PAGE, PAGE)),
        (errno.EINVAL, unmap(0, (1 << 20) - PAGE)),
        (errno.EINVAL, unmap(PAGE, 1 << 30)),
    ],
)
def test_what_cannot_be_unmapped_stays(server: Server, client: VfioUserClient, number: int, asked: DmaUnmap) -> None:
    assert failed(client, Command.DMA_UNMAP, asked) == number
    assert regions(server) == [(0, 1 << 20, True)]
    assert bring_up(client).request(1).ret == 102


def test_no_more_regions_than_were_negotiated(
    server: Server, client: VfioUserClient, caplog: pytest.LogCaptureFixture
) -> None:
    fd = a_file()
    for number in range(508):
        client.export((1 << 30) + number * PAGE, PAGE, fd=fd)
    assert failed(client, Command.DMA_MAP, DmaMap(32, 3, 0, 1 << 40, PAGE), (fd,)) == errno.ENOSPC
    assert "DmaSlots" in caplog.text
    os.close(fd)
    assert len(regions(server)) == 509
    assert failed(client, Command.DMA_UNMAP, unmap((1 << 30) + 8, PAGE)) == errno.EINVAL
    assert "UnmapSplit" in caplog.text
    client.request(Command.DMA_UNMAP, unmap(1 << 30, 1 << 30), DmaUnmap)
    assert len(regions(server)) == 1


def remake(client: VfioUserClient, *, at: int) -> None:
    """All memory goes and comes back in two parts, in one burst that nobody waits for, as QEMU's firmware has it."""
    fd = client.memory.regions[0].fd
    assert fd is not None
    client.command(Command.DMA_UNMAP, unmap(0, 1 << 20), no_reply=True)
    for address, size in ((0, at), (at, (1 << 20) - at)):
        client.command(Command.DMA_MAP, DmaMap(32, 3, address, address, size), fds=(fd,), no_reply=True)


def test_memory_of_a_running_queue_may_go_and_come_back(server: Server, client: VfioUserClient) -> None:
    driver = bring_up(client)
    for number in range(40):
        # The kick is on its way when the memory goes, and nothing follows: silence ends the hold.
        request = driver.submit_number(number)
        remake(client, at=PAGE * (1 + number))
        assert int.from_bytes(request.wait(timeout=5.0)[:4], "little") == number + 101
    assert driver.registers.read_status() == 0xF
    assert [size for _, size, _ in regions(server)] == [40 * PAGE, (1 << 20) - 40 * PAGE]


def test_a_hold_ends_with_the_next_command_of_another_kind(tmp_path: Path) -> None:
    # Its clock stands still, so silence ends nothing here.
    loop = OwnerLoop(clock=VirtualClock(), jump=False)
    endpoint = Watched(TestDevice(console=silent), loop=loop, memory=GuestMemory())
    with serving(tmp_path / "s", endpoint) as server:
        with VfioUserClient(server.path, memory=small_memory()) as client:
            assert endpoint.calls == []
            remake(client, at=PAGE)
            remake(client, at=2 * PAGE)
            client.read_config(0, 2)
            assert endpoint.calls == ["hold", "release"]
            client.withdraw(0, 1 << 20)
            client.export(0, 1 << 20, fd=client.memory.regions[0].fd)
            assert endpoint.calls == ["hold", "release", "hold"]
        # The end of the connection ends the hold as well.
        assert server.idle()
        assert endpoint.calls == ["hold", "release"] * 2


def test_a_queue_whose_memory_is_gone_breaks_the_device_only(server: Server, client: VfioUserClient) -> None:
    driver = bring_up(client)
    driver.submit_number(1, publish=False)
    client.withdraw(0, 1 << 20)
    driver.flush(0)
    assert eventually(lambda: bool(client.read_bar(MODERN_BAR, STATUS, 1) & 0x40))
    client.export(0, 1 << 20, fd=client.memory.regions[0].fd)
    client.reset()
    assert bring_up(client).request(2).ret == 103


# --- accesses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (CONFIG, 256, 1),
        (CONFIG, 255, 2),
        (CONFIG, 0, 257),
        (CONFIG, (1 << 64) - 1, 1),
        (CONFIG, (1 << 64) - 1, 0xFFFF_FFFF),
        (CONFIG, 0, 0),
        (4, 16384, 1),
        (4, 16383, 2),
        (4, 0, 0xFFFF_FFFF),
        (0, 64, 1),
        (2, 0, 1),
        (5, 0, 4),
        (RegionIndex.ROM, 0, 1),
        (RegionIndex.VGA, 0, 1),
        (9, 0, 1),
        (0xFFFF_FFFF, 0, 1),
    ],
)
def test_an_access_outside_of_its_region_is_refused(
    client: VfioUserClient, region: int, offset: int, count: int
) -> None:
    assert failed(client, Command.REGION_READ, RegionAccess(offset, region, count)) == errno.EINVAL
    size = min(count, 64)
    assert failed(client, Command.REGION_WRITE, RegionData(offset, region, count, b"\xff" * size)) == errno.EINVAL
    one = WriteOne(offset, region, count, b"\xff" * 8)
    good = WriteOne(0x14, MODERN_BAR, 1, b"\x01" + b"\0" * 7)
    client.write_config(4, 2, 7)
    assert failed(client, Command.REGION_WRITE_MULTI, WriteMulti((good, one))) == errno.EINVAL
    assert client.read_bar(MODERN_BAR, STATUS, 1) == 0


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_write_has_as_many_bytes_as_it_says(client: VfioUserClient, count: int) -> None:
    asked = RegionData(4, CONFIG, count, b"\7\0\0")
    assert failed(client, Command.REGION_WRITE, asked) == errno.EINVAL
    assert client.read_config(4, 2) == 0


def test_any_length_inside_a_region_is_one_access(client: VfioUserClient) -> None:
    for offset in range(0, 256, 17):
        for count in {1, min(3, 256 - offset), 256 - offset}:
            got = client.request(Command.REGION_READ, RegionAccess(offset, CONFIG, count), RegionData)
            assert (got.offset, got.region, got.count, len(got.data)) == (offset, CONFIG, count, count)
    # No register has this width: ones, and no error.
    client.write_config(4, 2, 7)
    got = client.request(Command.REGION_READ, RegionAccess(0, MODERN_BAR, 3), RegionData)
    assert got.data == b"\xff\xff\xff"


def test_posted_writes_are_not_answered_and_come_in_order(client: VfioUserClient) -> None:
    client.write_config(4, 2, 7)
    for status in (1, 3):
        client.command(Command.REGION_WRITE, RegionData(STATUS, 4, 1, bytes([status])), no_reply=True)
    assert client.read_bar(MODERN_BAR, STATUS, 1) == 3
    reply = client.request(Command.REGION_WRITE, RegionData(STATUS, 4, 1, b"\0"), RegionAccess)
    assert reply == RegionAccess(STATUS, 4, 1)
    assert client.read_bar(MODERN_BAR, STATUS, 1) == 0


def test_several_writes_in_one_command(client: VfioUserClient) -> None:
    client.write_config(4, 2, 7)
    writes = WriteMulti(tuple(WriteOne(STATUS, 4, 1, bytes([status]) + b"\xee" * 7) for status in (1, 3)))
    assert client.request(Command.REGION_WRITE_MULTI, writes, WriteCount) == WriteCount(2)
    assert client.read_bar(MODERN_BAR, STATUS, 1) == 3
    client.command(Command.REGION_WRITE_MULTI, WriteMulti((WriteOne(STATUS, 4, 1, b"\0" * 8),)), no_reply=True)
    assert client.read_bar(MODERN_BAR, STATUS, 1) == 0
    assert client.request(Command.REGION_WRITE_MULTI, WriteMulti(()), WriteCount) == WriteCount(0)
    nine = WriteMulti((WriteOne(0, 4, 9, b"\0" * 8),))
    assert failed(client, Command.REGION_WRITE_MULTI, nine) == errno.EINVAL


@pytest.mark.parametrize(
    ("number", "command", "payload"),
    [
        (errno.ENOTTY, Command.DEVICE_FEATURE, Feature(16, 1 | 1 << 16)),
        (errno.ENOTTY, Command.DEVICE_FEATURE, Feature(8, 2 | 1 << 18)),
        (errno.ENOTSUP, Command.MIG_DATA_READ, MigrationData(8, 4096)),
        (errno.ENOTSUP, Command.MIG_DATA_WRITE, MigrationData(9, 1, b"x")),
        (errno.EINVAL, Command.DEVICE_GET_INFO, DeviceInfo(15)),
        (errno.EINVAL, Command.DEVICE_GET_REGION_INFO, RegionInfo(31, 0, 0)),
        (errno.EINVAL, Command.DEVICE_GET_REGION_INFO, RegionInfo(32, 0, 9)),
        (errno.EINVAL, Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(16, 0, 9)),
        (errno.EINVAL, Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(0, 0, 0)),
        (errno.EINVAL, Command.DEVICE_GET_IRQ_INFO, IrqInfo(16, 0, 5)),
        (errno.EINVAL, Command.DEVICE_GET_IRQ_INFO, IrqInfo(0, 0, 0)),
    ],
)
def test_what_is_not_there_is_refused(client: VfioUserClient, number: int, command: Command, payload: Payload) -> None:
    assert failed(client, command, payload) == number
    assert client.read_config(0, 2) == 0x1AF4


@pytest.mark.parametrize("number", [0, 14, 19, 0xFFFF])
def test_an_unknown_command_is_answered(client: VfioUserClient, number: int) -> None:
    client.send(encode(number, 5, None), (0,))
    # Its reply names a command that the table does not have, so our own client takes it for none of its own.
    with pytest.raises(MessageError, match="UnexpectedReply"):
        client.read_config(0, 2)


def test_the_client_says_what_was_refused(client: VfioUserClient) -> None:
    with pytest.raises(MessageError, match=r"CommandRefused.*RegionInfo.* EINVAL"):
        client.request(Command.DEVICE_GET_REGION_INFO, RegionInfo(32, 0, 99), RegionInfo)


# --- the server itself ----------------------------------------------------------------------------------------


def test_the_socket_is_for_its_user_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert not path.exists()


def test_a_connection_that_the_launcher_gave(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    endpoint = VirtioPci(TestDevice(console=silent), loop=OwnerLoop(), memory=GuestMemory())
    server = VfioUserServer(endpoint, fd=there.detach())
    assert "connected" in repr(server)
    here.close()
    endpoint.loop.run(timeout=5.0)
    assert server.finished
    server.close()


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    full = VirtioPci(TestDevice(console=silent), loop=OwnerLoop())
    with pytest.raises(InvalidArgument, match="guest memory already"):
        VfioUserServer(full, path=tmp_path / "s")
    empty = VirtioPci(TestDevice(console=silent), loop=OwnerLoop(), memory=GuestMemory())
    with pytest.raises(InvalidArgument, match="not the endpoint's own"):
        VfioUserServer(empty, path=tmp_path / "s", loop=OwnerLoop())
    with pytest.raises(InvalidArgument, match="no such folder"):
        VfioUserServer(empty, path=tmp_path / "none" / "s")
    with pytest.raises(InvalidArgument, match="either"):
        VfioUserServer(empty)


def test_the_hold_goes_by_the_endpoint_s_clock() -> None:
    clock = VirtualClock()
    loop = OwnerLoop(clock=clock, jump=False)
    endpoint = Watched(TestDevice(console=silent), loop=loop, memory=GuestMemory())
    here, there = socket.socketpair()
    with VfioUserServer(endpoint, fd=there.detach()):
        here.sendall(encode(Command.VERSION, 1, Version(0, 0)) + encode(Command.DMA_UNMAP, 3, unmap(0, PAGE)))
        endpoint.loop.run_pending()
        clock.advance(0.049)
        assert endpoint.calls == ["hold"]
        clock.advance(0.002)
        assert endpoint.calls == ["hold", "release"]
    here.close()


SERVE = """
import sys
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.server import serve
from virtio_test.devices.test import TestDevice
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.function import VirtioPci
endpoint = VirtioPci(TestDevice(), loop=OwnerLoop(), memory=GuestMemory())
serve(endpoint, sys.argv[1], ready=lambda _: print("ready", flush=True))
print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_server_and_leave_nothing(tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    with subprocess.Popen([sys.executable, "-c", SERVE, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with VfioUserClient(path, memory=small_memory()) as client:
            assert bring_up(client).request(1).ret == 102
            process.send_signal(number)
            assert process.wait(10) == 0
            with pytest.raises(PeerDisconnected):
                client.read_config(0, 2)
        assert process.stdout.read().endswith("ended\n")
    assert not path.exists()

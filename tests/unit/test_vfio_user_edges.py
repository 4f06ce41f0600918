"""Where what the vfio-user ends take begins and ends, without a connection: each number, and the next one."""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from typing import Any

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.capabilities import Capabilities, parse_capabilities
from virtio_test.carrier.vfio_user.codec import Decoder, OwnedFd
from virtio_test.carrier.vfio_user.dma import MAX_MAPS, DmaTable
from virtio_test.carrier.vfio_user.messages import HEADER_BYTES, MAX_MESSAGE
from virtio_test.carrier.vfio_user.payloads import MAX_WRITES, DmaMap, DmaUnmap, RegionData, WriteMulti, WriteOne
from virtio_test.carrier.vfio_user.rules import Refused
from virtio_test.carrier.vfio_user.vectors import MsixPlace
from virtio_test.errors import MessageError

END = 1 << 64


class Nowhere:
    """A client without memory."""

    def dma_read(self, address: int, count: int) -> bytes:
        raise OSError(address, count)

    def dma_write(self, address: int, data: bytes) -> None:
        raise OSError(address, data)


def table() -> DmaTable:
    return DmaTable(GuestMemory(), Nowhere())


def asked(address: int, size: int, *, offset: int = 0, flags: int = 3) -> DmaMap:
    return DmaMap(32, flags, offset, address, size)


def undone(address: int, size: int, *, flags: int = 0) -> DmaUnmap:
    return DmaUnmap(24, flags, address, size, b"")


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        call(*arguments, **options)
    return caught.value.error.rule


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [2, 3, 0xF])
def test_a_message_is_a_command_or_a_reply(flags: int) -> None:
    with pytest.raises(MessageError, match="MessageType"):
        list(Decoder("server").feed(struct.pack("=HHIII", 1, 13, HEADER_BYTES, flags, 0), []))


@pytest.mark.parametrize(
    ("reader", "flags"), [("server", 0x40), ("server", 1 << 31), ("server", 0x20), ("client", 0x11), ("client", 0x41)]
)
def test_flags_that_have_no_meaning_there(reader: Any, flags: int) -> None:
    with pytest.raises(MessageError, match="ReservedFlags"):
        list(Decoder(reader).feed(struct.pack("=HHIII", 1, 13, HEADER_BYTES, flags, 0), []))


def test_the_longest_message_of_a_command_that_nobody_knows() -> None:
    head = struct.pack("=HHIII", 1, 999, MAX_MESSAGE, 0, 0)
    (found,) = Decoder("server").feed(head + bytes(MAX_MESSAGE - HEADER_BYTES), [])
    assert found.command == 999
    with pytest.raises(MessageError, match="MessageTooLong"):
        list(Decoder("server").feed(struct.pack("=HHIII", 1, 999, MAX_MESSAGE + 1, 0, 0), []))


def test_a_payload_with_a_tail_has_its_own_sizes() -> None:
    least, largest = RegionData.sizes()
    assert RegionData.parse(bytes(largest)).data == bytes(largest - least)
    for size in (least - 1, largest + 1):
        with pytest.raises(ValueError, match=f"{least} to {largest} are expected"):
            RegionData.parse(bytes(size))


def test_the_most_writes_at_once() -> None:
    most = WriteMulti((WriteOne(0, 0, 8, bytes(8)),) * MAX_WRITES)
    assert WriteMulti.parse(most.pack()) == most
    with pytest.raises(ValueError, match=f"for {MAX_WRITES + 1} writes"):
        WriteMulti.parse(WriteMulti((*most.writes, most.writes[0])).pack())
    with pytest.raises(ValueError, match="8 or more"):
        WriteMulti.parse(bytes(7))


def test_version_data_ends_with_a_nul() -> None:
    assert parse_capabilities(b"{}\0") == Capabilities()
    with pytest.raises(MessageError, match="do not end with a NUL"):
        parse_capabilities(b"{}\n")


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file() -> Generator[OwnedFd]:
    fd = OwnedFd(os.memfd_create("region", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), 0x2000)
    yield fd
    fd.close()


def test_regions_with_flags_that_cannot_be() -> None:
    dma = table()
    assert [refusal(dma.map, asked(0, 0x1000, flags=flags), None) for flags in (0, 4, 7)] == ["DmaFlags"] * 3
    assert len(dma) == 0


def test_a_region_ends_where_addresses_and_offsets_end(file: OwnedFd) -> None:
    dma = table()
    for wrong in (asked(0, 0), asked(END - 0x1000, 0x1001), asked(0, 0x1000, offset=END - 0xFFF)):
        with pytest.raises(Refused, match="file offset") as caught:
            dma.map(wrong, None)
        assert caught.value.error.rule == "DmaRange"
    dma.map(asked(0, 0x1000, offset=END - 0x1000), None)
    assert refusal(dma.map, asked(0x1000, 0x1000, offset=0x1001), file) == "DmaFile"
    dma.map(asked(0x1000, 0x1000, offset=0x1000), file)
    assert len(dma) == 2


def test_a_region_that_ends_where_addresses_do_is_refused_before_it_is_answered() -> None:
    dma = table()
    assert refusal(dma.map, asked(END - 0x1000, 0x1000), None, later=True) == "DmaRange"
    dma.map(asked(END - 0x2000, 0x1000), None, later=True)
    dma.settle()
    assert len(dma) == 1


def test_a_region_needs_a_regular_file() -> None:
    left, right = os.pipe()
    os.close(right)
    fd = OwnedFd(left)
    with pytest.raises(Refused, match="no regular file"):
        table().map(asked(0, 0x1000), fd)
    fd.close()


def test_regions_lie_side_by_side_and_are_unmapped_so() -> None:
    dma = table()
    for at in (0x2000, 0x1000, 0x3000):
        dma.map(asked(at, 0x1000), None)
    assert refusal(dma.map, asked(0x2FFF, 1), None) == "DmaExists"
    assert refusal(dma.unmap, undone(0x1800, 0x1000)) == "UnmapSplit"
    dma.unmap(undone(0x2000, 0x1000))
    assert len(dma) == 2


def test_as_many_regions_as_are_answered() -> None:
    dma = table()
    for at in range(MAX_MAPS):
        dma.map(asked(at << 12, 0x1000), None, later=True)
    assert refusal(dma.map, asked(MAX_MAPS << 12, 0x1000), None) == "DmaSlots"
    assert len(dma) == MAX_MAPS


def test_ranges_that_cannot_be_unmapped() -> None:
    dma = table()
    dma.map(asked(0x1000, 0x1000), None)
    assert refusal(dma.unmap, undone(0x1000, 0, flags=2)) == "UnmapFlags"
    assert refusal(dma.unmap, undone(0, 0x1000, flags=2)) == "UnmapFlags"
    assert refusal(dma.unmap, undone(0x1000, 0)) == "DmaRange"
    assert refusal(dma.unmap, undone(0x1000, END - 0xFFF)) == "DmaRange"
    assert len(dma) == 1
    dma.unmap(undone(0x1000, END - 0x1000))
    assert len(dma) == 0


# --- the MSI-X capability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "status", "found"),
    [(0xF4, 0x10, True), (0x40, 0x10, True), (0xF4, 0, False), (0xF8, 0x10, False), (0x3C, 0x10, False)],
)
def test_where_an_msix_capability_can_be(position: int, status: int, *, found: bool) -> None:
    space = bytearray(256 + 16)
    space[0x06], space[0x34] = status, position
    space[position : position + 12] = struct.pack("=BBHII", 0x11, 0, 3, 0x2001, 0x3001)

    def read(offset: int, size: int) -> int:
        return int.from_bytes(space[offset : offset + size], "little")

    place = MsixPlace.find(read)
    assert (place is not None) == found
    if place is not None:
        assert (place.position, place.size, place.bar, place.offset) == (position, 4, 1, 0x2000)

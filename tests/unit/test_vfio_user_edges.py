"""Where what the vfio-user ends take begins and ends, without a connection: each number, and the next one."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user import wire as wire_module
from virtio_test.carrier.vfio_user.capabilities import Capabilities, parse_capabilities
from virtio_test.carrier.vfio_user.codec import Decoder, OwnedFd
from virtio_test.carrier.vfio_user.dma import MAX_MAPS, DmaTable
from virtio_test.carrier.vfio_user.messages import HEADER_BYTES, MAX_MESSAGE, IrqIndex, IrqSet
from virtio_test.carrier.vfio_user.payloads import MAX_WRITES, DmaMap, DmaUnmap, RegionData, WriteMulti, WriteOne
from virtio_test.carrier.vfio_user.rules import Refused
from virtio_test.carrier.vfio_user.vectors import ClientInterrupts, MsixPlace
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.errors import MessageError
from virtio_test.loop import OwnerLoop

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


@pytest.mark.parametrize(
    ("reader", "command", "reply"),
    [("client", 9, False), ("server", 9, True), ("server", 11, False), ("client", 11, True)],
)
def test_a_message_that_only_the_reader_sends(reader: Any, command: int, *, reply: bool) -> None:
    head = struct.pack("=HHIII", 1, command, HEADER_BYTES, reply, 0)
    with pytest.raises(MessageError, match="Direction"):
        list(Decoder(reader).feed(head, []))


@pytest.mark.parametrize(
    ("command", "least", "largest"), [(13, 0, 0), (7, 16, 16), (9, 16, 16), (10, 16, 16 + (1 << 20))]
)
def test_a_message_is_as_long_as_its_command_says(command: int, least: int, largest: int) -> None:
    for size in {least, largest}:
        head = struct.pack("=HHIII", 1, command, HEADER_BYTES + size, 0, 0)
        (found,) = Decoder("server").feed(head + bytes(size), [])
        assert found.command == command
    for size in (least - 1, largest + 1):
        head = struct.pack("=HHIII", 1, command, HEADER_BYTES + size, 0, 0)
        with pytest.raises(MessageError, match=r"MessageSize|MessageTooLong"):
            list(Decoder("server").feed(head, []))


@pytest.mark.parametrize(("count", "legal"), [(0, True), (1, True), (2, False)])
def test_as_many_fds_as_a_command_has(count: int, *, legal: bool) -> None:
    fds = [os.memfd_create("region", os.MFD_CLOEXEC) for _ in range(count)]
    data = struct.pack("=HHIII", 1, 2, HEADER_BYTES + 32, 0, 0) + asked(0, 0x1000).pack()
    found = Decoder("server").feed(data, fds)
    if legal:
        (message,) = found
        assert len(message.fds) == count
    else:
        with pytest.raises(MessageError, match="FdCount"):
            list(found)


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
    assert WriteMulti.parse(bytes(8)) == WriteMulti(())
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


@pytest.mark.parametrize(
    ("flags", "data", "number"),
    [
        (1, b"", errno.ENOTSUP),
        (3, b"", errno.ENOTSUP),
        (4, b"", errno.EINVAL),
        (6, b"", errno.EINVAL),
        (0, bytes(16), errno.EINVAL),
        (2, bytes(16), errno.EINVAL),
    ],
)
def test_flags_with_which_nothing_is_unmapped(flags: int, data: bytes, number: int) -> None:
    dma = table()
    dma.map(asked(0x1000, 0x1000), None)
    for address, size in ((0x1000, 0x1000), (0, 0)):
        with pytest.raises(Refused, match="UnmapFlags") as caught:
            dma.unmap(DmaUnmap(24 + len(data), flags, address, size, data))
        assert caught.value.errno == number
    assert len(dma) == 1
    dma.unmap(undone(0, 0, flags=2))
    assert len(dma) == 0


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


# --- the client's own table -------------------------------------------------------------------------------------------

VECTORS = 2
BAR = 3
AT = 0x100
UNMASKED = bytes(4)


class Hears(OwnerLoop):
    """The interrupts of a client that hears two vectors and the line, and what it asked of its server."""

    def __init__(self, place: MsixPlace | None = None) -> None:
        super().__init__()
        self.heard: dict[int, Callable[[], object]] = {}
        self.asked: list[tuple[int, IrqSet, int]] = []
        self.told: list[int | str] = []
        self.interrupts = ClientInterrupts(
            self,
            place,
            set_irqs=lambda index, flags, _, count, __: self.asked.append((index, flags, count)),
            counts={IrqIndex.INTX: 1, IrqIndex.MSIX: VECTORS},
        )
        self.interrupts.listen(message=self.told.append, line=lambda: self.told.append("line"))

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        calls: list[int] = []

        def bounded() -> None:
            calls.append(1)
            assert len(calls) < 20
            callback()

        self.heard[fd] = callback
        super().add_reader(fd, bounded)

    def fire(self, vector: int) -> None:
        """The server writes the eventfd of `vector`, or of the line."""
        os.eventfd_write(list(self.heard)[vector], 1)
        self.run_pending()

    def unmask(self, vector: int, *, bar: int = BAR) -> None:
        self.interrupts.written(bar, AT + 16 * vector + 12, UNMASKED)
        self.run_pending()


@pytest.fixture
def hears() -> Generator[Hears]:
    made = Hears(MsixPlace(0x40, VECTORS, BAR, AT))
    made.heard.clear()
    made.interrupts.control(0x8000)
    assert list(made.asked[-1]) == [IrqIndex.MSIX, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, VECTORS]
    yield made
    made.interrupts.close()


def test_a_vector_is_masked_by_its_own_bit_or_by_that_of_all(hears: Hears) -> None:
    hears.fire(0)
    assert hears.told == []
    hears.unmask(0)
    assert hears.told == [0]
    hears.interrupts.control(0xC000)
    hears.fire(0)
    hears.fire(1)
    assert hears.told == [0]
    hears.interrupts.control(0x8000)
    hears.run_pending()
    assert hears.told == [0, 0]
    hears.unmask(1)
    assert hears.told == [0, 0, 1]


def test_only_the_bar_of_the_table_holds_the_table(hears: Hears) -> None:
    hears.fire(1)
    hears.unmask(1, bar=BAR - 1)
    assert hears.told == []
    hears.unmask(1)
    assert hears.told == [1]


def test_a_client_without_a_table_has_the_line_alone() -> None:
    hears = Hears()
    assert (hears.interrupts.vectors, hears.asked) == (
        0,
        [(IrqIndex.INTX, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 1)],
    )
    hears.interrupts.written(BAR, AT, UNMASKED)
    hears.fire(0)
    assert hears.told == ["line"]
    assert hears.asked[1:] == [(IrqIndex.INTX, IrqSet.DATA_NONE | IrqSet.UNMASK, 1)]
    hears.interrupts.close()


def test_an_eventfd_that_somebody_has_read_meanwhile_is_no_interrupt(hears: Hears) -> None:
    hears.unmask(0)
    for each in hears.heard.values():
        each()
    assert hears.told == []


# --- one end of a connection ------------------------------------------------------------------------------------------


class Halting(Wire):
    """Its socket takes as many bytes at a time as it is told, at first, and all afterwards."""

    takes: Sequence[int | None] = ()

    def _send_some(self, data: bytes, fds: Sequence[int], flags: int) -> int:
        if not self.takes:
            return super()._send_some(data, fds, flags)
        (many, *self.takes) = self.takes
        return super()._send_some(data if many is None else data[:many], fds, flags) if many != 0 else 0


@pytest.fixture
def pair() -> Generator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_waiting_says_whether_there_is_something_to_read(pair: tuple[socket.socket, socket.socket]) -> None:
    wire = Wire(pair[0], "server")
    assert not wire.wait(0)
    assert not wire.wait(-1)
    pair[1].send(b"x")
    assert wire.wait(0)


@pytest.mark.parametrize("kind", ["file", "eventfd", "pipe", "null", "socket", "folder"])
def test_fds_that_can_hold_no_connection(pair: tuple[socket.socket, socket.socket], kind: str) -> None:
    opened = {
        "file": lambda: [os.memfd_create("region", os.MFD_CLOEXEC)],
        "eventfd": lambda: [os.eventfd(0)],
        "pipe": lambda: list(os.pipe()),
        "null": lambda: [os.open("/dev/null", os.O_RDONLY)],
        "socket": lambda: [os.dup(pair[0].fileno())],
        "folder": lambda: [os.open("/", os.O_RDONLY)],
    }[kind]()
    wire = Wire(pair[0], "server")
    socket.send_fds(pair[1], [struct.pack("=HHIII", 1, 2, HEADER_BYTES + 32, 0, 0)], opened[:1])
    if kind in ("socket", "folder"):
        with pytest.raises(MessageError, match="FdType"):
            wire.receive()
    else:
        assert wire.receive() == []
    wire.close()
    for fd in opened:
        os.close(fd)


def test_a_peer_that_has_gone_is_told_by_an_end_without_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    wire = Wire(pair[0], "server")
    assert wire.receive() is None
    assert not wire.closed
    pair[1].close()
    assert wire.receive() is None
    assert wire.closed


def test_a_message_goes_in_parts_while_the_patience_lasts(pair: tuple[socket.socket, socket.socket]) -> None:
    wire = Halting(pair[0], "server")
    wire.takes = (2, 0, 3)
    wire.send(b"0123456789")
    assert pair[1].recv(100) == b"0123456789"


def test_no_part_is_sent_when_the_patience_is_over(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "time", SimpleNamespace(monotonic=lambda: 1.0))
    for patience in (0.0, -1.0):
        wire = Halting(pair[0], "server", patience=patience)
        wire.takes = (1,)
        with pytest.raises(MessageError, match="RepliesUnread"):
            wire.send(b"0123")
        assert pair[1].recv(100) == b"0"


def test_a_full_socket_is_waited_for_and_not_asked_again_and_again(pair: tuple[socket.socket, socket.socket]) -> None:
    tried: list[int] = []

    class Counting(Wire):
        def _send_some(self, data: bytes, fds: Sequence[int], flags: int) -> int:
            tried.append(len(data))
            return super()._send_some(data, fds, flags)

    wire = Counting(pair[0], "server", patience=0.01)
    with pytest.raises(MessageError, match="RepliesUnread"):
        wire.send(bytes(1 << 24))
    assert len(tried) == 1

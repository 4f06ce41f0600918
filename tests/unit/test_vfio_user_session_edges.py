"""Where what a vfio-user session takes begins and ends, without a connection: each number, and the next one."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest
from virtio_test._core import GuestMemory, Notifier
from virtio_test.carrier.vfio_user.codec import Decoder, Message, OwnedFd
from virtio_test.carrier.vfio_user.irqs import Interrupts
from virtio_test.carrier.vfio_user.messages import Command, IrqIndex, IrqSet, RegionIndex
from virtio_test.carrier.vfio_user.payloads import (
    MAX_DATA,
    DeviceInfo,
    Empty,
    Feature,
    IrqInfo,
    MigrationData,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    SetIrqs,
    Version,
    WriteMulti,
    WriteOne,
)
from virtio_test.carrier.vfio_user.rules import Refused
from virtio_test.carrier.vfio_user.server import VfioUserServer
from virtio_test.carrier.vfio_user.session import Session
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci

from .pci_world import upper

CONFIG, ROM, VGA = RegionIndex.CONFIG, RegionIndex.ROM, RegionIndex.VGA
LARGE = 4
HELLO = Version(0, 0)


class Nowhere:
    """A client without memory."""

    def dma_read(self, address: int, count: int) -> bytes:
        raise OSError(address, count)

    def dma_write(self, address: int, data: bytes) -> None:
        raise OSError(address, data)


class Function(VirtioPci):
    """A function that notes whether it was asked of a notification."""

    def is_notification(self, bar: int, offset: int, length: int) -> bool:
        assert 0 <= bar <= 5
        return super().is_notification(bar, offset, length)


def function() -> Function:
    """Its BAR 4 is 4 MiB long: two queues are notified far from each other."""
    device = upper()
    plan = declare(device, flavour="non-transitional", multiplier=2 << 20)
    return Function(device, declaration=plan, loop=OwnerLoop(), memory=GuestMemory())


class Asked:
    """A session and its client's commands."""

    def __init__(self, *, hello: bool = True) -> None:
        self.function = function()
        self.session = Session(self.function, Nowhere())
        if hello:
            self.do(Command.VERSION, HELLO)

    def do(self, command: int, payload: Payload | None = None, *, no_reply: bool = False) -> Message | None:
        """The reply, after all that it leads to."""
        message = Message(7, command, Empty() if payload is None else payload, no_reply=no_reply)
        answer = self.session.handle(message)
        if answer.then is not None:
            answer.then()
        if answer.reply is None:
            return None
        (found,) = Decoder("client").feed(answer.reply)
        return found

    def refused(self, command: int, payload: Payload | None = None) -> int | None:
        found = self.do(command, payload)
        assert found is not None
        return found.errno


# --- which commands, and in which order -----------------------------------------------------------------------


def test_version_comes_first_and_once() -> None:
    asked = Asked(hello=False)
    with pytest.raises(MessageError, match=r"VersionFirst.*DEVICE_RESET came before"):
        asked.do(Command.DEVICE_RESET)
    found = asked.do(Command.VERSION, HELLO)
    assert found is not None
    assert isinstance(found.payload, Version)
    assert asked.refused(Command.DEVICE_RESET) is None
    with pytest.raises(MessageError, match=r"VersionFirst.*came again"):
        asked.do(Command.VERSION, HELLO)


@pytest.mark.parametrize("major", [1, 0xFFFF])
def test_another_major_version(major: int) -> None:
    asked = Asked(hello=False)
    with pytest.raises(MessageError, match="VersionMajor"):
        asked.do(Command.VERSION, Version(major, 0))
    assert asked.session.client is None


def test_commands_that_are_not_served() -> None:
    asked = Asked()
    assert asked.refused(Command.DEVICE_FEATURE, Feature(8, 1)) == errno.ENOTTY
    for command in (Command.MIG_DATA_READ, Command.MIG_DATA_WRITE):
        assert asked.refused(command, MigrationData(8, 1)) == errno.ENOTSUP
    with pytest.raises(MessageError, match="UnexpectedReply"):
        asked.do(14)


def test_who_wants_no_answer_learns_of_no_refusal() -> None:
    asked = Asked()
    assert asked.do(Command.REGION_WRITE, RegionData(0x3C, CONFIG, 1, b"\1"), no_reply=True) is None
    assert asked.function.read_config(0x3C, 1) == b"\1"
    with pytest.raises(MessageError, match="RegionRange"):
        asked.do(Command.REGION_WRITE, RegionData(256, CONFIG, 1, b"\1"), no_reply=True)
    assert asked.refused(Command.REGION_WRITE, RegionData(256, CONFIG, 1, b"\1")) == errno.EINVAL


# --- what touches neither queues nor memory -------------------------------------------------------------------


def prompt(asked: Asked, command: int, payload: Payload) -> bool:
    return asked.session.is_prompt(Message(7, command, payload))


def test_commands_that_may_be_served_inside_of_an_access() -> None:
    asked = Asked()
    place = asked.function.declaration.layout.notify
    kick = RegionData(place.offset, place.bar, 2, bytes(2))
    other = RegionData(0x14, place.bar, 1, b"\0")
    assert prompt(asked, Command.REGION_WRITE, kick)
    assert not prompt(asked, Command.REGION_WRITE, other)
    for region in (ROM, CONFIG, VGA, 0xFFFF_FFFF):
        assert not prompt(asked, Command.REGION_WRITE, RegionData(place.offset, region, 2, bytes(2)))
    one = WriteOne(place.offset, place.bar, 2, bytes(8))
    another = WriteOne(0x14, place.bar, 1, bytes(8))
    assert prompt(asked, Command.REGION_WRITE_MULTI, WriteMulti((one, one)))
    assert not prompt(asked, Command.REGION_WRITE_MULTI, WriteMulti((one, another)))
    assert prompt(asked, Command.REGION_READ, RegionAccess(0, place.bar, 1))
    assert prompt(asked, Command.DEVICE_GET_INFO, DeviceInfo(16))
    assert not prompt(asked, Command.DEVICE_RESET, Empty())
    assert not prompt(asked, 14, Empty())


# --- accesses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "offset", "count", "possible"),
    [
        (CONFIG, 0, 1, True),
        (CONFIG, 0, 256, True),
        (CONFIG, 0, 257, False),
        (CONFIG, 255, 1, True),
        (CONFIG, 255, 2, False),
        (CONFIG, 0, 0, False),
        (LARGE, 0, MAX_DATA, True),
        (LARGE, 0, MAX_DATA + 1, False),
        (VGA, 0, 1, False),
        (VGA + 1, 0, 1, False),
    ],
)
def test_accesses_within_a_region(region: int, offset: int, count: int, *, possible: bool) -> None:
    asked = Asked()
    expected = None if possible else errno.EINVAL
    assert asked.refused(Command.REGION_READ, RegionAccess(offset, region, count)) == expected
    data = bytes(min(count, MAX_DATA))
    assert asked.refused(Command.REGION_WRITE, RegionData(offset, region, count, data)) == expected


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_write_has_as_many_bytes_as_it_says(count: int) -> None:
    asked = Asked()
    assert asked.refused(Command.REGION_WRITE, RegionData(0x10, CONFIG, count, bytes(4))) == errno.EINVAL
    assert asked.refused(Command.REGION_WRITE, RegionData(0x10, CONFIG, 4, bytes(4))) is None


@pytest.mark.parametrize(("count", "possible"), [(0, False), (1, True), (8, True), (9, False)])
def test_the_bytes_of_one_write_of_several(count: int, *, possible: bool) -> None:
    asked = Asked()
    writes = WriteMulti((WriteOne(0x3C, CONFIG, count, b"\5" * 8),))
    assert asked.refused(Command.REGION_WRITE_MULTI, writes) == (None if possible else errno.EINVAL)
    assert asked.function.read_config(0x3C, 1) == (b"\5" if possible else b"\0")


def test_room_for_the_answer() -> None:
    asked = Asked()
    kinds: list[tuple[Command, type[Any], tuple[int, ...]]] = [
        (Command.DEVICE_GET_INFO, DeviceInfo, ()),
        (Command.DEVICE_GET_REGION_INFO, RegionInfo, (0, 8)),
        (Command.DEVICE_GET_IRQ_INFO, IrqInfo, (0, 4)),
    ]
    for command, kind, more in kinds:
        size = kind.sizes()[0]
        for argsz, expected in ((size - 1, errno.EINVAL), (size, None), (size + 1, None)):
            assert asked.refused(command, kind(argsz, *more)) == expected
        if more:
            assert asked.refused(command, kind(size, 0, more[1] + 1)) == errno.EINVAL


# --- interrupts -----------------------------------------------------------------------------------------------

N, B, E = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
MASK, TRIGGER = IrqSet.MASK, IrqSet.TRIGGER


@pytest.mark.parametrize(
    ("flags", "start", "count", "data", "rule"),
    [
        (0, 0, 1, b"", "IrqFlags"),
        (N, 0, 1, b"", "IrqFlags"),
        (TRIGGER, 0, 1, b"", "IrqFlags"),
        (N | B | TRIGGER, 0, 1, b"\1", "IrqFlags"),
        (N | MASK | TRIGGER, 0, 1, b"", "IrqFlags"),
        (N | TRIGGER | 64, 0, 1, b"", "IrqFlags"),
        (N | TRIGGER, 0, 1, b"\1", "IrqData"),
        (B | TRIGGER, 0, 2, b"\1", "IrqData"),
        (B | TRIGGER, 0, 1, b"\1\1", "IrqData"),
        (N | TRIGGER, 1, 0, b"", "IrqRange"),
        (N | MASK, 0, 0, b"", "IrqRange"),
        (B | TRIGGER, 0, 0, b"", "IrqRange"),
        (E | TRIGGER, 0, 0, b"", "IrqRange"),
        (N | TRIGGER, 0, 5, b"", "IrqRange"),
        (N | TRIGGER, 4, 1, b"", "IrqRange"),
        (N | TRIGGER, 3, 2, b"", "IrqRange"),
        (N | TRIGGER, 0, 0, b"", None),
        (N | TRIGGER, 0, 4, b"", None),
        (N | TRIGGER, 3, 1, b"", None),
        (B | MASK, 2, 2, b"\1\1", None),
        (E | TRIGGER, 0, 4, b"", None),
    ],
)
def test_interrupts_that_can_be_set(flags: int, start: int, count: int, data: bytes, rule: str | None) -> None:
    interrupts = Interrupts(OwnerLoop(), vectors=4, has_line=True)
    asked = SetIrqs(20, flags, IrqIndex.MSIX, start, count, data)
    if rule is None:
        interrupts.set(asked, [])
    else:
        with pytest.raises(Refused) as found:
            interrupts.set(asked, [])
        assert found.value.error.rule == rule


def test_what_is_asked_without_fds_takes_them_away() -> None:
    interrupts = Interrupts(OwnerLoop(), vectors=4, has_line=True)
    ear = Notifier.eventfd()
    listen = SetIrqs(20, E | TRIGGER, IrqIndex.MSIX, 0, 1)
    interrupts.set(listen, [OwnedFd(os.dup(ear.fileno()))])
    interrupts.set(SetIrqs(20, N | TRIGGER, IrqIndex.MSIX, 1, 3), [])
    interrupts.message(0, 0, 0)
    assert ear.drain() == 1
    interrupts.set(SetIrqs(20, N | TRIGGER, IrqIndex.MSIX, 0, 0), [])
    interrupts.message(0, 0, 0)
    assert ear.drain() == 0
    interrupts.close()


def test_only_eventfds_take_interrupts() -> None:
    interrupts = Interrupts(OwnerLoop(), vectors=4, has_line=True)
    fd = os.memfd_create("no eventfd", os.MFD_CLOEXEC)
    with pytest.raises(Refused, match="no eventfd"):
        interrupts.set(SetIrqs(20, E | TRIGGER, IrqIndex.MSIX, 0, 1), [OwnedFd(fd)])
    with pytest.raises(Refused, match="interrupt type 5 of 5"):
        interrupts.info(5)
    assert interrupts.info(4).count == 1


# --- the server -----------------------------------------------------------------------------------------------


def test_what_can_be_served() -> None:
    endpoint = function()
    with pytest.raises(InvalidArgument, match="not the endpoint's own"):
        VfioUserServer(endpoint, path="/none/s", loop=OwnerLoop())
    for loop in (None, endpoint.loop):
        with pytest.raises(InvalidArgument, match="no such folder"):
            VfioUserServer(endpoint, path="/none/s", loop=loop)
    endpoint.memory.add_region(0, 4096)
    with pytest.raises(InvalidArgument, match="guest memory already"):
        VfioUserServer(endpoint, path="/none/s")


def test_a_server_without_a_client_reads_nothing() -> None:
    ours, theirs = socket.socketpair()
    with VfioUserServer(function(), fd=theirs.detach()) as server, ours:
        assert server.session is not None
        ours.shutdown(socket.SHUT_WR)
        for _ in range(2):
            server._readable()  # pyright: ignore[reportPrivateUsage]
            assert (server.session, server.finished) == (None, True)
        assert server.last_error is None

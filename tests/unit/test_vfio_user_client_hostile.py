"""A vfio-user server that floods, does not read and exaggerates: the client stays bounded, and says what it found."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

import pytest
from virtio_test.carrier.vfio_user.capabilities import Capabilities, pack_capabilities
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import Decoder, Message, encode, encode_reply
from virtio_test.carrier.vfio_user.messages import MAJOR, MINOR, Command, IrqIndex
from virtio_test.carrier.vfio_user.payloads import (
    DeviceInfo,
    DmaAccess,
    IrqInfo,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    Version,
)
from virtio_test.carrier.vfio_user.vectors import MAX_VECTORS
from virtio_test.errors import MessageError, PeerDisconnected, PeerTimeout

from .vfio_user_world import small_memory
from .world import eventually, open_fds

_MSIX_AT = 0x40


@pytest.fixture(autouse=True)
def nothing_leaks(caplog: pytest.LogCaptureFixture) -> Generator[None]:
    # What is kept of a log keeps its error, and that the client.
    caplog.set_level(logging.CRITICAL, logger="virtio_test.vfio_user")
    before = open_fds()
    yield
    assert eventually(lambda: open_fds() == before), f"{open_fds()} fds are open, {before} were"


def configuration() -> bytearray:
    """A function with nothing but an MSI-X capability, of 2048 entries."""
    space = bytearray(256)
    space[0x06] = 0x10
    space[0x34] = _MSIX_AT
    space[_MSIX_AT : _MSIX_AT + 4] = bytes((0x11, 0, 0xFF, 0x07))
    return space


class Liar:
    """A server that answers what a client asks at first, and then does what its `plan` says."""

    def __init__(self, connection: socket.socket, plan: bytes, *, deaf: bool) -> None:
        self._connection = connection
        self._plan = plan
        self._deaf = deaf
        self._space = configuration()
        self.over = threading.Event()
        self.up = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        decoder = Decoder("server")
        self._connection.settimeout(0.01)
        with suppress(OSError):
            while not self.up.is_set():
                with suppress(TimeoutError):
                    for message in decoder.feed(self._connection.recv(decoder.wanted)):
                        self._answer(message)
            while not self.over.is_set():
                with suppress(TimeoutError):
                    if self._plan:
                        self._connection.sendall(self._plan)
                    if not self._deaf:
                        self._connection.recv(1 << 16)

    def _answer(self, message: Message) -> None:
        asked, reply = message.payload, Payload()
        match asked:
            case Version():
                reply = Version(MAJOR, MINOR, pack_capabilities(Capabilities()))
            case DeviceInfo():
                reply = DeviceInfo(16, 2, 9, 5)
            case RegionInfo():
                reply = RegionInfo(32, 3, asked.index, size=len(self._space))
            case IrqInfo():
                reply = IrqInfo(16, 1, asked.index, count=0xFFFF_FFFF)
            case RegionAccess(offset=0x80):
                reply = RegionData(asked.offset, asked.region, asked.count, bytes(1 << 20))
            case RegionAccess():
                data = bytes(self._space[asked.offset : asked.offset + asked.count])
                reply = RegionData(asked.offset, asked.region, asked.count, data)
            case _:
                pass
        self._connection.sendall(encode_reply(message.command, message.id, reply))


@contextmanager
def lied_to(plan: bytes = b"", *, deaf: bool = False, timeout: float = 1.0) -> Generator[tuple[VfioUserClient, Liar]]:
    ours, theirs = socket.socketpair()
    liar = Liar(theirs, plan, deaf=deaf)
    try:
        with VfioUserClient(connection=ours, memory=small_memory(), timeout=timeout) as client:
            yield client, liar
    finally:
        liar.up.set()
        liar.over.set()
        liar.thread.join()
        theirs.close()


def test_as_many_interrupts_as_it_says_are_no_reason_for_as_many_fds() -> None:
    with lied_to() as (client, _):
        assert client.irqs[IrqIndex.INTX].count == 0xFFFF_FFFF
        assert client.msix is not None
        assert client.msix.size == 2048
        assert client.interrupts is not None
        assert client.interrupts.vectors == MAX_VECTORS
        before = open_fds()
        client.listen(message=lambda _: None, line=lambda: None)
        assert open_fds() == before + 1
        client.interrupts.control(0x8000)
        assert open_fds() == before + MAX_VECTORS


def test_a_server_that_asks_and_does_not_read_is_left_and_nobody_else_is_told() -> None:
    flood = encode(Command.DMA_READ, 7, DmaAccess(0, 1 << 19)) * 64
    with lied_to(flood, deaf=True) as (client, liar):
        liar.up.set()
        start = time.monotonic()
        ticks: list[int] = []
        client.loop.call_soon(lambda: ticks.append(1))
        assert client.loop.run(timeout=2.5) is False
        assert time.monotonic() - start < 10
        assert ticks
        with pytest.raises(PeerDisconnected):
            client.read_config(0, 2)


def test_a_server_that_asks_instead_of_answering_is_bounded() -> None:
    flood = encode(Command.DMA_READ, 7, DmaAccess(0, 16)) * 64
    with lied_to(flood) as (client, liar):
        liar.up.set()
        start = time.monotonic()
        with pytest.raises(PeerTimeout, match="REGION_READ"):
            client.read_config(0, 2)
        assert time.monotonic() - start < 5
        assert client.served > 64


def test_a_server_that_reads_nothing_gets_no_half_message_and_then_another() -> None:
    with lied_to(deaf=True) as (client, liar):
        liar.up.set()

        def kick_for_ever() -> None:
            for _ in range(100_000):
                client.write_bar(0, 0, 4, 1)

        with pytest.raises(MessageError) as found:
            kick_for_ever()
        assert found.value.rule == "RepliesUnread"
        with pytest.raises(PeerDisconnected):
            client.write_bar(0, 0, 4, 1)


def test_a_reply_with_a_mebibyte_for_two_bytes_is_one_short_line() -> None:
    with lied_to() as (client, _):
        with pytest.raises(MessageError) as found:
            client.read_config(0x80, 2)
        assert found.value.rule == "ReplyData"
        assert len(str(found.value)) < 200

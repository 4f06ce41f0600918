"""Where what a vfio-user client takes and does begins and ends: each number, and the next one.

Its server is at the other end of a real connection, and answers in the client's own thread, before a message is sent.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from types import SimpleNamespace

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user import client as client_module
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import Message, encode, encode_error, encode_reply
from virtio_test.carrier.vfio_user.messages import Command, RegionIndex
from virtio_test.carrier.vfio_user.payloads import (
    MAX_DATA,
    DeviceInfo,
    DmaAccess,
    DmaData,
    DmaMap,
    DmaUnmap,
    DmaWritten,
    IrqInfo,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    Version,
)
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected, PeerTimeout, StateError

from .vfio_user_world import small_memory

MSIX_AT = 0x40
VECTORS = 3
BASE = 0x10000
ROOM = 0x3000
CONFIG = RegionIndex.CONFIG
Answer = Callable[[Message], bytes]


class Server:
    """Answers what a client asks as its `answers` say, or as a function with an MSI-X capability would."""

    def __init__(self, connection: socket.socket) -> None:
        self.wire = Wire(connection, "server")
        self.answers: dict[int, Answer] = {}
        self.got: list[Message] = []
        self.late = False
        self._connection = connection
        self._space = bytearray(256)
        self._space[0x06], self._space[0x34] = 0x10, MSIX_AT
        self._space[MSIX_AT : MSIX_AT + 4] = bytes((0x11, 0, VECTORS - 1, 0))

    def turn(self) -> None:
        """Answer what has come."""
        while self.wire.wait(0) and (messages := self.wire.receive()) is not None:
            for message in messages:
                self.got.append(message)
                if not message.no_reply and not message.reply:
                    self.say(self.answers.get(message.command, self.usual)(message))

    def say(self, data: bytes) -> None:
        if data:
            self._connection.sendall(data)

    def usual(self, message: Message) -> bytes:
        asked, reply = message.payload, Payload()
        match asked:
            case Version():
                reply = Version(0, 0)
            case DeviceInfo():
                reply = DeviceInfo(16, 2, 9, 5)
            case RegionInfo():
                reply = RegionInfo(32, 3, asked.index, size=len(self._space))
            case IrqInfo():
                reply = IrqInfo(16, 1, asked.index, count=VECTORS)
            case RegionAccess():
                data = bytes(self._space[asked.offset : asked.offset + asked.count])
                reply = RegionData(asked.offset, asked.region, asked.count, data)
            case RegionData():
                reply = RegionAccess(asked.offset, asked.region, asked.count)
            case DmaUnmap():
                reply = asked
            case _:
                pass
        return encode_reply(message.command, message.id, reply)

    def last(self) -> Message:
        """The last message that came, when all are read."""
        self.turn()
        return self.got[-1]


@pytest.fixture
def pair() -> Generator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def server(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(pair[1])

    class Prompt(Wire):
        """The server has answered before a message is sent; late, when nobody waits any more."""

        def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
            super().send(data, fds)
            if not made.late:
                made.turn()

        def wait(self, seconds: float) -> bool:
            return super().wait(0 if made.late else seconds)

        def receive(self) -> list[Message] | None:
            made.turn()
            return super().receive()

    monkeypatch.setattr(client_module, "Wire", Prompt)
    return made


@pytest.fixture
def client(server: Server, pair: tuple[socket.socket, socket.socket]) -> Iterator[VfioUserClient]:
    memory = GuestMemory([(BASE, ROOM)])
    with VfioUserClient(connection=pair[0], memory=memory, transfer=0x1000) as made:
        yield made


def as_reply(command: int, payload: Payload) -> Answer:
    return lambda message: encode_reply(command, message.id, payload)


def refused(message: Message) -> bytes:
    return encode_error(message.command, message.id, errno.EINVAL)


# --- the beginning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", [1, MAX_DATA])
def test_the_least_and_the_largest_transfer(
    server: Server, pair: tuple[socket.socket, socket.socket], transfer: int
) -> None:
    VfioUserClient(connection=pair[0], memory=small_memory(), transfer=transfer).close()
    assert f'"max_data_xfer_size": {transfer},'.encode() in server.got[0].payload.pack()


@pytest.mark.parametrize("transfer", [-1, 0, MAX_DATA + 1])
def test_transfers_that_no_message_carries(pair: tuple[socket.socket, socket.socket], transfer: int) -> None:
    with pytest.raises(InvalidArgument, match=f"1 to {MAX_DATA} are possible"):
        VfioUserClient(connection=pair[0], transfer=transfer)


def test_a_client_has_one_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    for options in ({}, {"path": "/none", "connection": pair[0]}):
        with pytest.raises(InvalidArgument, match="either a socket path or a connection"):
            VfioUserClient(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [(1, 0), (0, 1), (0xFFFF, 0xFFFF)])
def test_a_version_that_was_not_asked_for(
    server: Server, pair: tuple[socket.socket, socket.socket], version: tuple[int, int]
) -> None:
    server.answers[Command.VERSION] = as_reply(Command.VERSION, Version(*version))
    with pytest.raises(MessageError, match="VersionMajor"):
        VfioUserClient(connection=pair[0])


# --- commands and replies -------------------------------------------------------------------------------------


def test_a_refusal_is_told_whatever_was_expected(server: Server, client: VfioUserClient) -> None:
    server.answers[Command.DMA_MAP] = refused
    with pytest.raises(MessageError, match=r"CommandRefused.*EINVAL"):
        client.export(0, 0x1000)
    with pytest.raises(MessageError, match=r"CommandRefused"):
        client.request(Command.DEVICE_GET_INFO, DeviceInfo(16), RegionInfo)


def test_the_reply_to_another_command_with_the_id_of_ours(server: Server, client: VfioUserClient) -> None:
    server.answers[Command.DEVICE_RESET] = as_reply(Command.DEVICE_GET_INFO, DeviceInfo(16))
    with pytest.raises(MessageError, match="DEVICE_GET_INFO answers DEVICE_RESET"):
        client.reset()
    with pytest.raises(PeerDisconnected):
        client.reset()


def test_a_reply_that_is_there_when_the_time_is_over_is_late(
    client: VfioUserClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: 1.0))
    monkeypatch.setattr(client, "_timeout", 0.0)
    with pytest.raises(PeerTimeout, match="DEVICE_GET_INFO"):
        client.request(Command.DEVICE_GET_INFO, DeviceInfo(16), DeviceInfo)


def test_what_comes_after_the_wait_is_not_looked_for(server: Server, client: VfioUserClient) -> None:
    server.late = True
    with pytest.raises(PeerTimeout, match="DEVICE_GET_INFO"):
        client.request(Command.DEVICE_GET_INFO, DeviceInfo(16), DeviceInfo)


def test_a_connection_that_ends_instead_of_an_answer(
    server: Server, client: VfioUserClient, pair: tuple[socket.socket, socket.socket]
) -> None:
    def leave(_: Message) -> bytes:
        pair[1].shutdown(socket.SHUT_WR)
        return b""

    server.answers[Command.DEVICE_RESET] = leave
    with pytest.raises(PeerDisconnected, match="instead of answering DEVICE_RESET"):
        client.reset()
    with pytest.raises(PeerDisconnected, match="has closed"):
        client.command(Command.DEVICE_RESET, no_reply=True)


# --- memory ---------------------------------------------------------------------------------------------------


def told(server: Server, client: VfioUserClient, command: Command, payload: Payload) -> Payload | int | None:
    """What the client answers to an access to its memory: data, or an errno."""
    server.say(encode(command, 7, payload))
    client.loop.run_pending()
    message = server.last()
    assert (message.command, message.id, message.reply) == (command, 7, True)
    return message.payload if message.errno is None else message.errno


READS = [
    (BASE, 1, True),
    (BASE, 0, False),
    (BASE, 0x1000, True),
    (BASE, 0x1001, False),
    (BASE - 1, 1, False),
    (BASE - 1, 2, False),
    (BASE + ROOM - 1, 1, True),
    (BASE + ROOM - 1, 2, False),
    (BASE + ROOM, 1, False),
]


@pytest.mark.parametrize(("address", "count", "served"), READS)
def test_the_device_reads_what_was_exported(
    server: Server, client: VfioUserClient, address: int, count: int, *, served: bool
) -> None:
    found = told(server, client, Command.DMA_READ, DmaAccess(address, count))
    assert found == (DmaData(address, count, bytes(count)) if served else errno.EFAULT)
    found = told(server, client, Command.DMA_WRITE, DmaData(address, count, b"\1" * count))
    assert found == (DmaWritten(address, count) if served else errno.EFAULT)


@pytest.mark.parametrize("address", [BASE - 0x1000, BASE - 1, BASE + ROOM - 1, BASE + ROOM])
def test_memory_that_was_not_exported_is_not_the_device_s(
    server: Server, pair: tuple[socket.socket, socket.socket], address: int
) -> None:
    memory = GuestMemory([(BASE - 0x1000, 0x1000), (BASE, ROOM), (BASE + ROOM, 0x1000)])
    with VfioUserClient(connection=pair[0], memory=memory) as client:
        client.withdraw(BASE - 0x1000, 0x1000)
        client.withdraw(BASE + ROOM, 0x1000)
        assert told(server, client, Command.DMA_READ, DmaAccess(address, 2)) == errno.EFAULT
        assert told(server, client, Command.DMA_WRITE, DmaData(address, 2, b"ab")) == errno.EFAULT
        assert told(server, client, Command.DMA_READ, DmaAccess(BASE, ROOM)) == DmaData(BASE, ROOM, bytes(ROOM))


def test_the_device_writes_where_it_may(server: Server, pair: tuple[socket.socket, socket.socket]) -> None:
    memory = GuestMemory([(BASE, ROOM)])
    with VfioUserClient(connection=pair[0], memory=memory) as client:
        client.withdraw(BASE, ROOM)
        client.export(BASE, ROOM, writable=False)
        asked = server.got[-1].payload
        assert isinstance(asked, DmaMap)
        assert asked.flags == 1
        assert told(server, client, Command.DMA_READ, DmaAccess(BASE, 4)) == DmaData(BASE, 4, bytes(4))
        assert told(server, client, Command.DMA_WRITE, DmaData(BASE, 4, b"\1" * 4)) == errno.EFAULT
        assert memory.read(BASE, 4) == bytes(4)


def test_an_access_that_wants_no_answer_gets_none(server: Server, client: VfioUserClient) -> None:
    before = len(server.got)
    server.say(encode(Command.DMA_WRITE, 7, DmaData(BASE, 1, b"\1"), no_reply=True))
    server.say(encode(Command.DMA_READ, 8, DmaAccess(0, 1), no_reply=True))
    client.loop.run_pending()
    client.loop.run_pending()
    server.turn()
    assert client.served == 2
    assert client.memory.read(BASE, 1) == b"\1"
    assert len(server.got) == before


# --- the bus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        RegionData(1, 2, 4, bytes(4)),
        RegionData(0, 3, 4, bytes(4)),
        RegionData(0, 2, 5, bytes(4)),
        RegionData(0, 2, 4, bytes(3)),
        RegionData(0, 2, 4, bytes(5)),
    ],
)
def test_data_that_were_not_asked_for(server: Server, client: VfioUserClient, answer: RegionData) -> None:
    server.answers[Command.REGION_READ] = as_reply(Command.REGION_READ, answer)
    with pytest.raises(MessageError, match="ReplyData"):
        client.read_bar(2, 0, 4)


def test_a_bus_where_nobody_answers_reads_ones(server: Server, client: VfioUserClient) -> None:
    server.answers[Command.REGION_READ] = refused
    assert client.read_bar(2, 0, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(("offset", "size"), [(255, 1), (252, 4), (0, 8)])
def test_configuration_space_to_its_end(server: Server, client: VfioUserClient, offset: int, size: int) -> None:
    client.write_config(offset, size, 1)
    assert server.last().payload == RegionData(offset, CONFIG, size, b"\1".ljust(size, b"\0"))
    client.read_config(offset, size)
    assert server.last().payload == RegionAccess(offset, CONFIG, size)


@pytest.mark.parametrize(("offset", "size"), [(256, 1), (253, 4), (255, 2)])
def test_what_lies_behind_configuration_space_is_not_asked_for(
    server: Server, client: VfioUserClient, offset: int, size: int
) -> None:
    before = len(server.got)
    client.write_config(offset, size, 1)
    assert client.read_config(offset, size) == (1 << 8 * size) - 1
    server.turn()
    assert len(server.got) == before


@pytest.mark.parametrize(("bar", "size"), [(0, 4), (5, 4), (5, 1 << 20)])
def test_a_bar_is_placed_once(client: VfioUserClient, bar: int, size: int) -> None:
    assert client.place_bar(bar, size, io=False) == client.place_bar(bar, size, io=False) >= 0xE000_0000


@pytest.mark.parametrize(("bar", "size"), [(-1, 16), (6, 16), (0, 2), (0, 1), (0, 0), (0, 6), (0, 24)])
def test_a_bar_that_cannot_be(client: VfioUserClient, bar: int, size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"BAR {bar} of {size} bytes"):
        client.place_bar(bar, size, io=False)


def test_a_message_for_each_vector(client: VfioUserClient) -> None:
    assert [client.message(vector)[1] for vector in range(VECTORS)] == [0, 1, 2]
    for vector in (-1, VECTORS):
        with pytest.raises(StateError, match=f"there are {VECTORS}"):
            client.message(vector)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_values_that_fit_into_their_access(server: Server, client: VfioUserClient, size: int) -> None:
    largest = (1 << 8 * size) - 1
    for value in (0, largest):
        client.write_bar(0, 8, size, value)
        assert server.last().payload == RegionData(8, 0, size, value.to_bytes(size, "little"))
    for value in (-1, largest + 1):
        with pytest.raises(InvalidArgument, match="does not fit"):
            client.write_bar(0, 8, size, value)


@pytest.mark.parametrize("size", [0, 3, 5, 16])
def test_accesses_that_no_bus_has(client: VfioUserClient, size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"an access of {size} bytes"):
        client.write_bar(0, 8, size, 0)


def test_a_reply_that_nobody_waits_for_is_the_end(
    server: Server, client: VfioUserClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="virtio_test.vfio_user")
    server.say(encode_reply(Command.DEVICE_RESET, 1))
    client.loop.run_pending()
    with closing(client), pytest.raises(PeerDisconnected):
        client.reset()

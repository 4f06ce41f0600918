"""A server's connection and the accesses of its device to memory that the client withholds, in one thread.

What the client says is in the socket before the device asks: the ids of the server's commands are 1, 2 and so on.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user import connection as connection_module
from virtio_test.carrier.vfio_user.codec import Decoder, Message, encode, encode_error, encode_reply
from virtio_test.carrier.vfio_user.connection import Connection
from virtio_test.carrier.vfio_user.messages import Command
from virtio_test.carrier.vfio_user.payloads import (
    DmaData,
    DmaWritten,
    Payload,
    RegionAccess,
    RegionData,
    Version,
)
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.devices.test import TestDevice
from virtio_test.errors import MessageError, PeerDisconnected, PeerError, PeerTimeout, StateError
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.function import VirtioPci

from .vfio_user_world import silent

READ, WRITE, RESET = Command.DMA_READ, Command.DMA_WRITE, Command.DEVICE_RESET
LONG = 10.0


class Function(VirtioPci):
    """A function that does something of its own when its configuration space is read."""

    then: Callable[[], object] | None = None

    def read_config(self, offset: int, length: int) -> bytes:
        if self.then is not None:
            self.then()
        return super().read_config(offset, length)


class Ends:
    """The connection, and the client's end of it."""

    def __init__(self, *, patience: float) -> None:
        self.client, theirs = socket.socketpair()
        self.function = Function(TestDevice(console=silent), loop=OwnerLoop(), memory=GuestMemory())
        self.ended: list[int] = []
        self.connection = Connection(theirs, self.function, ended=lambda: self.ended.append(1), patience=patience)
        self._decoder = Decoder("client")
        self.say(encode(Command.VERSION, 1, Version(0, 0)))
        assert self.connection.readable()
        assert self.heard() == [(Command.VERSION, 1)]

    def say(self, *data: bytes) -> None:
        self.client.sendall(b"".join(data))

    def heard(self) -> list[tuple[int, int]]:
        """The commands and ids of what has come to the client."""
        try:
            data = self.client.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        return [(each.command, each.id) for each in self._decoder.feed(data)]

    def in_thread(self, what: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
        """Do it in a thread; what it gives, or the exception that it raises."""
        found: list[object] = []

        def run() -> None:
            try:
                found.append(what())
            except Exception as error:  # noqa: BLE001 - looked at by the test
                found.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, found


Made = Callable[..., Ends]


@pytest.fixture
def ends() -> Generator[Made]:
    made: list[Ends] = []

    def make(*, patience: float = LONG) -> Ends:
        made.append(Ends(patience=patience))
        return made[-1]

    yield make
    for each in made:
        each.connection.close()
        each.client.close()


class Clock(SimpleNamespace):
    """A time that stands still, and ends what asks for it without end."""

    asked = 0

    def monotonic(self) -> float:
        self.asked += 1
        assert self.asked < 100
        return 1.0


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes, and no wait takes any."""
    monkeypatch.setattr(connection_module, "time", Clock())
    wait = Wire.wait

    def at_once(wire: Wire, _: float) -> bool:
        return wait(wire, 0)

    monkeypatch.setattr(Wire, "wait", at_once)


def given(number: int, payload: Payload) -> bytes:
    return encode_reply(READ if isinstance(payload, DmaData) else WRITE, number, payload)


DATA = given(1, DmaData(8, 2, b"ab"))


# --- what is asked, and what answers it -----------------------------------------------------------------------


def test_what_the_client_gives_and_takes(ends: Made) -> None:
    both = ends()
    both.say(DATA, given(2, DmaWritten(16, 3)))
    assert both.connection.dma_read(8, 2) == b"ab"
    both.connection.dma_write(16, b"xyz")
    assert both.heard() == [(READ, 1), (WRITE, 2)]
    assert not both.connection.dead


@pytest.mark.parametrize(
    "answer", [DmaData(9, 2, b"ab"), DmaData(8, 1, b"ab"), DmaData(8, 3, b"ab"), DmaData(8, 2, b"a"), DmaData(8, 2)]
)
def test_data_that_answer_something_else(ends: Made, answer: DmaData) -> None:
    both = ends()
    both.say(given(1, answer))
    with pytest.raises(MessageError, match="ReplyData"):
        both.connection.dma_read(8, 2)
    assert both.connection.dead
    assert not both.connection.readable()


@pytest.mark.parametrize("answer", [DmaWritten(9, 2), DmaWritten(8, 1), DmaWritten(8, 3)])
def test_a_write_that_was_another(ends: Made, answer: DmaWritten) -> None:
    both = ends()
    both.say(given(1, answer))
    with pytest.raises(MessageError, match="ReplyData"):
        both.connection.dma_write(8, b"ab")
    assert both.connection.dead


def test_who_refuses_stays(ends: Made) -> None:
    both = ends()
    both.say(encode_error(READ, 1, errno.EFAULT), given(2, DmaData(8, 2, b"ab")))
    with pytest.raises(PeerError, match="refused DMA_READ: errno 14"):
        both.connection.dma_read(8, 2)
    assert both.connection.dma_read(8, 2) == b"ab"


def test_nothing_is_asked_of_a_dead_connection(ends: Made) -> None:
    both = ends()
    both.say(given(1, DmaData(0, 0)), given(2, DmaData(8, 2, b"ab")))
    with pytest.raises(MessageError):
        both.connection.dma_read(8, 2)
    with pytest.raises(PeerDisconnected):
        both.connection.dma_read(8, 2)
    assert both.heard() == [(READ, 1)]
    both.function.loop.run_pending()
    assert both.ended == [1]


@pytest.mark.parametrize("number", [0, 2, 0xFFFF])
def test_a_reply_with_an_id_that_nobody_sent(ends: Made, number: int) -> None:
    both = ends()
    both.say(given(number, DmaData(8, 2, b"ab")))
    with pytest.raises(MessageError, match="UnexpectedReply"):
        both.connection.dma_read(8, 2)


def test_a_reply_to_another_command(ends: Made) -> None:
    both = ends()
    both.say(given(1, DmaWritten(8, 2)))
    with pytest.raises(MessageError, match="UnexpectedReply"):
        both.connection.dma_read(8, 2)


def test_a_client_that_goes_instead_of_an_answer_has_broken_no_rule(ends: Made) -> None:
    both = ends()
    both.client.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerDisconnected):
        both.connection.dma_read(8, 2)
    assert both.connection.dead
    assert both.connection.error is None


def test_a_client_that_goes_is_found_by_reading(ends: Made) -> None:
    both = ends()
    assert both.connection.readable()
    both.client.shutdown(socket.SHUT_WR)
    assert not both.connection.readable()
    assert not both.connection.dead


# --- how long it is waited for --------------------------------------------------------------------------------


def test_a_reply_that_is_there_when_the_time_is_over_is_late(ends: Made, still: None) -> None:
    both = ends(patience=0.0)
    both.say(DATA)
    with pytest.raises(MessageError, match="ReplyLate"):
        both.connection.dma_read(8, 2)
    assert both.connection.dead


def test_what_comes_after_the_wait_is_not_looked_for(ends: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ends()

    def nothing(_wire: Wire, _seconds: float) -> bool:
        return False

    def receive(_: Wire) -> list[Message] | None:
        raise AssertionError("the wait has ended with nothing")

    monkeypatch.setattr(Wire, "wait", nothing)
    monkeypatch.setattr(Wire, "receive", receive)
    with pytest.raises(MessageError, match="ReplyLate"):
        both.connection.dma_read(8, 2)


def test_an_access_is_given_up_when_the_client_waits_itself(ends: Made, still: None) -> None:
    both = ends()
    both.say(encode(RESET, 7))
    with pytest.raises(PeerTimeout, match="DMA_READ is given up"):
        both.connection.dma_read(8, 2)
    # Until what it waits for was done, no other access is tried.
    both.say(given(2, DmaData(8, 2, b"ab")))
    with pytest.raises(StateError, match="cannot serve its memory"):
        both.connection.dma_read(8, 2)
    both.say(DATA)
    with pytest.raises(MessageError, match="UnexpectedReply"):
        both.connection.readable()
    assert both.heard() == [(READ, 1), (RESET, 7)]


def test_the_reply_to_an_access_that_was_given_up_is_nothing_any_more(ends: Made, still: None) -> None:
    both = ends()
    both.say(encode(RESET, 7))
    with pytest.raises(PeerTimeout):
        both.connection.dma_read(8, 2)
    both.say(DATA, given(2, DmaData(8, 2, b"cd")))
    both.function.loop.run_pending()
    assert both.connection.dma_read(8, 2) == b"cd"
    both.say(DATA)
    with pytest.raises(MessageError, match="UnexpectedReply"):
        both.connection.readable()


def test_a_client_that_wants_no_answer_does_not_wait(ends: Made, still: None) -> None:
    both = ends()
    both.say(encode(RESET, 7, no_reply=True))
    with pytest.raises(MessageError, match="ReplyLate"):
        both.connection.dma_read(8, 2)
    assert both.connection.dead


def test_a_write_that_is_answered_already_is_done_afterwards(ends: Made) -> None:
    both = ends()
    both.say(encode(Command.REGION_WRITE, 7, RegionData(0x3C, 7, 1, b"\x2a")), DATA)
    assert both.connection.dma_read(8, 2) == b"ab"
    assert both.heard() == [(READ, 1), (Command.REGION_WRITE, 7)]
    assert both.function.read_config(0x3C, 1) == b"\0"
    both.function.loop.run_pending()
    assert both.function.read_config(0x3C, 1) == b"\x2a"


# --- how much may come meanwhile ------------------------------------------------------------------------------


def test_as_many_commands_as_wait(ends: Made) -> None:
    both = ends()
    both.say(encode(RESET, 7) * 256, DATA)
    assert both.connection.dma_read(8, 2) == b"ab"
    other = ends()
    other.say(encode(RESET, 7) * 257, DATA)
    with pytest.raises(MessageError, match="TooManyCommands"):
        other.connection.dma_read(8, 2)


@pytest.mark.parametrize(("size", "many"), [(84, False), (85, True)])
def test_as_many_bytes_as_wait(ends: Made, monkeypatch: pytest.MonkeyPatch, size: int, *, many: bool) -> None:
    monkeypatch.setattr(connection_module, "_MAX_BACKLOG_BYTES", 100)
    both = ends()
    both.say(encode(RESET, 7), encode(Command.REGION_WRITE, 8, RegionData(0, 4, size, bytes(size))), DATA)
    if many:
        with pytest.raises(MessageError, match="TooManyCommands"):
            both.connection.dma_read(8, 2)
    else:
        assert both.connection.dma_read(8, 2) == b"ab"


# --- who asks -------------------------------------------------------------------------------------------------


def test_nothing_is_asked_while_the_client_waits_for_an_answer(ends: Made) -> None:
    both = ends()
    both.function.then = lambda: both.connection.dma_read(8, 2)
    both.say(encode(Command.REGION_READ, 7, RegionAccess(0, 7, 4)), DATA)
    with pytest.raises(MessageError, match=r"DeviceFailed.*StateError"):
        both.connection.readable()
    assert both.heard() == []


def test_another_thread_asks_while_the_loop_answers(ends: Made) -> None:
    both = ends()
    found: list[object] = []

    def ask() -> None:
        thread, there = both.in_thread(lambda: both.connection.dma_read(8, 2))
        thread.join(LONG)
        found.extend(there)

    both.function.then = ask
    both.say(encode(Command.REGION_READ, 7, RegionAccess(0, 7, 4)), DATA)
    assert both.connection.readable()
    assert found == [b"ab"]
    assert both.heard() == [(READ, 1), (Command.REGION_READ, 7)]


def asked_elsewhere(both: Ends) -> object:
    thread, found = both.in_thread(lambda: both.connection.dma_read(8, 2))
    thread.join(LONG)
    (only,) = found
    return only


def test_another_thread_reads_what_is_there(ends: Made, still: None) -> None:
    both = ends()
    both.say(DATA)
    assert asked_elsewhere(both) == b"ab"


def test_another_thread_finds_its_reply_late_too(ends: Made, still: None) -> None:
    both = ends(patience=0.0)
    both.say(DATA)
    found = asked_elsewhere(both)
    assert isinstance(found, MessageError)
    assert found.rule == "ReplyLate"
    assert both.connection.dead


def test_another_thread_finds_that_the_client_has_gone(ends: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ends()
    both.client.shutdown(socket.SHUT_WR)
    reads: list[int] = []
    receive = Wire.receive

    def counted(wire: Wire) -> list[Message] | None:
        reads.append(1)
        assert len(reads) == 1
        return receive(wire)

    monkeypatch.setattr(Wire, "receive", counted)
    assert isinstance(asked_elsewhere(both), PeerDisconnected)
    assert both.connection.error is None


def test_what_another_access_has_broken_is_broken_for_all(ends: Made) -> None:
    both = ends()
    thread, found = both.in_thread(lambda: both.connection.dma_read(8, 2))
    assert len(both.client.recv(32, socket.MSG_PEEK)) == 32
    both.say(given(2, DmaData(0, 0)))
    with pytest.raises(MessageError, match="ReplyData"):
        both.connection.dma_read(16, 2)
    thread.join(LONG)
    (only,) = found
    assert isinstance(only, PeerDisconnected)

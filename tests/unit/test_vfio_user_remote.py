"""Memory that a vfio-user client withholds: each access of the device is a message, and what may happen meanwhile."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import Message, encode, encode_error, encode_reply
from virtio_test.carrier.vfio_user.messages import COMMANDS, Command, IrqSet
from virtio_test.carrier.vfio_user.payloads import (
    DmaAccess,
    DmaData,
    DmaMap,
    DmaUnmap,
    DmaWritten,
    Payload,
    RegionAccess,
    RegionData,
    Version,
)
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected
from virtio_test.features import FeatureSet

from .vfio_user_world import (
    MODERN_BAR,
    PAGE,
    STATUS,
    Server,
    bring_up,
    served,
    serving,
    silent,
    small_memory,
)
from .world import eventually, mapped_files, open_fds

PATIENCE = 0.5
NEEDS_RESET = 0x40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s", patience=10.0) as made:
        yield made


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Server]:
    """A server whose clients misbehave, so that the tests wait for it."""
    with serving(tmp_path / "s", patience=PATIENCE) as made:
        yield made


def withholding(server: Server, *, transfer: int = 1 << 20, timeout: float = 5.0) -> VfioUserClient:
    return VfioUserClient(server.path, memory=small_memory(), share=False, transfer=transfer, timeout=timeout)


def rule(server: Server) -> str | None:
    return None if server.last_error is None else server.last_error.rule


# --- it works -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", ["modern", "legacy"])
@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_driver_whose_memory_nobody_can_map(server: Server, interface: str, interrupts: str, packed: bool) -> None:
    before = mapped_files()
    with withholding(server) as client:
        mine = mapped_files()
        registers = open_pci(client, interface=interface, interrupts=interrupts)  # type: ignore[arg-type]
        wanted = FeatureSet.from_bits((1 << 64) - 1)
        driver = TestDriver(
            registers, console=silent, wanted=wanted if packed else wanted - FeatureSet("RING_PACKED", "IN_ORDER")
        )
        driver.initialize()
        for number in range(20):
            assert driver.request(number).ret == number + 101
        assert [each.ret for each in driver.request_many(range(100))] == [number + 101 for number in range(100)]
        assert client.served > 500
        assert mapped_files() == mine
        assert all(each.remote for each in server.endpoint.memory.regions)
    assert server.idle()
    assert server.last_error is None
    del client, registers, driver
    assert mapped_files() == before


def test_shared_and_withheld_memory_side_by_side(server: Server) -> None:
    memory = GuestMemory([(0, 1 << 20), (1 << 30, 1 << 20)])
    with VfioUserClient(server.path, memory=memory) as client:
        client.withdraw(1 << 30, 1 << 20)
        client.export(1 << 30, 1 << 20)
        memory.write((1 << 30) + 5, b"withheld")
        found = in_thread(client, lambda: server.endpoint.memory.read((1 << 30) + 5, 8))
        assert found == b"withheld"
        assert client.served == 1
        assert server.endpoint.memory.read(0, 4) == bytes(4)
        assert client.served == 1
        assert [each.remote for each in server.endpoint.memory.regions] == [False, True]
    assert server.idle()


def in_thread(client: VfioUserClient, what: Callable[[], object]) -> object:
    """Do something that accesses withheld memory while the client's loop serves it."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(what())
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        # In slices: the end of another thread is no event of this loop.
        client.loop.run(timeout=0.01)
    return found[0]


def test_accesses_come_from_any_thread(server: Server) -> None:
    with withholding(server) as client:
        guest = server.endpoint.memory
        assert in_thread(client, lambda: guest.write(0x1000, b"from another thread")) is None
        assert client.memory.read(0x1000, 19) == b"from another thread"
        assert in_thread(client, lambda: guest.read(0x1000, 4)) == b"from"


def test_transfers_are_no_longer_than_the_client_takes(server: Server) -> None:
    asked: list[int] = []
    with withholding(server, transfer=10) as client:

        def serve(message: Message) -> None:
            assert isinstance(message.payload, DmaAccess | DmaData)
            asked.append(message.payload.count)
            client.serve_memory(message)

        client.serve = serve
        driver = bring_up(client)
        assert driver.request(7).ret == 108
    # A request has 48 bytes, and its answer 12.
    assert max(asked) == 10
    assert asked.count(10) >= 5
    with pytest.raises(InvalidArgument, match="transfers of 0 bytes"):
        withholding(server, transfer=0)


def test_long_accesses_are_cut_at_a_mebibyte(server: Server) -> None:
    memory = GuestMemory([(0, 3 << 20)])
    with VfioUserClient(server.path, memory=memory, share=False) as client:
        guest = server.endpoint.memory
        data = bytes(range(256)) * 9000
        assert in_thread(client, lambda: guest.write(7, data)) is None
        assert memory.read(7, len(data)) == data
        assert in_thread(client, lambda: guest.read(7, len(data))) == data
        assert client.served >= 6


def test_what_may_only_be_read_is_not_written(server: Server) -> None:
    with withholding(server) as client:
        client.withdraw(0, 1 << 20)
        client.export(0, 1 << 20, writable=False)
        assert isinstance(in_thread(client, lambda: server.endpoint.memory.write(0, b"x")), InvalidArgument)
        assert client.served == 0


# --- what comes while the device waits -------------------------------------------------------------------------


class Raw:
    """A client by hand, whose memory is withheld, and a driver's queue that is set up and has one request."""

    def __init__(self, server: Server) -> None:
        self.memory = small_memory()
        self.server = server
        self.frames: list[tuple[bytes, list[int]]] = []

    def __enter__(self) -> Raw:
        self.client = VfioUserClient(self.server.path, memory=self.memory, share=False, timeout=5.0)
        self.driver = bring_up(self.client)
        assert self.driver.request(1).ret == 102
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def kick(self, serve: Callable[[Message], object]) -> None:
        """Make a request available, and answer the device's first access by `serve`, the others as ever."""

        def once(message: Message) -> None:
            self.client.serve = self.client.serve_memory
            serve(message)

        self.client.serve = once
        self.request = self.driver.submit_number(5)

    def send(self, command: Command, number: int, payload: Payload | None = None, *, no_reply: bool = False) -> None:
        self.client.send(encode(command, number, payload, no_reply=no_reply))

    def finish(self) -> None:
        assert int.from_bytes(self.request.wait(timeout=5.0)[:4], "little") == 106


def test_a_read_is_answered_while_the_device_waits(server: Server) -> None:
    """Without this, QEMU and the server wait for each other: it serves memory under the lock that the reader holds."""
    with Raw(server) as raw:
        another_kick = raw.driver.registers.kick_notifier(0, lambda: 0)

        def serve(message: Message) -> None:
            # A kick marks a queue and no more, so what comes behind it is answered as well.
            another_kick.notify()
            assert raw.client.read_bar(MODERN_BAR, STATUS, 1) == 0xF
            assert raw.client.read_config(0, 2) == 0x1AF4
            raw.client.set_irqs(3, IrqSet.DATA_NONE | IrqSet.TRIGGER, 0, 0)
            raw.client.serve_memory(message)

        raw.kick(serve)
        raw.finish()


def test_who_waits_for_each_other_gives_up_one_access_only(impatient: Server) -> None:
    """A client serves no memory while it waits for a read, which waits behind a write that must not be made yet."""
    with Raw(impatient) as raw:

        def serve(message: Message) -> None:
            begin = time.monotonic()
            raw.client.write_bar(MODERN_BAR, 0, 4, 1)
            assert raw.client.read_bar(MODERN_BAR, 0, 4) == 1
            assert time.monotonic() - begin > 0.4 * PATIENCE
            # Too late, and nobody is cross about it.
            raw.client.serve_memory(message)

        raw.kick(serve)
        assert eventually(lambda: bool(raw.client.read_bar(MODERN_BAR, STATUS, 1) & NEEDS_RESET))
        raw.client.serve = raw.client.serve_memory
        assert bring_up(raw.client).request(3).ret == 104
        assert impatient.server.session is not None
    assert impatient.idle()
    assert impatient.last_error is None


def test_a_write_is_answered_at_once_and_done_later(server: Server) -> None:
    with Raw(server) as raw:

        def serve(message: Message) -> None:
            # Interrupts switched off in the function's control register, in the middle of a request.
            asked = RegionData(0x3C, 7, 1, b"\x2a")
            reply = raw.client.request(Command.REGION_WRITE, asked, RegionAccess)
            assert reply == RegionAccess(0x3C, 7, 1)
            raw.client.serve_memory(message)

        raw.kick(serve)
        raw.finish()
        assert raw.client.read_config(0x3C, 1) == 0x2A


def test_commands_keep_their_order_while_the_device_waits(server: Server) -> None:
    with Raw(server) as raw:

        def serve(message: Message) -> None:
            # The read stands behind a write, so it must show what was written: it waits until both can be done.
            raw.send(Command.REGION_WRITE, 1000, RegionData(0x3C, 7, 1, b"\x11"), no_reply=True)
            raw.send(Command.REGION_READ, 1001, RegionAccess(0x3C, 7, 1))
            raw.send(Command.REGION_WRITE, 1002, RegionData(0x3C, 7, 1, b"\x22"))
            raw.send(Command.DMA_UNMAP, 1003, DmaUnmap(24, 0, 1 << 30, PAGE))
            raw.client.serve_memory(message)

        raw.kick(serve)
        found = replies(raw, 3)
        assert [(each.id, each.errno) for each in found] == [(1001, None), (1002, None), (1003, None)]
        assert found[0].payload == RegionData(0x3C, 7, 1, b"\x11")
        raw.finish()
        assert raw.client.read_config(0x3C, 1) == 0x22


def replies(raw: Raw, count: int) -> list[Message]:
    """Read `count` replies past the client, which serves memory meanwhile."""
    found: list[Message] = []
    end = time.monotonic() + 5.0
    wire = raw.client._wire  # pyright: ignore[reportPrivateUsage]
    while len(found) < count:
        assert time.monotonic() < end
        wire.wait(0.1)
        for message in wire.receive() or []:
            if message.reply:
                found.append(message)
            else:
                raw.client.serve(message)
    return found


def test_who_talks_without_end_while_the_device_waits_is_disconnected(server: Server) -> None:
    with Raw(server) as raw:

        def serve(_: Message) -> None:
            for number in range(300):
                raw.send(Command.DMA_UNMAP, number, DmaUnmap(24, 0, 1 << 30, PAGE))

        raw.kick(serve)
        with pytest.raises((PeerDisconnected, MessageError)):
            raw.client.loop.run(until=lambda: raw.client.read_config(0, 2) == 0, timeout=5.0)
    assert server.idle()
    assert rule(server) == "TooManyCommands"
    served(server)


def test_memory_may_go_while_another_thread_waits_for_it(server: Server) -> None:
    with withholding(server) as client:
        waiting: list[Message] = []
        client.serve = waiting.append
        found: list[object] = []

        def read() -> None:
            try:
                found.append(server.endpoint.memory.read(0x1000, 4))
            except Exception as error:  # noqa: BLE001 - looked at below
                found.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        client.loop.run(until=lambda: bool(waiting), timeout=5.0)
        client.serve = client.serve_memory
        client.serve(waiting[0])
        client.withdraw(0, 1 << 20)
        thread.join(5.0)
        assert found == [bytes(4)]
        assert server.endpoint.memory.regions == []


# --- who does not keep to it ----------------------------------------------------------------------------------


def test_a_client_that_refuses_breaks_the_device_only(server: Server) -> None:
    with withholding(server) as client:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
        client.serve = lambda message: client.send(encode_error(message.command, message.id, 14))
        driver.submit_number(2)
        assert eventually(lambda: bool(client.read_bar(MODERN_BAR, STATUS, 1) & NEEDS_RESET))
        client.serve = client.serve_memory
        assert bring_up(client).request(3).ret == 104
    assert server.idle()
    assert server.last_error is None


def silence(_client: VfioUserClient, _message: Message) -> None:
    """No answer."""


def vanish(client: VfioUserClient, _message: Message) -> None:
    client.close()


def another_id(client: VfioUserClient, message: Message) -> None:
    client.send(encode_error(message.command, (message.id + 1) & 0xFFFF, 14))


def another_command(client: VfioUserClient, message: Message) -> None:
    other = Command.DMA_READ if message.command == Command.DMA_WRITE else Command.DMA_WRITE
    client.send(encode_error(other, message.id, 14))


def twice(client: VfioUserClient, message: Message) -> None:
    client.serve_memory(message)
    client.serve_memory(message)


def another_address(client: VfioUserClient, message: Message) -> None:
    asked = message.payload
    if isinstance(asked, DmaAccess):
        client.send(encode_reply(message.command, message.id, DmaData(asked.address + 1, 2, b"xx")))
    elif isinstance(asked, DmaData):
        client.send(encode_reply(message.command, message.id, DmaWritten(asked.address + 1, asked.count)))


def too_few_bytes(client: VfioUserClient, message: Message) -> None:
    asked = message.payload
    if isinstance(asked, DmaAccess):
        client.send(encode_reply(message.command, message.id, DmaData(asked.address, asked.count, b"x")))
    elif isinstance(asked, DmaData):
        client.send(encode_reply(message.command, message.id, DmaWritten(asked.address, 0)))


def too_long(client: VfioUserClient, message: Message) -> None:
    client.send(struct.pack("=HHIII", message.id, message.command, 0x7FFF_FFFF, 1, 0))


def half_a_reply(client: VfioUserClient, message: Message) -> None:
    row = COMMANDS[message.command]
    client.send(struct.pack("=HHIII", message.id, message.command, 16 + row.reply.sizes()[0], 1, 0))


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        (silence, "ReplyLate"),
        (half_a_reply, "ReplyLate"),
        (vanish, None),
        (another_id, "UnexpectedReply"),
        (another_command, "UnexpectedReply"),
        (twice, "UnexpectedReply"),
        (another_address, "ReplyData"),
        (too_few_bytes, "ReplyData"),
        (too_long, "MessageTooLong"),
    ],
)
@pytest.mark.parametrize("at", [0, 4, 14])
def test_a_bad_answer_ends_the_connection_only(
    impatient: Server, deed: Callable[[VfioUserClient, Message], None], expected: str | None, at: int
) -> None:
    served(impatient)
    before = open_fds(), mapped_files()
    misbehave(impatient, deed, at)
    assert impatient.idle()
    assert rule(impatient) == expected
    assert (open_fds(), mapped_files()) == before
    served(impatient)


def misbehave(server: Server, deed: Callable[[VfioUserClient, Message], None], at: int) -> None:
    """Bring the device up, and answer the access number `at` of the second request so."""
    with withholding(server) as client:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
        left = [at]

        def serve(message: Message) -> None:
            left[0] -= 1
            if left[0] < 0:
                deed(client, message)
            else:
                client.serve_memory(message)

        client.serve = serve
        begin = time.monotonic()
        driver.submit_number(2)
        end = begin + 10 * PATIENCE
        while server.server.session is not None and time.monotonic() < end:
            client.loop.run(timeout=0.02)
        assert time.monotonic() - begin < 10 * PATIENCE


def test_who_answers_slowly_each_time_is_bounded_as_well(impatient: Server) -> None:
    with withholding(impatient) as client:
        driver = bring_up(client)

        def serve(message: Message) -> None:
            time.sleep(0.6 * PATIENCE)
            client.serve_memory(message)

        client.serve = serve
        begin = time.monotonic()
        driver.submit_number(2)
        with pytest.raises((PeerDisconnected, MessageError)):
            client.loop.run(until=lambda: client.read_config(0, 2) != 0x1AF4, timeout=10.0)
        assert time.monotonic() - begin < 8 * PATIENCE
    assert impatient.idle()
    assert rule(impatient) == "ReplyLate"
    served(impatient)


def test_another_thread_does_not_wait_for_ever_either(impatient: Server) -> None:
    with withholding(impatient) as client:
        client.serve = lambda _: None
        begin = time.monotonic()
        found = in_thread(client, lambda: impatient.endpoint.memory.read(0, 4))
        assert isinstance(found, InvalidArgument)
        assert PATIENCE * 0.9 < time.monotonic() - begin < PATIENCE * 5
        assert isinstance(found.__cause__, MessageError)
    assert impatient.idle()
    assert rule(impatient) == "ReplyLate"
    served(impatient)


def test_memory_that_is_needed_to_answer_is_not_there(server: Server) -> None:
    """A reset may look at rings; the client waits for it and could serve nothing meanwhile."""
    with withholding(server) as client:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
        client.reset()
        assert bring_up(client).request(2).ret == 103
    assert server.idle()
    assert server.last_error is None


def test_the_client_serves_nothing_that_it_did_not_export() -> None:
    here, there = socket.socketpair()
    answers: list[Message] = []

    def play() -> None:
        """A server that asks for memory before anything else."""
        wire = Wire(there, "server")

        def next_message() -> Message:
            while True:
                wire.wait(5.0)
                for message in wire.receive() or []:
                    return message

        first = next_message()
        wire.send(encode_reply(Command.VERSION, first.id, Version(0, 0, b"{}\0")))
        mapped = next_message()
        assert isinstance(mapped.payload, DmaMap)
        wire.send(encode_reply(Command.DMA_MAP, mapped.id))
        info = next_message()
        for number, asked in enumerate(
            [
                DmaAccess((1 << 20) - 1, 2),
                DmaAccess(1 << 40, 1),
                DmaAccess(0, 0),
                DmaAccess(0, (1 << 20) + 1),
                DmaAccess((1 << 64) - 1, 1),
                DmaAccess(4, 4),
            ]
        ):
            wire.send(encode(Command.DMA_READ, number, asked))
            answers.append(next_message())
        wire.send(encode(Command.DMA_WRITE, 9, DmaData(0, 4, b"abc")))
        answers.append(next_message())
        wire.send(encode(77, 10))
        wire.send(encode_error(Command.DEVICE_GET_INFO, info.id, 5))
        wire.close()

    thread = threading.Thread(target=play)
    thread.start()
    with pytest.raises(MessageError, match=r"CommandRefused.*EIO"):
        VfioUserClient(connection=here, memory=small_memory(), share=False)
    thread.join(5.0)
    assert [each.errno for each in answers] == [14] * 5 + [None, 14]
    assert answers[5].payload == DmaData(4, 4, bytes(4))

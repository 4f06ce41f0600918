"""What no client should send, over a real socket: after each the next client does a request, and nothing is left.

"Nothing" is counted: open fds and mapped files of this process, in which server and clients run.
"""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory, Notifier
from virtio_test.carrier.vfio_user import client as client_module
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import encode, encode_reply
from virtio_test.carrier.vfio_user.messages import MAX_MESSAGE, Command, IrqSet
from virtio_test.carrier.vfio_user.payloads import (
    DeviceInfo,
    DmaData,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    MigrationData,
    Payload,
    RegionAccess,
    RegionData,
    SetIrqs,
    Version,
    WriteMulti,
    WriteOne,
)
from virtio_test.carrier.vfio_user.rules import MESSAGE_RULES
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.devices.test import TestDevice
from virtio_test.errors import PeerDisconnected
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.function import VirtioPci

from .vfio_user_world import (
    PAGE,
    Server,
    a_file,
    bring_up,
    served,
    serving,
    silent,
    small_memory,
)
from .world import eventually, mapped_files, open_fds

Frame = tuple[bytes, int]
"""The bytes of a message and how many fds go with it."""

HELLO = encode(Command.VERSION, 1, Version(0, 0, b"{}\0"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def header(command: int, size: int, flags: int = 0) -> bytes:
    return struct.pack("=HHIII", 1, command, size, flags, 0)


def connect(server: Server) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.connect(str(server.path))
    raw.settimeout(10.0)
    return raw


def send(raw: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send it all, or as much as the server takes before it goes."""
    try:
        if fds:
            socket.send_fds(raw, [data], list(fds))
        else:
            raw.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return


def ended(raw: socket.socket) -> bytes:
    """What the server still says before it closes the connection."""
    parts: list[bytes] = []
    try:
        while part := raw.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        # It closed with something unread in its socket.
        return b"".join(parts)
    return b"".join(parts)


class Count:
    """What this process holds now, to be compared with later."""

    def __init__(self) -> None:
        self.fds, self.files = open_fds(), mapped_files()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Count) and (self.fds, self.files) == (other.fds, other.files)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.fds} fds, {self.files} mapped files>"


# --- malformed or out of order: the connection ends ------------------------------------------------------------

BAD: list[tuple[str, bytes, int]] = [
    ("VersionFirst", encode(Command.DEVICE_RESET, 1), 0),
    ("VersionFirst", encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE)), 1),
    ("VersionFirst", HELLO + HELLO, 0),
    ("VersionFirst", encode(99, 1), 1),
    ("VersionMajor", encode(Command.VERSION, 1, Version(1, 0, b"{}\0")), 0),
    ("VersionData", encode(Command.VERSION, 1, Version(0, 0, b"{}")), 0),
    ("VersionData", encode(Command.VERSION, 1, Version(0, 0, b"[" * 16000 + b"\0")), 0),
    ("Capability", encode(Command.VERSION, 1, Version(0, 0, b'{"capabilities":{"max_msg_fds":-1}}\0')), 0),
    ("MessageType", HELLO + header(13, 16, 3), 0),
    ("ReservedFlags", HELLO + header(13, 16, 0x100), 0),
    ("MessageTooLong", HELLO + header(10, MAX_MESSAGE + 1), 0),
    ("MessageTooLong", header(0xFFFF, 0xFFFF_FFFF), 1),
    ("MessageSize", HELLO + header(2, 47) + b"\0" * 31, 0),
    ("MessageSize", HELLO + header(15, 24) + b"\xff" * 8, 0),
    ("Direction", HELLO + encode(Command.DMA_READ, 1), 0),
    ("Direction", HELLO + encode_reply(Command.REGION_READ, 1, RegionData(0, 0, 0)), 0),
    ("UnexpectedReply", HELLO + encode_reply(Command.DMA_READ, 1, DmaData(0, 0)), 0),
    ("UnexpectedReply", HELLO + encode_reply(1000, 1), 0),
    ("FdCount", HELLO, 1),
    ("FdCount", encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE)), 2),
    ("FdCount", encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE)), 17),
    ("FdCount", encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE)), 253),
    ("FdCount", encode(Command.DEVICE_SET_IRQS, 1, SetIrqs(20, 36, 2, 0, 5)), 4),
    # Refused, and the sender wants no answer from which it could learn of it.
    ("DmaRange", HELLO + encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 0), no_reply=True), 0),
    ("RegionRange", HELLO + encode(Command.REGION_WRITE, 1, RegionData(256, 7, 1, b"x"), no_reply=True), 0),
    ("UnknownCommand", HELLO + encode(14, 1, no_reply=True), 0),
    *(
        (rule, HELLO + encode(command, 1, payload, no_reply=True), count)
        for rule, command, payload, count in (
            ("NotSupported", Command.DEVICE_FEATURE, Feature(8, 1 << 16 | 1), 0),
            ("NotSupported", Command.MIG_DATA_READ, MigrationData(8, 1), 0),
            ("DmaFlags", Command.DMA_MAP, DmaMap(32, 4, 0, 0, PAGE), 0),
            ("DmaRange", Command.DMA_MAP, DmaMap(32, 3, 0, 1, PAGE), 0),
            ("UnmapFlags", Command.DMA_UNMAP, DmaUnmap(24, 1, 0, PAGE), 0),
            ("DmaRange", Command.DMA_UNMAP, DmaUnmap(24, 0, 0, 0), 0),
            ("ArgumentSize", Command.DEVICE_GET_INFO, DeviceInfo(0), 0),
            ("RegionIndex", Command.REGION_READ, RegionAccess(0, 9, 1), 0),
            ("RegionRange", Command.REGION_READ, RegionAccess(256, 7, 1), 0),
            ("TransferSize", Command.REGION_READ, RegionAccess(0, 7, 0), 0),
            ("TransferSize", Command.REGION_WRITE, RegionData(0, 7, 2, b"x"), 0),
            ("WriteMulti", Command.REGION_WRITE_MULTI, WriteMulti((WriteOne(0, 7, 9, bytes(8)),)), 0),
            ("IrqIndex", Command.DEVICE_GET_IRQ_INFO, IrqInfo(16, 0, 5), 0),
            ("IrqFlags", Command.DEVICE_SET_IRQS, SetIrqs(20, 0, 0, 0, 1), 0),
            ("IrqRange", Command.DEVICE_SET_IRQS, SetIrqs(20, 33, 2, 2, 1), 0),
            ("IrqData", Command.DEVICE_SET_IRQS, SetIrqs(20, 34, 2, 0, 1), 0),
        )
    ),
]

WITH_FDS = [
    ("DmaFile", Command.DMA_MAP, DmaMap(32, 3, PAGE, 1 << 30, PAGE)),
    ("DmaExists", Command.DMA_MAP, DmaMap(32, 3, 0, 0, PAGE)),
    ("IrqFd", Command.DEVICE_SET_IRQS, SetIrqs(20, 36, 2, 0, 1)),
]
"""Refused for what comes beside them: a file of one page, which is mapped at 0 already when it comes as a file."""

ELSEWHERE = {
    "Truncated",
    "FdType",
    "RepliesUnread",
    "DeviceFailed",
    "DmaSlots",  # in the session's tests
    "UnmapSplit",
    "TooManyCommands",  # in the tests of withheld memory
    "ReplyLate",
    "ReplyData",
    "CommandRefused",
}


def test_every_rule_has_a_case_that_breaks_it() -> None:
    assert {rule for rule, *_ in BAD} | {rule for rule, *_ in WITH_FDS} | ELSEWHERE == set(MESSAGE_RULES)
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_vfio_user_*.py"))
    assert all(texts.count(f'"{rule}"') >= 2 or texts.count(rule) >= 2 for rule in ELSEWHERE)


@pytest.mark.parametrize(("rule", "command", "payload"), WITH_FDS)
def test_an_fd_that_does_not_fit_is_refused(server: Server, rule: str, command: Command, payload: Payload) -> None:
    before = Count()
    fd = a_file()
    with connect(server) as raw:
        send(raw, HELLO)
        send(raw, encode(Command.DMA_MAP, 2, DmaMap(32, 3, 0, 0, PAGE)), [fd])
        send(raw, encode(command, 3, payload, no_reply=True), [fd])
        ended(raw)
    os.close(fd)
    assert server.idle()
    assert server.last_error is not None
    assert server.last_error.rule == rule
    assert Count() == before


@pytest.mark.parametrize(("rule", "data", "count"), BAD)
def test_a_bad_message_ends_its_connection_only(
    server: Server, caplog: pytest.LogCaptureFixture, rule: str, data: bytes, count: int
) -> None:
    served(server)
    before = Count()
    raw = connect(server)
    fds = [a_file() for _ in range(count)]
    send(raw, data, fds)
    for fd in fds:
        os.close(fd)
    ended(raw)
    raw.close()
    assert server.idle()
    assert server.last_error is not None
    assert server.last_error.rule == rule
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert rule in warning
    assert "\n" not in warning
    assert Count() == before
    served(server)


def test_a_message_may_come_byte_by_byte(server: Server) -> None:
    with connect(server) as raw:
        for byte in HELLO + encode(Command.REGION_READ, 2, RegionAccess(0, 7, 4)):
            raw.send(bytes([byte]))
            time.sleep(0.0005)
        reply = b""
        while len(reply) < len(HELLO) + 36:
            reply += raw.recv(4096)
    assert reply.endswith(struct.pack("=QIII", 0, 7, 4, 0x1013_1AF4))
    served(server)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 47])
def test_a_connection_that_ends_in_a_message(server: Server, length: int) -> None:
    before = Count()
    fd = a_file()
    with connect(server) as raw:
        send(raw, HELLO)
        send(raw, encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE))[:length], [fd])
    os.close(fd)
    assert eventually(lambda: server.last_error is not None)
    assert server.last_error is not None
    assert server.last_error.rule == "Truncated"
    # It must not hold what was on the stack when it was raised.
    assert server.last_error.__traceback__ is None
    assert server.idle()
    assert Count() == before
    served(server)


def test_a_client_that_never_reads_is_disconnected(server: Server) -> None:
    with connect(server) as raw:
        begin = time.monotonic()
        send(raw, HELLO + encode(Command.REGION_READ, 2, RegionAccess(0, 7, 256)) * 100_000)
        assert server.idle()
        assert time.monotonic() - begin < 10.0
    assert server.last_error is not None
    assert server.last_error.rule == "RepliesUnread"
    served(server)


def test_a_client_that_never_stops_talking_starves_nobody(server: Server) -> None:
    flood = encode(Command.REGION_WRITE, 2, RegionData(0x3C, 7, 1, b"\1"), no_reply=True) * 1000
    enough = threading.Event()
    with connect(server) as raw:
        send(raw, HELLO)

        def talk() -> None:
            while not enough.is_set():
                send(raw, flood)

        talker = threading.Thread(target=talk)
        talker.start()
        try:
            for _ in range(50):
                turned = threading.Event()
                server.loop.call_soon(turned.set)
                assert turned.wait(2.0)
        finally:
            enough.set()
            talker.join(10.0)
    served(server)


def test_its_own_end_of_the_connection_does_not_keep_it_open(server: Server) -> None:
    """The fd comes with half a message, and then its sender goes: kept, it would be a client for ever."""
    before = Count()
    raw = connect(server)
    send(raw, HELLO)
    send(raw, encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE))[:20], [raw.fileno()])
    raw.close()
    assert eventually(lambda: server.last_error is not None)
    assert server.last_error is not None
    assert server.last_error.rule == "FdType"
    assert server.idle()
    assert Count() == before
    served(server)


def test_a_folder_or_an_epoll_is_no_fd_of_the_protocol(server: Server, tmp_path: Path) -> None:
    import select

    before = Count()
    with select.epoll() as poll:
        folder = os.open(tmp_path, os.O_RDONLY)
        for fd in (folder, poll.fileno()):
            with connect(server) as raw:
                send(raw, encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, PAGE)), [fd])
                ended(raw)
            assert server.idle()
            assert server.last_error is not None
            assert server.last_error.rule == "FdType"
        os.close(folder)
    assert Count() == before
    served(server)


class Failing(VirtioPci):
    """A function whose own code has a mistake."""

    def read_bar(self, bar: int, offset: int, length: int) -> bytes:
        if offset == 0x40:
            raise ZeroDivisionError("in the device")
        return super().read_bar(bar, offset, length)

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        if offset == 0x40:
            raise ZeroDivisionError("in the device")
        super().write_bar(bar, offset, data)


def test_a_device_that_fails_ends_the_connection_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Failing(TestDevice(console=silent), loop=OwnerLoop(), memory=GuestMemory())
    with serving(tmp_path / "s", endpoint) as server:
        for command in (Command.REGION_READ, Command.REGION_WRITE):
            with connect(server) as raw:
                read = command == Command.REGION_READ
                asked = RegionAccess(0x40, 4, 1) if read else RegionData(0x40, 4, 1, b"x")
                send(raw, HELLO + encode(command, 2, asked))
                # The answer to VERSION; and the write was answered before it was done.
                assert len(ended(raw)) == 41 + (0 if read else 32)
            assert server.idle()
            assert server.last_error is not None
            assert server.last_error.rule == "DeviceFailed"
            assert "ZeroDivisionError: in the device" in str(server.last_error)
        served(server)
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR", "ERROR"]


def test_without_fds_a_client_waits_until_there_are_some(server: Server) -> None:
    served(server)
    before = Count()
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raw.fileno() + 1, limits[1]))
    try:
        raw.connect(str(server.path))
        send(raw, HELLO)
        time.sleep(0.3)
        assert server.server.session is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    raw.settimeout(10.0)
    assert raw.recv(16)[2] == Command.VERSION
    raw.close()
    assert server.idle()
    assert Count() == before
    served(server)


# --- thousands of them ----------------------------------------------------------------------------------------


def test_ten_thousand_refused_commands_leave_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    served(server)
    before = Count()
    fd, ear = a_file(), Notifier.eventfd()
    bad = [
        (Command.DMA_MAP, DmaMap(32, 3, 0, 0, PAGE), fd),
        (Command.DMA_MAP, DmaMap(32, 3, PAGE, 1 << 30, PAGE), fd),
        (Command.DMA_MAP, DmaMap(32, 3, 0, 1 << 30, PAGE), ear.fileno()),
        (Command.DEVICE_SET_IRQS, SetIrqs(20, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 2, 0, 1), fd),
        (Command.DEVICE_SET_IRQS, SetIrqs(20, IrqSet.DATA_EVENTFD | IrqSet.MASK, 2, 0, 1), ear.fileno()),
        (Command.DEVICE_SET_IRQS, SetIrqs(20, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 9, 0, 1), ear.fileno()),
    ]
    with VfioUserClient(server.path, memory=small_memory()) as client:
        connected = Count()
        for number in range(10_000):
            command, payload, with_fd = bad[number % len(bad)]
            reply = client.command(command, payload, fds=(with_fd,))
            assert reply is not None
            assert reply.errno
        assert Count() == connected
    os.close(fd)
    assert server.idle()
    # Who causes thousands of lines writes a few.
    assert 1 <= len([record for record in caplog.records if record.levelname == "WARNING"]) <= 20
    del client, ear
    assert Count().fds <= before.fds
    served(server)


def programs(seed: int) -> list[Frame]:
    """A few good commands in any order, with wrong numbers in them, and something malformed at the end."""
    pick = random.Random(seed)

    def number() -> int:
        return pick.choice([0, 1, 2, 3, 7, PAGE, 1 << 20, 1 << 31, (1 << 32) - 1])

    def long() -> int:
        return pick.choice([0, PAGE, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1])

    def frame() -> Frame:
        return pick.choice(
            [
                (encode(2, 1, DmaMap(32, pick.choice([1, 3, 3, 7]), 0, pick.randrange(64) * PAGE, PAGE)), 1),
                (encode(2, 1, DmaMap(32, 3, long(), long(), long())), pick.randrange(2)),
                (encode(3, 1, DmaUnmap(24, pick.choice([0, 0, 1, 2]), long(), long())), 0),
                (encode(7, 1, IrqInfo(16, 0, number())), 0),
                (encode(8, 1, SetIrqs(20, 36, pick.choice([0, 2]), 0, 1)), 1),
                (encode(8, 1, SetIrqs(20, pick.randrange(64), number(), number(), number())), 0),
                (encode(9, 1, RegionAccess(pick.randrange(4096), pick.randrange(9), pick.choice([1, 2, 4, 8]))), 0),
                (encode(10, 1, RegionData(4, 7, 2, b"\7\0")), 0),
                (encode(10, 1, RegionData(pick.randrange(0x40), 4, 4, pick.randbytes(4))), 0),
                (encode(10, 1, RegionData(long(), number(), number(), pick.randbytes(8))), 0),
                (encode(15, 1, WriteMulti((WriteOne(pick.randrange(0x40), 4, 1, pick.randbytes(8)),))), 0),
                (encode(13, 1), 0),
                (encode(pick.randrange(20), 1), pick.randrange(2)),
            ]
        )

    frames = [(HELLO, 0), *(frame() for _ in range(pick.randrange(12)))]
    cut = pick.randrange(48)
    last = pick.choice([pick.randbytes(64), HELLO, header(13, 16, 0x80), encode(2, 1, DmaMap(32, 3, 0, 0, PAGE))[:cut]])
    return [*frames, (last, pick.choice([0, 1, 3, 17]) if last else 0)]


def test_a_thousand_random_programs_leave_nothing(server: Server) -> None:
    served(server)
    before = Count()
    fds = [a_file(4 * PAGE), os.eventfd(0), os.eventfd(0)]
    for seed in range(1000):
        with connect(server) as raw:
            for data, count in programs(seed):
                # An eventfd where interrupts are set, a file where memory is.
                first = 1 if data[2:4] == b"\x08\0" else 0
                send(raw, data, (fds * 6)[first : first + count])
            raw.shutdown(socket.SHUT_WR)
            ended(raw)
    for fd in fds:
        os.close(fd)
    assert server.idle()
    assert Count() == before
    served(server)


# --- who vanishes ---------------------------------------------------------------------------------------------


def recorded(
    server: Server, monkeypatch: pytest.MonkeyPatch, use: Callable[[VfioUserClient], object]
) -> list[tuple[bytes, list[int]]]:
    """All that a client sends, with duplicates of its fds."""
    frames: list[tuple[bytes, list[int]]] = []

    class Recorder(Wire):
        def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
            frames.append((data, [os.dup(fd) for fd in fds]))
            super().send(data, fds)

    with monkeypatch.context() as patch:
        patch.setattr(client_module, "Wire", Recorder)
        with VfioUserClient(server.path, memory=small_memory()) as client:
            use(client)
    return frames


def test_a_client_may_vanish_after_each_message(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    served(server)
    before = Count()

    def use(client: VfioUserClient) -> None:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
        client.withdraw(0, 1 << 20)

    frames = recorded(server, monkeypatch, use)
    assert len(frames) > 80
    for length in range(len(frames)):
        for half in (False, True):
            with connect(server) as raw:
                for data, fds in frames[:length]:
                    send(raw, data, fds)
                if half:
                    data, fds = frames[length]
                    send(raw, data[: len(data) // 2], fds)
    for _, fds in frames:
        for fd in fds:
            os.close(fd)
    assert server.idle()
    del frames
    assert eventually(lambda: Count() == before), f"{Count()} instead of {before}"
    served(server)


def test_a_server_that_vanishes_is_no_riddle_to_the_client(tmp_path: Path) -> None:
    before = Count()
    with serving(tmp_path / "s") as server:
        client = VfioUserClient(server.path, memory=small_memory(), timeout=5.0)
        bring_up(client)
    with pytest.raises(PeerDisconnected):
        client.read_config(0, 2)
    client.loop.run_pending()
    client.close()
    del client, server
    assert Count() == before

"""Front-ends and clients that lie (section 2.13): each message of a good conversation, told wrongly in each way.

The conversation is recorded from a good one over the same server. Then each of its messages is cut, stretched, told
without its fds or with others', repeated, told first of all, or after the driver has broken a ring; and thousands of
programs are made up. After each a good peer is served, and in the end nothing of any of them is left.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.uml import UmlPci
from virtio_test.carrier.vfio_user import client as client_module
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.wire import Wire
from virtio_test.device import Device
from virtio_test.devices.test import TestDevice
from virtio_test.errors import PeerError
from virtio_test.loop import OwnerLoop
from virtio_test.strategies.draw import RandomDraw
from virtio_test.strategies.messages import FrontEndFacts, any_messages
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import Request

from tests.hostile.world import upper
from tests.unit import test_vfio_user_hostile, vfio_user_world
from tests.unit.vhost_user_world import guest
from tests.unit.world import PATIENCE, ServerThread, eventually, mapped_files, open_fds

PAGE: Final = 4096


@dataclass
class Frame:
    """One message, and the fds beside it."""

    data: bytes
    fds: list[int]


class Protocol:
    """What tells the two protocols apart: how large a header is, and where size and flags stand in it."""

    header = 12
    size_at, flags_at = 8, 4
    counts_header = False
    ack = 8
    "The flag that turns between an answer and none."

    def sized(self, data: bytes, size: int) -> bytes:
        total = max(0, size + (self.header if self.counts_header else 0)) & 0xFFFF_FFFF
        return data[: self.size_at] + struct.pack("=I", total) + data[self.size_at + 4 :]

    def flagged(self, data: bytes, bits: int) -> bytes:
        (flags,) = struct.unpack_from("=I", data, self.flags_at)
        return data[: self.flags_at] + struct.pack("=I", flags ^ bits) + data[self.flags_at + 4 :]


class VfioProtocol(Protocol):
    header = 16
    size_at, flags_at = 4, 8
    counts_header = True
    ack = 1 << 4


Lie = Callable[[Protocol, Frame, Random], Iterator[Frame]]
"""What is sent in place of one message."""


def cut(_: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(good.data[: pick.randrange(1, len(good.data))], good.fds)


def stretched(protocol: Protocol, good: Frame, _: Random) -> Iterator[Frame]:
    body = len(good.data) - protocol.header
    yield Frame(protocol.sized(good.data, body + 8) + bytes(8), good.fds)


def shrunk(protocol: Protocol, good: Frame, _: Random) -> Iterator[Frame]:
    body = len(good.data) - protocol.header
    yield Frame(protocol.sized(good.data, max(0, body - 8))[: protocol.header + max(0, body - 8)], good.fds)


def endless(protocol: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(protocol.sized(good.data, pick.choice([1 << 20, 1 << 31, 0xFFFF_FFF0])), good.fds)


def without_fds(_: Protocol, good: Frame, __: Random) -> Iterator[Frame]:
    yield Frame(good.data, [])


def with_more_fds(_: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(good.data, [*good.fds, *[OTHERS[pick.randrange(len(OTHERS))]] * pick.choice([1, 8, 30])])


def with_other_fds(_: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(good.data, [OTHERS[pick.randrange(len(OTHERS))] for _ in good.fds or [0]])


def answered(protocol: Protocol, good: Frame, _: Random) -> Iterator[Frame]:
    """With the answer turned on, or off."""
    yield Frame(protocol.flagged(good.data, protocol.ack), good.fds)


def as_a_reply(protocol: Protocol, good: Frame, _: Random) -> Iterator[Frame]:
    yield Frame(protocol.flagged(good.data, 4 if protocol.header == 12 else 1), good.fds)


def with_reserved_flags(protocol: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(protocol.flagged(good.data, 1 << pick.randrange(8, 32)), good.fds)


def again_and_again(_: Protocol, good: Frame, __: Random) -> Iterator[Frame]:
    yield from [good] * 3


def out_of_range(protocol: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    """The first number of the payload, which is an index or a size where there is one, is another."""
    value = pick.choice([1, 2, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF])
    at = protocol.header + 4 * pick.randrange(3)
    yield Frame(good.data[:at] + struct.pack("=I", value) + good.data[at + 4 :], good.fds)


def of_noise(protocol: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    yield Frame(good.data[: protocol.header] + pick.randbytes(len(good.data) - protocol.header), good.fds)


def of_another_kind(protocol: Protocol, good: Frame, pick: Random) -> Iterator[Frame]:
    kind = struct.pack("=I", pick.randrange(64)) if protocol.header == 12 else struct.pack("=HH", 7, pick.randrange(32))
    yield Frame(kind + good.data[4:], good.fds)


LIES: Final[tuple[Lie, ...]] = (
    cut,
    stretched,
    shrunk,
    endless,
    without_fds,
    with_more_fds,
    with_other_fds,
    answered,
    as_a_reply,
    with_reserved_flags,
    again_and_again,
    out_of_range,
    of_noise,
    of_another_kind,
)

OTHERS: list[int] = []
"""fds that are of no use: filled by `others`."""


@pytest.fixture(autouse=True)
def others(tmp_path: Path) -> Generator[None]:
    """A folder, a page of memory, the device of zeros, both ends of a pipe, an eventfd, a socket."""
    with ExitStack() as stack:
        made = [os.open(tmp_path, os.O_RDONLY), os.memfd_create("page", os.MFD_CLOEXEC), *os.pipe(), os.eventfd(0)]
        made.append(os.open("/dev/zero", os.O_RDONLY))
        os.ftruncate(made[1], PAGE)
        for fd in made:
            stack.callback(os.close, fd)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(one)
        stack.enter_context(other)
        OTHERS[:] = [*made, one.fileno()]
        yield
        OTHERS.clear()


@pytest.fixture(autouse=True)
def quiet() -> Generator[None]:
    """Thousands of lines that say what the tests are for."""
    logger = logging.getLogger("virtio_test")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


# --- servers, and their good conversations -------------------------------------------------------------------------


class Talk:
    """A server, and what a good peer says to it."""

    protocol: Protocol = Protocol()

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / "s"
        self.kind = kind
        device: Device = TestDevice(console=vfio_user_world.silent)
        memory, loop = GuestMemory(), OwnerLoop()
        if kind == "uml":
            device = UmlPci(VirtioPci(upper(), loop=loop, memory=memory))
        self.backend = Backend(device, path=self.path, loop=loop, memory=memory)
        self.thread = ServerThread(self.path, self.backend)

    def close(self) -> None:
        self.thread.close()

    def idle(self) -> bool:
        return eventually(lambda: self.backend.session is None and not self.backend.memory.regions)

    def good(self) -> None:
        """A good peer is served, byte for byte."""
        if self.kind == "uml":
            with FrontEnd(self.path, timeout=PATIENCE) as front:
                features = front.negotiate()
                assert "VERSION_1" in features
            return
        with guest(self.path) as g:
            g.setup()
            g.front.enable(0)
            g.request(1)

    def recorded(self, patch: pytest.MonkeyPatch) -> list[Frame]:
        frames: list[Frame] = []
        send = FrontEnd.send_bytes

        def noted(front: FrontEnd, data: bytes, fds: Sequence[int] = ()) -> None:
            frames.append(Frame(data, [os.dup(fd) for fd in fds]))
            send(front, data, fds)

        with patch.context() as context:
            context.setattr(FrontEnd, "send_bytes", noted)
            with guest(self.path) as g:
                g.front.open_channel()
                g.setup()
                g.front.enable(0)
                if self.kind != "uml":
                    g.front.set_config(0, g.front.get_config(0, 4))
                    g.request(1)
                g.front.set_status(g.front.get_status() | 4)
                g.front.number(Request.GET_MAX_MEM_SLOTS)
                g.front.get_base(0)
                g.front.remove_region(g.memory.regions[0])
                g.front.add_region(g.memory.regions[0])
                g.front.request(Request.RESET_DEVICE)
        return frames


class VfioTalk(Talk):
    protocol = VfioProtocol()

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / "s"
        self.kind = kind
        self.server = vfio_user_world.Server(self.path)

    def close(self) -> None:
        self.server.close()

    def idle(self) -> bool:
        return self.server.idle()

    def good(self) -> None:
        vfio_user_world.served(self.server)

    def recorded(self, patch: pytest.MonkeyPatch) -> list[Frame]:
        frames: list[Frame] = []

        class Recorder(Wire):
            def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
                frames.append(Frame(data, [os.dup(fd) for fd in fds]))
                super().send(data, fds)

        with patch.context() as context:
            context.setattr(client_module, "Wire", Recorder)
            with VfioUserClient(self.path, memory=vfio_user_world.small_memory()) as client:
                driver = vfio_user_world.bring_up(client)
                assert driver.request(1).ret == 102
                client.withdraw(0, 1 << 20)
        # Of the many accesses to registers a few are enough.
        kept: list[Frame] = []
        for frame in frames:
            same = [each for each in kept if each.data[2:4] == frame.data[2:4] and len(each.fds) == len(frame.fds)]
            if len(same) < 4:
                kept.append(frame)
            else:
                for fd in frame.fds:
                    os.close(fd)
        return kept


KINDS: Final = ("vhost-user", "uml", "vfio-user")


@contextmanager
def talking(kind: str, folder: Path) -> Generator[Talk]:
    with closing(VfioTalk(folder, kind) if kind == "vfio-user" else Talk(folder, kind)) as talk:
        yield talk


def say(path: Path, frames: Sequence[Frame]) -> None:
    """Send it all, as far as the server takes it, then nothing more; and wait until it has closed the connection."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(path))
        raw.settimeout(PATIENCE)
        with suppress(BrokenPipeError, ConnectionResetError):
            for frame in frames:
                if frame.fds:
                    socket.send_fds(raw, [frame.data], frame.fds)
                else:
                    raw.sendall(frame.data)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(1 << 16):
                pass


# --- each message, each lie ----------------------------------------------------------------------------------------


@pytest.mark.row("M01", "M02", "M03", "M09", "M11", "M16", "M20", "M21")
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_each_message_told_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lie: Lie) -> None:
    with talking(kind, tmp_path) as talk:
        frames = talk.recorded(monkeypatch)
        assert len(frames) > 14
        talk.good()
        assert talk.idle()
        before = open_fds(), mapped_files(), threading.active_count()
        pick = Random(lie.__name__)
        for number, frame in enumerate(frames):
            lied = [*lie(talk.protocol, frame, pick)]
            # In its place, with all that follows; and as the first thing that is ever said.
            say(talk.path, [*frames[:number], *lied, *frames[number + 1 :]])
            say(talk.path, lied)
            if number % 4 == 0:
                talk.good()
        talk.good()
        assert talk.idle()
        assert (open_fds(), mapped_files(), threading.active_count()) == before
        for frame in frames:
            for fd in frame.fds:
                os.close(fd)


@pytest.mark.row("M11", "M12", "M20")
def test_each_message_after_the_ring_was_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has broken a rule: whatever comes next is answered or ends the connection, and a reset mends it."""
    with talking("vhost-user", tmp_path) as talk:
        frames = talk.recorded(monkeypatch)
        talk.good()
        for frame in frames:
            with guest(talk.path) as g:
                g.setup()
                g.front.enable(0)
                assert g.queue is not None
                layout = g.queue.layout()
                g.memory.write(layout.at("avail.idx"), struct.pack("<H", 999))
                g.kick()
                assert eventually(lambda g=g: g.front.get_status() == 0x40)
                with suppress(PeerError):
                    g.front.send_bytes(Protocol().flagged(frame.data, 0), frame.fds)
                    g.front.check_silent()
            talk.good()
        for frame in frames:
            for fd in frame.fds:
                os.close(fd)


# --- programs that nobody thought of -------------------------------------------------------------------------------


def lies(talk: Talk, seeds: range, frames: list[Frame]) -> None:
    """One made-up program for each seed: lies between the truth, or a front-end from the strategies."""
    before = open_fds(), mapped_files(), threading.active_count()
    for seed in seeds:
        pick = Random(seed)
        if talk.kind != "vfio-user" and seed % 3 == 0:
            any_messages(RandomDraw(pick), facts=FrontEndFacts()).run(talk.path, timeout=PATIENCE)
            continue
        if talk.kind == "vfio-user" and seed % 3 == 0:
            made = [Frame(data, OTHERS[:count]) for data, count in test_vfio_user_hostile.programs(seed)]
            say(talk.path, made)
            continue
        program: list[Frame] = frames[: pick.randrange(3)]
        for _ in range(pick.randrange(1, 12)):
            frame = pick.choice(frames)
            program += pick.choice(LIES)(talk.protocol, frame, pick) if pick.random() < 0.4 else [frame]
        say(talk.path, program)
    talk.good()
    assert talk.idle()
    assert eventually(lambda: (open_fds(), mapped_files(), threading.active_count()) == before)


@contextmanager
def conversation(talk: Talk, patch: pytest.MonkeyPatch) -> Generator[list[Frame]]:
    frames = talk.recorded(patch)
    try:
        talk.good()
        assert talk.idle()
        yield frames
    finally:
        for frame in frames:
            for fd in frame.fds:
                os.close(fd)


@pytest.mark.row("M21", "CVE-2019-14818")
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_malformed_programs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with talking(kind, tmp_path) as talk, conversation(talk, monkeypatch) as frames:
        lies(talk, range(300), frames)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.row("M21", "CVE-2019-14818")
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_malformed_programs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with talking(kind, tmp_path) as talk, conversation(talk, monkeypatch) as frames:
        lies(talk, range(10_000), frames)

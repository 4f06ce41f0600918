"""vhost-user message programs: what a front-end says to a back-end, legal and with one defect, as data.

Theory
------
A `MessageProgram` is a list of `Say`: a request by number, its payload, which fds go with it, and what must come back.
The fds are named by their kind and made when they are sent: ``ram`` is the guest memory of the program, the same file
each time; ``page`` is another file of one page; ``event``, ``pipe``, ``zero`` (``/dev/zero``), ``folder``, ``socket``.

    >>> case = next(message_cases("M05"))
    >>> case.title
    'an empty region'
    >>> case.check("/run/my-back-end")

`legal_messages` sets rings up in any order that the protocol allows and takes them back. `message_cases` has, for rows
of 2.13 of the robustness catalogue, the same with exactly that defect. `any_messages` is an arbitrary front-end.

What must come back is one of `ANSWERS`. A back-end refuses what it cannot do with a number that is not 0, and closes
the connection over what is malformed; one that closes in both cases is as good, so ``refused`` stands for either.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, Self

from virtio_test.errors import InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.messages import (
    FRONTEND_REQUESTS,
    HEADER_BYTES,
    MAX_PAYLOAD,
    PROTOCOL_FEATURES_BIT,
    VERSION,
    Flag,
    ProtocolFeature,
    Request,
)
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Empty,
    MemoryRegion,
    MemoryTable,
    Payload,
    VringAddress,
    VringState,
)
from virtio_test.transport.vhost_user.wire import connect

from .draw import Draw
from .registers import ProgramFailed

__all__ = [
    "ANSWERS",
    "Answer",
    "FrontEndFacts",
    "MessageProgram",
    "MessageWriter",
    "Say",
    "any_messages",
    "legal_messages",
]

Answer = Literal["", "done", "data", "refused", "closed"]
ANSWERS: Final = {
    "": "nothing is waited for",
    "done": "a reply with the number 0",
    "data": "the reply of the request",
    "refused": "a reply with another number, or the end of the connection",
    "closed": "the end of the connection",
}

RAM: Final = 1 << 16
"""Bytes of guest memory, from guest address 0 on."""
USER: Final = 0x7F00_0000_0000
"""Where the front-end says that it has them."""
PAGE: Final = 4096
PROTOCOL: Final = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.RESET_DEVICE
KINDS: Final = ("ram", "page", "event", "pipe", "zero", "folder", "socket")

_FORMAT: Final = "message-program"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("=III")


class Say(NamedTuple):
    """One message.

    Attributes:
        request: its number.
        payload: its bytes.
        flags: of the header; version 1 is in them.
        fds: kinds of the fds beside it.
        size: what the header announces; the payload's length when None.
        cut: how many of the message's bytes are sent before the program hangs up; all of them when None.
        dribble: send it byte by byte.
        answer: what must come back.
    """

    request: int
    payload: bytes = b""
    flags: int = VERSION
    fds: tuple[str, ...] = ()
    size: int | None = None
    cut: int | None = None
    dribble: bool = False
    answer: Answer = ""

    def data(self) -> bytes:
        """The bytes on the wire."""
        size = len(self.payload) if self.size is None else self.size
        return (_HEADER.pack(self.request, self.flags, size) + self.payload)[: self.cut]


class FrontEndFacts(NamedTuple):
    """What a program has to know of the back-end: bits that it may accept, and how many queues there are."""

    features: int = FeatureSet("VERSION_1").bits
    queues: int = 1
    size: int = 16
    protocol: ProtocolFeature = PROTOCOL


_SCRIPT: Final = '''"""{title}: exits with 0 when all comes back that must; its argument is a socket."""

import sys

from virtio_test.strategies import MessageProgram, ProgramFailed

PROGRAM = r"""{text}"""

try:
    MessageProgram.from_json(PROGRAM).check(sys.argv[1])
except ProgramFailed as failure:
    sys.exit(str(failure))
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageProgram:
    """One program.

    Attributes:
        row: the row of the catalogue, or empty.
        title: what is special.
        messages: what is said, in order.
        rule: the rule broken, by the name that our back-end gives it; another one may know it otherwise.
    """

    row: str = ""
    title: str = ""
    messages: tuple[Say, ...] = ()
    rule: str | None = None

    def __post_init__(self) -> None:
        # Numbers alone, so that a repr evaluates back without the names of the protocol.
        plain = (each._replace(request=int(each.request), flags=int(each.flags)) for each in self.messages)
        object.__setattr__(self, "messages", tuple(plain))

    def __str__(self) -> str:
        return f"{self.row or 'messages'}-{self.title}".replace(" ", "_")

    def run(self, where: str | os.PathLike[str] | socket.socket, *, timeout: float = 10.0) -> list[str]:
        """Say all of it over a new connection to that path, or over a connected socket, which is then closed.

        Returns:
            What came back for each message that waits for something: ``done``, ``data``, ``refused`` or ``closed``,
            and ``silence`` where nothing came within `timeout` seconds. It ends with the connection.

        Raises:
            PeerDisconnected: nobody listens there.
        """
        connection = where if isinstance(where, socket.socket) else connect(where, timeout=timeout)
        found: list[str] = []
        with connection, _fds() as make:
            connection.settimeout(timeout)
            for each in self.messages:
                try:
                    _send(connection, each, make)
                    if each.answer:
                        found.append(_answer(connection, each))
                except TimeoutError:
                    found.append("silence")
                except OSError:
                    found.append("closed")
                if found[-1:] in (["closed"], ["silence"]):
                    break
        return found

    def check(self, where: str | os.PathLike[str] | socket.socket, *, timeout: float = 10.0) -> None:
        """Say all of it, and hold what comes back against what must.

        Raises:
            ProgramFailed: something else came back.
        """
        found = self.run(where, timeout=timeout)
        waiting = [each for each in self.messages if each.answer]
        for number, each in enumerate(waiting):
            came = found[number] if number < len(found) else "nothing"
            if came != each.answer and (each.answer, came) != ("refused", "closed"):
                text = f"{self}: {came} came back for {each}, and must be {ANSWERS[each.answer]}"
                raise ProgramFailed(text, self)
            if came == "closed":
                return

    def script(self) -> str:
        """A standalone Python script that replays it at the socket named on its command line, and exits with 0 or 1."""
        return _SCRIPT.format(title=self, text=self.to_json())

    def to_json(self) -> str:
        """One line of JSON; payloads as hexadecimal text."""
        messages = [each._asdict() | {"payload": each.payload.hex()} for each in self.messages]
        head = {"virtio-test": _FORMAT, "version": _VERSION, "row": self.row, "title": self.title}
        return json.dumps(head | {"messages": messages, "rule": self.rule})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The program back.

        Raises:
            InvalidArgument: not JSON, or not a program of this version.
        """
        try:
            found: Any = json.loads(text)
            head = (found.pop("virtio-test"), found.pop("version"))
            if head != (_FORMAT, _VERSION):
                raise InvalidArgument(f"this is {head}, not {(_FORMAT, _VERSION)}")
            messages = tuple(
                Say(**each | {"payload": bytes.fromhex(each["payload"]), "fds": tuple(each["fds"])})
                for each in found.pop("messages")
            )
            return cls(**found, messages=messages)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"no message program: {error}") from None


# --- on the wire ---------------------------------------------------------------------------------------------------


@contextmanager
def _fds() -> Generator[Callable[[str], int]]:
    """Makes fds of a kind; the one of the guest memory is made once, and closed at the end."""
    ram = _file(RAM)

    def make(kind: str) -> int:
        match kind:
            case "ram":
                return os.dup(ram)
            case "page":
                return _file(PAGE)
            case "event":
                return os.eventfd(0)
            case "pipe":
                read, write = os.pipe()
                os.close(read)
                return write
            case "zero":
                return os.open("/dev/zero", os.O_RDONLY)
            case "folder":
                return os.open(tempfile.gettempdir(), os.O_RDONLY)
            case "socket":
                return socket.socket(socket.AF_UNIX).detach()
            case _:
                raise InvalidArgument(f"fds are {', '.join(KINDS)}, not {kind!r}")

    try:
        yield make
    finally:
        os.close(ram)


def _file(size: int) -> int:
    fd = os.memfd_create("virtio-test-program", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _send(connection: socket.socket, message: Say, make: Callable[[str], int]) -> None:
    data = message.data()
    fds: list[int] = []
    try:
        for kind in message.fds:
            fds.append(make(kind))  # noqa: PERF401 - what was made is closed whatever follows
        step = 1 if message.dribble else len(data)
        for at in range(0, len(data), step or 1):
            if at == 0 and fds:
                socket.send_fds(connection, [data[:step]], fds, socket.MSG_NOSIGNAL)
            else:
                connection.sendall(data[at : at + step], socket.MSG_NOSIGNAL)
    finally:
        for fd in fds:
            os.close(fd)
    if message.cut is not None:
        connection.shutdown(socket.SHUT_WR)


def _answer(connection: socket.socket, message: Say) -> str:
    header = _read(connection, HEADER_BYTES)
    if header is None:
        return "closed"
    _, _, size = _HEADER.unpack(header)
    if size > MAX_PAYLOAD:
        return "closed"
    body = _read(connection, size)
    if body is None:
        return "closed"
    row = FRONTEND_REQUESTS.get(message.request)
    if row is not None and row.reply is not None and not row.refusable:
        return "data"
    return "done" if body == bytes(8) else "refused"


def _read(connection: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part, fds, _, _ = socket.recv_fds(connection, size - len(data), 16)
        for fd in fds:
            os.close(fd)
        if not part:
            return None
        data += part
    return data


# --- writing programs ----------------------------------------------------------------------------------------------


@dataclass
class MessageWriter:
    """Writes a program for a back-end with these facts."""

    facts: FrontEndFacts = field(default_factory=FrontEndFacts)
    messages: list[Say] = field(default_factory=list[Say])

    def say(self, request: int, payload: Payload | None = None, *fds: str, answer: Answer | None = None) -> None:
        """One well-formed message; whether it is done is asked for where the protocol has no reply for it."""
        row = FRONTEND_REQUESTS.get(request)
        replies = row is not None and row.reply is not None and not row.refusable
        flags = VERSION if replies else VERSION | int(Flag.NEED_REPLY)
        expected: Answer = ("data" if replies else "done") if answer is None else answer
        self.messages.append(Say(request, (payload or Empty()).pack(), flags, fds, answer=expected))

    def begin(self, more: int = 0) -> None:
        """Negotiate, `more` protocol features than the facts have too: from here on a message can be answered."""
        quiet = Say(Request.SET_OWNER)
        self.say(Request.GET_FEATURES)
        self.messages.append(quiet)
        self.say(Request.GET_PROTOCOL_FEATURES)
        self.messages.append(Say(Request.SET_PROTOCOL_FEATURES, U64(int(self.facts.protocol) | more).pack()))
        self.say(Request.SET_FEATURES, U64(self.facts.features | 1 << PROTOCOL_FEATURES_BIT))

    def memory(self) -> None:
        """One region, from guest address 0 on."""
        self.say(Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, RAM, USER, 0),)), "ram")

    def num(self, index: int = 0) -> None:
        """The size of a ring."""
        self.say(Request.SET_VRING_NUM, VringState(index, self.facts.size))

    def base(self, index: int = 0) -> None:
        """Where a ring goes on."""
        self.say(Request.SET_VRING_BASE, VringState(index, 0))

    def address(self, index: int = 0) -> None:
        """Where a ring lies: in a page of its own."""
        at = USER + PAGE * (1 + index)
        self.say(Request.SET_VRING_ADDR, VringAddress(index, 0, at, at + 0xC00, at + 0x800))

    def call(self, index: int = 0) -> None:
        """Where a ring's calls go."""
        self.say(Request.SET_VRING_CALL, U64(index), "event")

    def kick(self, index: int = 0) -> None:
        """Where its kicks come from: it is started by that."""
        self.say(Request.SET_VRING_KICK, U64(index), "event")

    def enable(self, index: int = 0, *, on: bool = True) -> None:
        """Enable a ring, or disable it."""
        self.say(Request.SET_VRING_ENABLE, VringState(index, int(on)))

    def ring(self, index: int = 0) -> None:
        """All of one ring."""
        for part in (self.num, self.base, self.address, self.call, self.kick, self.enable):
            part(index)

    def stop(self, index: int = 0) -> None:
        """Take a ring back."""
        self.say(Request.GET_VRING_BASE, VringState(index))

    def run(self) -> None:
        """All of it, to rings that run and are taken back."""
        self.memory()
        for index in range(self.facts.queues):
            self.ring(index)
        for index in range(self.facts.queues):
            self.stop(index)

    def program(self, *, row: str = "", title: str = "", rule: str | None = None) -> MessageProgram:
        """What was written so far."""
        return MessageProgram(row=row, title=title, messages=tuple(self.messages), rule=rule)


def legal_messages(draw: Draw, *, facts: FrontEndFacts | None = None) -> MessageProgram:
    """A front-end that keeps every rule: memory before rings, a size before the addresses, the kick after both."""
    writer = MessageWriter(FrontEndFacts() if facts is None else facts)
    writer.begin()
    writer.memory()
    for _ in range(draw.vary(1, 3, 1)):
        for index in range(writer.facts.queues):
            free: list[Callable[[int], None]] = [writer.base, writer.call]
            order: list[Callable[[int], None]] = [writer.num, writer.address]
            for part in free:
                order.insert(draw.vary(0, len(order), len(order)), part)
            for part in (*order, writer.kick, writer.enable):
                part(index)
        for _ in range(draw.vary(0, 2, 0)):
            writer.enable(0, on=False)
            writer.enable(0)
        if draw.some((False, True)):
            writer.say(Request.RESET_DEVICE)
        for index in range(writer.facts.queues):
            writer.stop(index)
        if draw.some((False, True)):
            writer.memory()
    messages = tuple(
        each._replace(dribble=draw.vary(0, 15, 1) == 0) if not each.fds else each for each in writer.messages
    )
    return replace(writer.program(title="legal"), messages=messages)


_NUMBERS: Final = (0, 1, 2, 0x100, 0x1FF, 0xFFFF, 1 << 30, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, USER, USER + RAM)


def any_messages(draw: Draw, *, facts: FrontEndFacts | None = None, most: int = 20) -> MessageProgram:
    """An arbitrary front-end: any request, payload, flags and fds, between messages of a good one."""
    writer = MessageWriter(FrontEndFacts() if facts is None else facts)
    if draw.some((True, True, False)):
        writer.begin()
    for _ in range(draw.vary(1, most, 6)):
        index = draw.vary(0, writer.facts.queues, 0)
        good: Sequence[Callable[[], None]] = (
            writer.memory,
            lambda index=index: writer.ring(index),
            lambda index=index: writer.stop(index),
            lambda index=index: writer.enable(index, on=False),
        )
        if draw.some((True, False)):
            draw.choice(good)()
            continue
        row = draw.choice(tuple(FRONTEND_REQUESTS.values()))
        least, largest = row.payload.sizes()
        length = draw.some((least, least, largest, 0, 8, 40))
        numbers = [draw.some(_NUMBERS) for _ in range(length // 8 + 1)]
        payload = b"".join(each.to_bytes(8, "little") for each in numbers)[:length]
        fds = tuple(draw.choice(KINDS) for _ in range(draw.some((row.fds[0], row.fds[0], 0, 1, 2))))
        flags = draw.some((VERSION, VERSION | int(Flag.NEED_REPLY), VERSION, 0, VERSION | int(Flag.REPLY), 0x101))
        request = draw.some((int(row.request), int(row.request), 0, 46, 0xFFFF_FFFF))
        writer.messages.append(Say(request, payload, flags, fds, size=draw.some((None, None, None, 0, 1 << 31))))
    # Nobody knows what is answered, so nothing is waited for but the end.
    quiet = tuple(each._replace(answer="", flags=each.flags & ~int(Flag.NEED_REPLY)) for each in writer.messages)
    return replace(writer.program(title="any"), messages=quiet)

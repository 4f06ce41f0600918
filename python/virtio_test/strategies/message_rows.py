"""Message programs with one defect: rows of 2.13 of the robustness catalogue, and R11, of records.

Each sets a back-end up as a good front-end does, as far as the row needs it, breaks one rule, and where the connection
outlives that goes on as if nothing had happened: what was refused has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from virtio_test.errors import InvalidArgument
from virtio_test.transport.vhost_user.messages import PROTOCOL_FEATURES_BIT, VERSION, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringState,
)

from .draw import Draw, every
from .messages import PAGE, RAM, USER, FrontEndFacts, MessageProgram, MessageWriter, Say

__all__ = ["MESSAGE_ROWS", "message_case", "message_cases"]

Defect = Callable[[Draw, MessageWriter], tuple[str, str]]
"""Writes the defect; what it is, and the rule that our back-end then names."""

Refused = tuple[str, str, Request, Payload, tuple[str, ...]]
"""What it is, rule, request, payload, fds."""

_ROWS: Final[dict[str, list[Defect]]] = {}
_TOP: Final = (1 << 64) - PAGE


def _row(name: str) -> Callable[[Defect], Defect]:
    def register(defect: Defect) -> Defect:
        _ROWS.setdefault(name, []).append(defect)
        return defect

    return register


@_row("M01")
def _m01(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    title, rule, say = draw.choice(
        (
            ("version 0", "BadVersion", Say(Request.GET_FEATURES, flags=0)),
            ("version 2", "BadVersion", Say(Request.GET_FEATURES, flags=2)),
            ("reserved flags", "ReservedFlags", Say(Request.GET_FEATURES, flags=0x101)),
            ("a reply to nothing", "ReplyFlag", Say(Request.GET_FEATURES, flags=5)),
            ("more than 4096 bytes", "MessageTooLong", Say(Request.SET_FEATURES, bytes(8), size=5000)),
            ("4 GiB announced", "MessageTooLong", Say(1000, flags=9, size=0xFFFF_FFFF)),
            ("half a number", "PayloadSize", Say(Request.SET_FEATURES, bytes(4))),
            ("a number where nothing belongs", "PayloadSize", Say(Request.SET_OWNER, bytes(8))),
        )
    )
    writer.begin()
    writer.run()
    writer.messages.append(say._replace(answer="closed"))
    return title, rule


@_row("M02")
def _m02(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    cut = draw.choice((1, 11, 12, 19))
    writer.begin()
    writer.messages.append(Say(Request.SET_FEATURES, bytes(8), cut=cut, answer="closed"))
    return f"cut off after {cut} bytes", "Truncated"


@_row("M03")
def _m03(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    request, payload, count = draw.choice(
        (
            (Request.SET_OWNER, Empty(), 1),
            (Request.GET_FEATURES, Empty(), 3),
            (Request.SET_VRING_KICK, U64(0), 0),
            (Request.SET_VRING_KICK, U64(0), 2),
            (Request.SET_VRING_CALL, U64(0x100), 1),
            (Request.SET_VRING_CALL, U64(0), 32),
            (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, PAGE, USER, 0),)), 0),
            (Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, PAGE, USER, 0),)), 9),
        )
    )
    writer.begin()
    writer.messages.append(Say(request, payload.pack(), VERSION, ("page",) * count, answer="closed"))
    return f"{request.name} with {count} fds", "FdCount"


def _table(*regions: MemoryRegion) -> MemoryTable:
    return MemoryTable(regions)


def _refuse(draw: Draw, writer: MessageWriter, cases: tuple[Refused, ...], *, running: bool = True) -> tuple[str, str]:
    """Said in the middle of a good program, which goes on."""
    title, rule, request, payload, fds = draw.choice(cases)
    writer.begin()
    writer.memory()
    if running:
        writer.ring()
    else:
        writer.num()
    writer.say(request, payload, *fds, answer="refused")
    if not running:
        writer.ring()
    writer.enable(0, on=False)
    writer.stop()
    return title, rule


@_row("M04")
def _m04(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    own = writer.facts.features | 1 << PROTOCOL_FEATURES_BIT
    cases: tuple[Refused, ...] = (
        ("bit 63", "FeatureNotOffered", Request.SET_FEATURES, U64(own | 1 << 63), ()),
        ("bit 50", "FeatureNotOffered", Request.SET_FEATURES, U64(own | 1 << 50), ()),
        ("protocol bit 40", "ProtocolFeatureNotOffered", Request.SET_PROTOCOL_FEATURES, U64(1 << 40), ()),
    )
    return _refuse(draw, writer, cases, running=False)


@_row("M05")
def _m05(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    one, two, table = ("page",), ("page", "page"), Request.SET_MEM_TABLE
    cases: tuple[Refused, ...] = (
        ("an empty region", "RegionSize", table, _table(MemoryRegion(0, 0, USER, 0)), one),
        ("no region", "RegionCount", table, _table(), ()),
        ("a guest address that wraps", "RegionWrap", table, _table(MemoryRegion(_TOP, 2 * PAGE, USER, 0)), one),
        ("a user address that wraps", "RegionWrap", table, _table(MemoryRegion(0, 2 * PAGE, _TOP, 0)), one),
        ("an offset that wraps", "RegionWrap", table, _table(MemoryRegion(0, 2 * PAGE, USER, _TOP)), one),
        ("a file that is too short", "RegionBeyondFile", table, _table(MemoryRegion(0, 2 * PAGE, USER, 0)), one),
        ("an offset behind the file", "RegionBeyondFile", table, _table(MemoryRegion(0, PAGE, USER, PAGE)), one),
        ("a pipe", "RegionFile", table, _table(MemoryRegion(0, PAGE, USER, 0)), ("pipe",)),
        ("a device", "RegionFile", table, _table(MemoryRegion(0, PAGE, USER, 0)), ("zero",)),
        (
            "regions at one guest address",
            "RegionOverlap",
            table,
            _table(MemoryRegion(0, PAGE, USER, 0), MemoryRegion(0, PAGE, 2 * USER, 0)),
            two,
        ),
        (
            "regions at one user address",
            "RegionOverlap",
            table,
            _table(MemoryRegion(0, PAGE, USER, 0), MemoryRegion(PAGE, PAGE, USER, 0)),
            two,
        ),
    )
    return _refuse(draw, writer, cases)


@_row("M06")
def _m06(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    add, remove = Request.ADD_MEM_REG, Request.REM_MEM_REG
    cases: tuple[Refused, ...] = (
        ("added twice", "RegionOverlap", add, SingleRegion(0, PAGE, USER, 0), ("page",)),
        ("added empty", "RegionSize", add, SingleRegion(4 * RAM, 0, 2 * USER, 0), ("page",)),
        ("an unknown one removed", "RegionUnknown", remove, SingleRegion(0, PAGE, USER, 0), ()),
    )
    return _refuse(draw, writer, cases)


@_row("M08")
def _m08(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    base = draw.choice((0x1_0000, 0xFFFF_FFFF))
    case: Refused = (f"base {base:#x}", "VringBase", Request.SET_VRING_BASE, VringState(0, base), ())
    return _refuse(draw, writer, (case,), running=False)


@_row("M09")
def _m09(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    address = Request.SET_VRING_ADDR
    end = USER + RAM
    cases: tuple[Refused, ...] = (
        ("desc not aligned", "VringAddress", address, VringAddress(0, 0, USER + 8, USER + PAGE, USER + PAGE), ()),
        ("used not aligned", "VringAddress", address, VringAddress(0, 0, USER, USER + PAGE + 2, USER + PAGE), ()),
        ("avail not aligned", "VringAddress", address, VringAddress(0, 0, USER, USER + PAGE, USER + PAGE + 1), ()),
        ("a guest address", "VringAddress", address, VringAddress(0, 0, 0x1000, USER, USER), ()),
        ("beyond the memory", "VringAddress", address, VringAddress(0, 0, end - 16, USER, USER), ()),
        ("at the end of all addresses", "VringAddress", address, VringAddress(0, 0, (1 << 64) - 16, USER, USER), ()),
        ("undefined flags", "VringFlags", address, VringAddress(0, 0x8000_0000, USER, USER, USER), ()),
    )
    return _refuse(draw, writer, cases)


@_row("M09")
def _m09_sizes(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    size = draw.choice((0, 3, 100, 0x1_0000, 0x8000_0000))
    case: Refused = (f"size {size}", "VringSize", Request.SET_VRING_NUM, VringState(0, size), ())
    return _refuse(draw, writer, (case,), running=False)


@_row("M10")
def _m10(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    kick, call, err = Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR
    cases: tuple[Refused, ...] = (
        ("kicks from a file", "FdType", kick, U64(0), ("page",)),
        ("kicks from a device that is always readable", "FdType", kick, U64(0), ("zero",)),
        ("calls to a file", "FdType", call, U64(0), ("page",)),
        ("errors to a folder", "FdType", err, U64(0), ("folder",)),
        ("a reserved bit", "VringValue", kick, U64(0x200), ("event",)),
    )
    return _refuse(draw, writer, cases)


@_row("M11")
def _m11(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    beyond = writer.facts.queues
    cases: tuple[Refused, ...] = (
        ("a size for no queue", "VringIndex", Request.SET_VRING_NUM, VringState(beyond, 16), ()),
        ("kicks for no queue", "VringIndex", Request.SET_VRING_KICK, U64(0xFF), ("event",)),
        ("no queue enabled", "VringIndex", Request.SET_VRING_ENABLE, VringState(0xFFFF_FFFF, 1), ()),
        ("enabled by 2", "VringValue", Request.SET_VRING_ENABLE, VringState(0, 2), ()),
    )
    return _refuse(draw, writer, cases)


@_row("M12")
def _m12(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    """No defect but a want of order: a ring that is taken back twice, or never ran, is taken back all the same."""
    started = draw.choice((True, False))
    writer.begin()
    writer.memory()
    if started:
        writer.ring()
    else:
        writer.num()
    writer.stop()
    writer.stop()
    writer.ring()
    return "taken back twice" if started else "taken back before it ran", ""


@_row("M13")
def _m13(_: Draw, writer: MessageWriter) -> tuple[str, str]:
    writer.begin()
    writer.memory()
    writer.ring()
    writer.say(Request.RESET_DEVICE)
    writer.ring()
    return "reset while it runs", ""


@_row("M15")
def _m15(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    """The answer to a log cannot say no, so the connection ends."""
    least = RAM // PAGE // 8
    title, rule, log, fd = draw.choice(
        (
            ("an empty log", "LogRange", Log(0, 0), "page"),
            ("a log behind its file", "LogRange", Log(PAGE, 1), "page"),
            ("a log whose end wraps", "LogRange", Log(PAGE, 2**64 - PAGE), "page"),
            ("a log of 2^64 bytes", "LogRange", Log(2**64 - 1, 2**64 - 1), "page"),
            ("a log that covers less than the memory", "LogTooSmall", Log(least - 1, 0), "page"),
            ("a log in a pipe", "LogFile", Log(least, 0), "pipe"),
        )
    )
    writer.begin(ProtocolFeature.LOG_SHMFD)
    writer.memory()
    writer.ring()
    writer.say(Request.SET_LOG_BASE, log, fd, answer="closed")
    return title, rule


@_row("M16")
def _m16(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    title, rule, request, payload = draw.choice(
        (
            ("an unknown request", "UnknownRequest", 46, Empty()),
            ("request 0", "UnknownRequest", 0, Empty()),
            ("what was not negotiated", "NotNegotiated", int(Request.VRING_KICK), VringState(0)),
        )
    )
    writer.begin()
    writer.say(request, payload, answer="refused")
    writer.run()
    return title, rule


@_row("M17")
def _m17(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    """Of a device that has no IOMMU before it; what is wrong with an entry needs a driver that accepted one."""
    kind = draw.choice((1, 2, 3, 4, 0, 0xFF))
    entry = Iotlb(0, PAGE, USER, 3, kind)
    case: Refused = (f"an IOTLB message of type {kind}", "NotNegotiated", Request.IOTLB_MSG, entry, ())
    return _refuse(draw, writer, (case,))


@_row("M20")
def _m20(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    """No defect: a front-end leaves while its ring runs. The next finds nothing of it."""
    recorded = draw.choice((False, True))
    writer.begin(ProtocolFeature.INFLIGHT_SHMFD if recorded else 0)
    writer.memory()
    if recorded:
        writer.say(Request.GET_INFLIGHT_FD, Inflight(0, 0, writer.facts.queues, writer.facts.size))
    writer.ring()
    return "leaves a ring with a record" if recorded else "leaves a ring that runs", ""


@_row("R11")
def _r11(draw: Draw, writer: MessageWriter) -> tuple[str, str]:
    """What comes back with a front-end that was away is a record that cannot be."""
    queues, size = writer.facts.queues, writer.facts.size
    title, record, fd = draw.choice(
        (
            ("a record of nothing", Inflight(0, 0, queues, size), "page"),
            ("a record too small", Inflight(queues * 16 * (size + 1) - 1, 0, queues, size), "page"),
            ("a record larger than its file", Inflight(2 * PAGE, 0, queues, size), "page"),
            ("a record whose end wraps", Inflight(PAGE, 2**64 - PAGE, queues, size), "page"),
            ("a record in a pipe", Inflight(PAGE, 0, queues, size), "pipe"),
        )
    )
    writer.begin(ProtocolFeature.INFLIGHT_SHMFD)
    writer.memory()
    writer.say(Request.SET_INFLIGHT_FD, record, fd, answer="refused")
    writer.ring()
    writer.stop()
    return title, "InflightRegion"


MESSAGE_ROWS: Final[tuple[str, ...]] = tuple(sorted(_ROWS))
"""Every row of the catalogue that has a program here."""


def _programs(rows: tuple[str, ...]) -> list[tuple[str, Defect]]:
    unknown = [each for each in rows if each not in _ROWS]
    if unknown:
        raise InvalidArgument(f"no message program for {', '.join(unknown)}; rows are {', '.join(MESSAGE_ROWS)}")
    return [(row, defect) for row in rows or MESSAGE_ROWS for defect in _ROWS[row]]


def _make(draw: Draw, row: str, defect: Defect, facts: FrontEndFacts) -> MessageProgram:
    writer = MessageWriter(facts)
    title, rule = defect(draw, writer)
    return writer.program(row=row, title=title, rule=rule or None)


def message_cases(*rows: str, facts: FrontEndFacts | None = None) -> Iterator[MessageProgram]:
    """Every case of these rows, all when none is named, for a back-end with these facts, in a stable order."""
    about = FrontEndFacts() if facts is None else facts
    for row, defect in _programs(rows):
        yield from every(lambda draw, row=row, defect=defect: _make(draw, row, defect, about))


def message_case(draw: Draw, *rows: str, facts: FrontEndFacts | None = None) -> MessageProgram:
    """One case of these rows, of all when none is named."""
    row, defect = draw.choice(_programs(rows))
    return _make(draw, row, defect, FrontEndFacts() if facts is None else facts)

"""Programs with one defect in registers: rows of 2.6 to 2.8 of the robustness catalogue, for either transport.

Each begins as a driver that keeps the rules, breaks exactly one, reads back what a device may make of that, and then
resets the device and brings it up: whatever was done to it, it is to serve again.

The outcomes are those of 1.4 where it leaves no choice, and ours where it does (see `docs/rows.md`): a device of your
own that chooses otherwise will fail some of them, which is then a thing to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

from virtio_test.errors import InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.spec.mmio import REGISTERS as PAGE
from virtio_test.spec.pci import COMMON
from virtio_test.spec.status import Status

from .draw import Draw, every
from .registers import LIVE, READY, UP, Facts, Peek, Poke, RegisterProgram, TransportName, Writer

__all__ = ["REGISTER_ROWS", "register_case", "register_cases"]

Broken = tuple[str, ...]
Defect = Callable[[Draw, Writer], tuple[str, Broken]]
"""Writes the defect; what it is, and the rules that our devices then name."""

Area = Literal["desc", "driver", "device"]

_ROWS: Final[dict[str, list[tuple[tuple[TransportName, ...], Defect]]]] = {}
_BOTH: Final[tuple[TransportName, ...]] = ("pci", "mmio")
_NEEDS_RESET: Final = int(Status.DEVICE_NEEDS_RESET)
_AREAS: Final[tuple[tuple[Area, int], ...]] = (("desc", 8), ("driver", 1), ("device", 2))


def _row(*names: str, on: tuple[TransportName, ...] = _BOTH) -> Callable[[Defect], Defect]:
    def register(defect: Defect) -> Defect:
        for name in names:
            _ROWS.setdefault(name, []).append((on, defect))
        return defect

    return register


def _to_queues(writer: Writer) -> None:
    writer.begin()
    writer.accept()


# --- 2.6: queues ---------------------------------------------------------------------------------------------------


def _size(writer: Writer, size: int) -> Broken:
    """A size that is not taken over: over PCI the register says so."""
    _to_queues(writer)
    writer.queue(0, size=4, enable=False)
    writer.poke("queue_size", size)
    if writer.transport == "pci":
        writer.peek("queue_size", 4)
    writer.poke("queue_enable", 1)
    writer.peek("queue_enable", 1)
    writer.go()
    writer.peek("device_status", LIVE)
    return ("BadQueueSize",)


@_row("Q01")
def _q01(_: Draw, writer: Writer) -> tuple[str, Broken]:
    return "size 0", _size(writer, 0)


@_row("Q02")
def _q02(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    size = draw.choice((3, 5, 6, 7))
    return f"size {size}", _size(writer, size)


@_row("Q03")
def _q03(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    size = draw.choice((1 << writer.facts.queue_sizes[0].bit_length(), 32768))
    return f"size {size}", _size(writer, size)


@_row("Q04")
def _q04(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    size = draw.choice((65535,) if writer.transport == "pci" else (65535, 65536, 65540, 0xFFFF_FFFF))
    return f"size {size}", _size(writer, size)


@_row("Q05")
def _q05(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(("queue_size", "queue_desc", "queue_driver", "queue_device"))
    _to_queues(writer)
    writer.queue(0)
    writer.poke(name, 2 if name == "queue_size" else 0xF000)
    if writer.transport == "pci":
        base = {"queue_size": 4, "queue_desc": 0x1000, "queue_driver": 0x1800, "queue_device": 0x1C00}
        writer.peek(name, base[name])
    writer.go()
    writer.kick()
    writer.peek("device_status", LIVE)
    return f"{name} of an enabled queue", ("EnabledQueueWritten",)


@_row("Q06", on=("pci",))
def _q06(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    value = draw.choice((1, 0, 2, 0xFFFF))
    _to_queues(writer)
    writer.queue(0)
    writer.poke("queue_enable", value)
    writer.peek("queue_enable", 1)
    return f"queue_enable {value} of an enabled queue", ("EnabledQueueWritten" if value == 1 else "BadQueueEnable",)


@_row("Q06", on=("mmio",))
def _q06_page(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    value = draw.choice((2, 0xFFFF_FFFF))
    _to_queues(writer)
    writer.queue(0)
    writer.poke("queue_enable", value)
    writer.peek("queue_enable", 1)
    return f"QueueReady {value:#x}", ("BadQueueReady",)


@_row("Q08")
def _q08(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    area, off = draw.choice(_AREAS)
    _to_queues(writer)
    writer.queue(0, enable=False)
    writer.address(area, 0x3000 + off)
    writer.poke("queue_enable", 1)
    writer.go()
    writer.peek("device_status", LIVE | _NEEDS_RESET)
    return f"{area} not aligned", ("RingMisaligned",)


@_row("Q09", "D11")
def _q09(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    areas: tuple[Area, ...] = ("desc", "driver", "device")
    return _unmapped(writer, draw.choice(areas), draw.choice((0xFFFF_FFFF_FFFF_FFF0, 1 << 62)))


def _unmapped(writer: Writer, area: Area, address: int) -> tuple[str, Broken]:
    _to_queues(writer)
    writer.queue(0, enable=False)
    writer.address(area, address)
    writer.poke("queue_enable", 1)
    writer.go()
    writer.peek("device_status", LIVE | _NEEDS_RESET)
    return f"{area} at {address:#x}", ("RingUnmapped",)


@_row("Q14")
def _q14(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    how = draw.choice(
        ("value 2", "without the feature") if writer.facts.has("RING_RESET") else ("without the feature",)
    )
    writer.begin()
    writer.accept(None if how == "value 2" else writer.accepted & ~FeatureSet("RING_RESET").bits)
    writer.queue(0)
    writer.go()
    writer.poke("queue_reset", 2 if how == "value 2" else 1)
    writer.peek("queue_enable", 1)
    return f"queue_reset {how}", ("BadQueueReset",) if how == "value 2" else ("QueueResetNotNegotiated",)


@_row("Q16")
def _q16(_: Draw, writer: Writer) -> tuple[str, Broken]:
    writer.bring_up(queues=0)
    writer.kick(0)
    writer.peek("device_status", LIVE)
    return "no queue enabled", ()


# --- 2.7: status, features, reset ----------------------------------------------------------------------------------


@_row("D01")
def _d01(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    bits = [bit for bit in (23, 50, 63) if not writer.facts.features >> bit & 1]
    bit = draw.choice(bits)
    writer.begin()
    writer.accept(writer.accepted | 1 << bit)
    writer.peek("device_status", UP)
    return f"bit {bit}, which is not offered", ("FeatureNotOffered", "BadFeatures")


@_row("D02")
def _d02(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    select = draw.choice((0, 1))
    _to_queues(writer)
    writer.poke("driver_feature_select", select)
    writer.poke("driver_feature", 0xFFFF_FFFF)
    if writer.transport == "pci":
        writer.peek("driver_feature", writer.accepted >> 32 * select & 0xFFFF_FFFF)
    writer.peek("device_status", READY)
    return f"features word {select} after FEATURES_OK", ("FeaturesAfterOk",)


@_row("D04")
def _d04(_: Draw, writer: Writer) -> tuple[str, Broken]:
    writer.begin()
    writer.poke("device_status", UP | Status.DRIVER_OK)
    writer.peek("device_status", UP)
    return "DRIVER_OK without FEATURES_OK", ("DriverOkWithoutFeaturesOk",)


@_row("D05")
def _d05(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    value = draw.choice((LIVE & ~8, 1, 3))
    writer.bring_up()
    writer.poke("device_status", value)
    writer.peek("device_status", LIVE)
    return f"status {value:#x} over {LIVE:#x}", ("StatusBitCleared",)


@_row("D06")
def _d06(_: Draw, writer: Writer) -> tuple[str, Broken]:
    writer.bring_up()
    writer.poke("device_status", LIVE | _NEEDS_RESET)
    writer.peek("device_status", LIVE)
    return "the driver sets NEEDS_RESET", ("DriverSetNeedsReset",)


@_row("D07")
def _d07(_: Draw, writer: Writer) -> tuple[str, Broken]:
    writer.bring_up()
    writer.poke("device_status", LIVE | 0x20)
    writer.peek("device_status", LIVE)
    return "an undefined bit", ("UndefinedStatusBit",)


@_row("D08", "D16")
def _d08(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    moment = draw.choice(("at first", "with features", "live", "broken", "given up"))
    rules: Broken = ()
    if moment == "at first":
        writer.begin(to=0)
    if moment == "with features":
        _to_queues(writer)
    elif moment != "at first":
        writer.bring_up()
    if moment == "broken":
        _, rules = _unmapped(writer, "desc", 1 << 62)
    elif moment == "given up":
        writer.poke("device_status", LIVE | Status.FAILED)
        writer.peek("device_status", LIVE | Status.FAILED)
    for _ in range(2):
        writer.poke("device_status", 0)
        writer.peek("device_status", 0)
        writer.turn()
    return f"reset {moment}", rules


@_row("D10")
def _d10(_: Draw, writer: Writer) -> tuple[str, Broken]:
    writer.bring_up()
    writer.go()
    writer.peek("device_status", LIVE)
    return "DRIVER_OK twice", ()


@_row("D14")
def _d14(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    select = draw.choice((4, 0x8000_0000, 0xFFFF_FFFF))
    writer.begin()
    writer.poke("device_feature_select", select)
    writer.peek("device_feature", 0)
    writer.poke("driver_feature_select", select)
    writer.poke("driver_feature", 1)
    writer.accept()
    writer.peek("device_status", READY)
    return f"features word {select:#x}", ("FeatureNotOffered",)


@_row("D15")
def _d15(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    where, offset, own = writer.place("device_status")
    width = draw.choice(tuple(each for each in (1, 2, 4) if each != own))
    writer.bring_up()
    writer.steps.append(Poke(where, offset, width, 0))
    writer.peek("device_status", LIVE)
    return f"status written with {width} bytes", ("AccessWidth" if where == "common" else "RegisterWidth",)


@_row("D17")
def _d17(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    """With SUSPEND on offer the plain driver accepts it; without, and before DRIVER_OK, the bit is nothing."""
    early = draw.choice((True, False))
    writer.begin()
    writer.accept(writer.accepted & ~FeatureSet("SUSPEND").bits)
    writer.queue(0)
    if not early:
        writer.go()
    status = READY if early else LIVE
    writer.poke("device_status", status | Status.SUSPEND)
    writer.turn()
    writer.peek("device_status", status)
    return "SUSPEND before DRIVER_OK" if early else "SUSPEND without its feature", ("SuspendNotPossible",)


# --- 2.8: PCI ------------------------------------------------------------------------------------------------------


@_row("X01", on=("pci",))
def _x01(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(tuple(COMMON))
    place = COMMON[name]
    good = (8, 4) if place.size == 8 else (place.size,)
    # Two registers of 32 bits, or one and the next, are no register of 64.
    width = draw.choice(tuple(each for each in (1, 2, 3, 4, 8) if each not in good))
    writer.begin()
    writer.steps.append(Peek("common", place.offset, width, (1 << 8 * width) - 1))
    writer.steps.append(Poke("common", place.offset, width, 0))
    writer.peek("device_status", UP)
    return f"{name} with {width} bytes", ("AccessWidth",)


@_row("X01", on=("mmio",))
def _x01_page(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(tuple(PAGE))
    width = draw.choice((1, 2, 8))
    writer.begin()
    writer.steps.append(Peek("page", PAGE[name].offset, width, 0))
    writer.steps.append(Poke("page", PAGE[name].offset, width, 0))
    writer.peek("device_status", UP)
    return f"{name} with {width} bytes", ("RegisterWidth",)


@_row("X02", on=("pci",))
def _x02(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(("config_msix_vector", "queue_msix_vector"))
    vector = draw.choice((0x800, 0xFFFE))
    _to_queues(writer)
    writer.queue(0, enable=False)
    place = COMMON[name]
    writer.steps.append(Poke("common", place.offset, place.size, vector))
    writer.steps.append(Peek("common", place.offset, place.size, 0xFFFF))
    return f"{name} {vector:#x}", ("BadVector",)


@_row("X03", on=("pci",))
def _x03(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    behind = 4 * len(writer.facts.queue_sizes)
    offset, width = draw.choice(((behind, 2), (1, 2), (2, 2), (0, 1), (0, 4), (0, 8)))
    writer.bring_up()
    writer.steps.append(Poke("notify", offset, width, 0))
    writer.turn()
    writer.peek("device_status", LIVE)
    rule = "AccessWidth" if offset == behind else "BadNotification"
    return f"notified with {width} bytes at {offset}", (rule,)


@_row("X03", on=("mmio",))
def _x03_page(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    value = draw.choice((len(writer.facts.queue_sizes), 0xFFFF, 0xFFFF_FFFF))
    writer.bring_up()
    writer.kick(value)
    writer.peek("device_status", LIVE)
    return f"QueueNotify {value:#x}", ()


@_row("X04", on=("pci",))
def _x04(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    width = draw.choice((1, 2, 4))
    writer.bring_up()
    writer.steps += [Poke("isr", 0, 1, 3), Peek("isr", 0, width), Peek("isr", 0, 1, 0)]
    return f"ISR status written, and read with {width} bytes", ("ReadOnlyRegister",)


@_row("X06", on=("pci",))
def _x06(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    select = draw.choice((4, 5, 0xFFFF_FFFF))
    writer.begin()
    writer.poke("device_feature_select", select)
    writer.peek("device_feature", 0)
    return f"device_feature_select {select:#x}", ()


@_row("X07", on=("pci",))
def _x07(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(tuple(name for name, each in COMMON.items() if not each.driver_writable))
    place = COMMON[name]
    writer.begin()
    writer.poke("device_feature_select", 1)
    expected = writer.facts.features >> 32 & 0xFFFF_FFFF if name == "device_feature" else None
    expected = len(writer.facts.queue_sizes) if name == "num_queues" else expected
    writer.steps.append(Poke("common", place.offset, place.size, 0x5A))
    writer.steps.append(Peek("common", place.offset, place.size, expected))
    return f"{name} written", ("ReadOnlyRegister",)


@_row("X07", on=("mmio",))
def _x07_page(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    name = draw.choice(tuple(name for name, each in PAGE.items() if each.access == "R"))
    fixed = {"MagicValue": 0x74726976, "Version": 2}
    writer.begin()
    writer.poke("device_feature_select", 0)
    writer.steps.append(Poke("page", PAGE[name].offset, 4, 0x5A))
    writer.steps.append(Peek("page", PAGE[name].offset, 4, fixed.get(name)))
    return f"{name} written", ("ReadOnlyRegister",)


@_row("X10", on=("pci",))
def _x10(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    command = draw.choice((0, 4, 2))
    writer.bring_up()
    writer.steps.append(Poke("pci", 4, 2, command))
    writer.kick()
    writer.steps.append(Poke("pci", 4, 2, 7))
    writer.turn()
    writer.peek("device_status", LIVE)
    return f"kicked with command {command}", ()


@_row("X16", on=("pci",))
def _x16(draw: Draw, writer: Writer) -> tuple[str, Broken]:
    index = draw.choice((len(writer.facts.queue_sizes), 0xFFFF))
    _to_queues(writer)
    writer.select(index)
    writer.peek("queue_size", 0)
    writer.peek("queue_enable", 0)
    writer.poke("queue_enable", 1)
    writer.peek("queue_enable", 0)
    return f"queue_select {index:#x}", ("NoSuchQueue",)


# --- what is public ------------------------------------------------------------------------------------------------

REGISTER_ROWS: Final[tuple[str, ...]] = tuple(sorted(_ROWS))
"""Every row of the catalogue that has a program here."""


def _programs(transport: TransportName, rows: tuple[str, ...]) -> list[tuple[str, Defect]]:
    unknown = [each for each in rows if each not in _ROWS]
    if unknown:
        raise InvalidArgument(f"no register program for {', '.join(unknown)}; rows are {', '.join(REGISTER_ROWS)}")
    return [(row, defect) for row in rows for on, defect in _ROWS[row] if transport in on]


def _make(draw: Draw, row: str, defect: Defect, transport: TransportName, facts: Facts) -> RegisterProgram:
    writer = Writer(transport, facts)
    title, rules = defect(draw, writer)
    writer.bring_up()
    return writer.program(row=row, title=title, rules=rules)


def register_cases(
    *rows: str, transport: TransportName = "pci", facts: Facts | None = None
) -> Iterator[RegisterProgram]:
    """Every case of these rows, all when none is named, for a device with these facts, in a stable order."""
    about = Facts() if facts is None else facts
    for row, defect in _programs(transport, rows or REGISTER_ROWS):
        yield from every(lambda draw, row=row, defect=defect: _make(draw, row, defect, transport, about))


def register_case(
    draw: Draw, *rows: str, transport: TransportName = "pci", facts: Facts | None = None
) -> RegisterProgram:
    """One case of these rows, of all when none is named."""
    row, defect = draw.choice(_programs(transport, rows or REGISTER_ROWS))
    return _make(draw, row, defect, transport, Facts() if facts is None else facts)

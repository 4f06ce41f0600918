"""Register programs: what a driver writes to a device's registers, legal and with one defect, as data.

Theory
------
A `RegisterProgram` is a list of accesses to the structures of one transport, which are ``common``, ``notify``, ``isr``,
``config`` and ``pci`` (configuration space) over PCI, and ``page`` over MMIO; and `Turn`, in which the device may work.
A `Peek` may say what it must read, and that is how a program judges: over any `Target`, ours or one of your own.

    >>> case = next(register_cases("Q02"))
    >>> case.title
    'size 3'
    >>> case.check(PciTarget(VirtioPci(TestDevice())))

`legal_program` brings a device up and kicks its queues; `register_cases` has, for rows of 2.6 to 2.8 of the robustness
catalogue, programs with exactly that defect, which go on to a reset and come up again: a device is never to be lost.
`any_program` is an arbitrary driver: any width, any offset, any order, with enough sense in between to get somewhere.

A device is described by `Facts`: queue sizes and the features on offer. Rings lie from 0x1000 on, queue after queue.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, Self

from virtio_test.errors import InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.spec.mmio import REGISTERS as PAGE
from virtio_test.spec.pci import COMMON
from virtio_test.spec.status import Status

from .draw import Draw

if TYPE_CHECKING:
    from virtio_test.device import Device
    from virtio_test.transport.bank import RegisterBank
    from virtio_test.transport.mmio import VirtioMmio
    from virtio_test.transport.pci.function import VirtioPci

__all__ = [
    "Facts",
    "MmioTarget",
    "PciTarget",
    "Peek",
    "Poke",
    "RegisterProgram",
    "Target",
    "Turn",
    "any_program",
    "legal_program",
]

TransportName = Literal["pci", "mmio"]
Where = Literal["common", "notify", "isr", "config", "pci", "page"]

_FORMAT: Final = "register-program"
_VERSION: Final = 1
_RINGS: Final = 0x1000
_ROOM: Final = 0x1000
LIVE: Final = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
READY: Final = LIVE & ~int(Status.DRIVER_OK)
UP: Final = int(Status.ACKNOWLEDGE | Status.DRIVER)
NAMES: Final = {
    "device_feature_select": ("DeviceFeaturesSel",),
    "device_feature": ("DeviceFeatures",),
    "driver_feature_select": ("DriverFeaturesSel",),
    "driver_feature": ("DriverFeatures",),
    "device_status": ("Status",),
    "queue_select": ("QueueSel",),
    "queue_size": ("QueueSize",),
    "queue_enable": ("QueueReady",),
    "queue_reset": ("QueueReset",),
    "queue_desc": ("QueueDescLow", "QueueDescHigh"),
    "queue_driver": ("QueueDriverLow", "QueueDriverHigh"),
    "queue_device": ("QueueDeviceLow", "QueueDeviceHigh"),
}
"""Registers of both transports, by their names over PCI: what they are called over MMIO, low half first."""


class Poke(NamedTuple):
    """Write `width` bytes."""

    where: Where
    offset: int
    width: int
    value: int


class Peek(NamedTuple):
    """Read `width` bytes; they must be `value`, unless it is None."""

    where: Where
    offset: int
    width: int
    value: int | None = None


class Turn(NamedTuple):
    """The device may work until it has nothing to do."""


Step = Poke | Peek | Turn
_STEPS: Final[dict[str, type[Step]]] = {"poke": Poke, "peek": Peek, "turn": Turn}


class Target(Protocol):
    """What a program runs against."""

    def read(self, where: Where, offset: int, width: int) -> int:
        """One read; little endian."""
        ...

    def write(self, where: Where, offset: int, width: int, value: int) -> None:
        """One write."""
        ...

    def turn(self) -> None:
        """Let the device work."""
        ...


class Facts(NamedTuple):
    """What a program has to know of the device: its queue sizes and the bits that it offers."""

    queue_sizes: tuple[int, ...] = (8,)
    features: int = FeatureSet("VERSION_1", "RING_RESET").bits

    @classmethod
    def of(cls, device: Device, offered: FeatureSet | None = None) -> Self:
        """Those of a device of ours, offering all that it can when `offered` is None."""
        return cls(tuple(device.queue_sizes), (device.features if offered is None else offered).bits)

    def has(self, name: str) -> bool:
        """Whether that feature is on offer."""
        return bool(self.features & FeatureSet(name).bits)


_IMPORTS: Final = "from virtio_test.devices.base import BaseDevice"
_DEVICE: Final = "BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(8,))"
_SCRIPT: Final = '''"""{title}: exits with 0 when every register reads what it must."""

import sys

{imports}
from virtio_test.strategies import {target}, ProgramFailed, RegisterProgram
from virtio_test.transport.{module} import {side}

PROGRAM = r"""{text}"""

try:
    RegisterProgram.from_json(PROGRAM).check({target}({side}({device})))
except ProgramFailed as failure:
    sys.exit(str(failure))
'''


class ProgramFailed(AssertionError):
    """Something else was read, or came back, than must; `case` is the program, and notes have it as JSON and script."""

    def __init__(self, text: str, case: Any = None) -> None:
        super().__init__(text)
        self.case = case
        if case is not None:
            self.add_note(case.to_json())
            self.add_note(f"This replays it:\n\n{case.script()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterProgram:
    """One program.

    Attributes:
        transport: ``pci`` or ``mmio``.
        row: the row of the catalogue, or empty.
        title: what is special.
        steps: what is done, in order.
        rules: the rules broken, by the names that our devices give them; a device of your own may know others.
    """

    transport: TransportName = "pci"
    row: str = ""
    title: str = ""
    steps: tuple[Step, ...] = ()
    rules: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.row or 'registers'}-{self.transport}-{self.title}".replace(" ", "_")

    def run(self, target: Target) -> list[int]:
        """Do all steps; the values read."""
        return [value for value, _ in self._results(target)]

    def check(self, target: Target) -> None:
        """Do all steps, and hold what is read against what must be.

        Raises:
            ProgramFailed: a register reads something else.
        """
        for number, (value, peek) in enumerate(self._results(target)):
            if peek.value is not None and value != peek.value:
                raise ProgramFailed(f"{self}: read {number}, {peek}, reads {value:#x}", self)

    def _results(self, target: Target) -> list[tuple[int, Peek]]:
        found: list[tuple[int, Peek]] = []
        for step in self.steps:
            if isinstance(step, Poke):
                target.write(*step)
            elif isinstance(step, Peek):
                found.append((target.read(step.where, step.offset, step.width), step))
            else:
                target.turn()
        return found

    def script(self, *, device: str = _DEVICE, imports: str = _IMPORTS) -> str:
        """A standalone Python script that replays it against one of our transports, and exits with 0 or 1.

        Args:
            device: the expression that makes the device; one with the default `Facts` when not given.
            imports: what that expression needs.
        """
        page = self.transport == "mmio"
        side, module = ("VirtioMmio", "mmio") if page else ("VirtioPci", "pci.function")
        target = "MmioTarget" if page else "PciTarget"
        return _SCRIPT.format(
            title=self, imports=imports, module=module, side=side, target=target, text=self.to_json(), device=device
        )

    def to_json(self) -> str:
        """One line of JSON: ``["poke", where, offset, width, value]`` and so on."""
        names = {kind: name for name, kind in _STEPS.items()}
        steps = [[names[type(step)], *step] for step in self.steps]
        head = {"virtio-test": _FORMAT, "version": _VERSION, "transport": self.transport}
        return json.dumps(head | {"row": self.row, "title": self.title, "steps": steps, "rules": self.rules})

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
            steps = tuple(_step(each) for each in found.pop("steps"))
            return cls(**found | {"steps": steps, "rules": tuple(found["rules"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"no register program: {error}") from None


def _step(saved: list[Any]) -> Step:
    name, *values = saved
    return _STEPS[name](*values)


# --- targets of ours -----------------------------------------------------------------------------------------------


class PciTarget:
    """A `VirtioPci`: the structures where its declaration says that they are."""

    def __init__(self, function: VirtioPci) -> None:
        layout = function.declaration.layout
        self.function = function
        self._places = {"common": layout.common, "notify": layout.notify, "isr": layout.isr, "config": layout.config}

    def read(self, where: Where, offset: int, width: int) -> int:
        """See `Target.read`."""
        if where == "pci":
            return int.from_bytes(self.function.read_config(offset, width), "little")
        place = self._places[where]
        if place is None:
            return (1 << 8 * width) - 1
        return int.from_bytes(self.function.read_bar(place.bar, place.offset + offset, width), "little")

    def write(self, where: Where, offset: int, width: int, value: int) -> None:
        """See `Target.write`."""
        data = value.to_bytes(width, "little")
        if where == "pci":
            self.function.write_config(offset, data)
        elif (place := self._places[where]) is not None:
            self.function.write_bar(place.bar, place.offset + offset, data)

    def turn(self) -> None:
        """See `Target.turn`."""
        self.function.loop.run_pending()

    @property
    def bank(self) -> RegisterBank:
        """What is behind the registers."""
        return self.function.bank

    def rules(self) -> Counter[str]:
        """What was held against the driver so far."""
        return self.bank.ignored


class MmioTarget:
    """A `VirtioMmio`."""

    def __init__(self, page: VirtioMmio) -> None:
        self.page = page

    def read(self, where: Where, offset: int, width: int) -> int:
        """See `Target.read`."""
        _of_page(where)
        return int.from_bytes(self.page.read(offset, width), "little")

    def write(self, where: Where, offset: int, width: int, value: int) -> None:
        """See `Target.write`."""
        _of_page(where)
        self.page.write(offset, value.to_bytes(width, "little"))

    def turn(self) -> None:
        """See `Target.turn`."""
        self.page.loop.run_pending()

    @property
    def bank(self) -> RegisterBank:
        """What is behind the registers."""
        return self.page.bank

    def rules(self) -> Counter[str]:
        """What was held against the driver so far."""
        return self.bank.ignored


def _of_page(where: Where) -> None:
    if where != "page":
        raise InvalidArgument(f"an MMIO device has one page of registers, and no {where!r}")


# --- writing programs ----------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Writes a program for a device with these facts; registers go by their names over PCI."""

    transport: TransportName
    facts: Facts = field(default_factory=Facts)
    steps: list[Step] = field(default_factory=list[Step])

    @property
    def accepted(self) -> int:
        """What a plain driver accepts: everything but the packed ring and what changes notifications."""
        changes = FeatureSet("RING_PACKED", "NOTIFICATION_DATA", "NOTIF_CONFIG_DATA", "ACCESS_PLATFORM", "IN_ORDER")
        return self.facts.features & ~changes.bits

    def place(self, name: str, *, half: int = 0) -> tuple[Where, int, int]:
        """Where a register is: structure, offset, and the width of an access to it."""
        if self.transport == "mmio":
            return "page", PAGE[NAMES[name][half]].offset, 4
        register = COMMON[name]
        return "common", register.offset + 4 * half, min(register.size, 4)

    def poke(self, name: str, value: int, *, half: int = 0) -> None:
        """Write a register, or one half of an address."""
        where, offset, width = self.place(name, half=half)
        self.steps.append(Poke(where, offset, width, int(value)))

    def peek(self, name: str, value: int | None = None) -> None:
        """Read a register."""
        self.steps.append(Peek(*self.place(name), None if value is None else int(value)))

    def turn(self) -> None:
        """Let the device work."""
        self.steps.append(Turn())

    def begin(self, *, to: int = UP) -> None:
        """Over PCI: decode BARs and be bus master. Then a reset, and the status bit by bit up to `to`."""
        if self.transport == "pci":
            self.steps.append(Poke("pci", 4, 2, 0x7))
        self.poke("device_status", 0)
        self.peek("device_status", 0)
        for status in (int(Status.ACKNOWLEDGE), UP):
            if status & ~to == 0:
                self.poke("device_status", status)

    def accept(self, bits: int | None = None) -> None:
        """Write the features, and FEATURES_OK."""
        bits = self.accepted if bits is None else bits
        for select in range(2):
            self.poke("driver_feature_select", select)
            self.poke("driver_feature", bits >> 32 * select & 0xFFFF_FFFF)
        self.poke("device_status", READY)

    def select(self, index: int) -> None:
        """Choose a queue."""
        self.poke("queue_select", index)

    def address(self, area: Literal["desc", "driver", "device"], value: int) -> None:
        """Write both halves of a queue's address."""
        for half in range(2):
            self.poke(f"queue_{area}", value >> 32 * half & 0xFFFF_FFFF, half=half)

    def queue(self, index: int, *, size: int = 4, desc: int | None = None, enable: bool = True) -> None:
        """Set a queue up: a split ring in its own page."""
        base = _RINGS + _ROOM * index
        self.select(index)
        self.poke("queue_size", size)
        self.address("desc", base if desc is None else desc)
        self.address("driver", base + 0x800)
        self.address("device", base + 0xC00)
        if enable:
            self.poke("queue_enable", 1)

    def go(self) -> None:
        """DRIVER_OK."""
        self.poke("device_status", LIVE)
        self.turn()

    def kick(self, index: int = 0) -> None:
        """Kick a queue."""
        if self.transport == "mmio":
            self.steps.append(Poke("page", PAGE["QueueNotify"].offset, 4, index))
        else:
            self.steps.append(Poke("notify", 4 * index, 2, index))
        self.turn()

    def bring_up(self, *, queues: int | None = None) -> None:
        """All of it, up to a device that is live, and one kick for each queue."""
        count = len(self.facts.queue_sizes) if queues is None else queues
        self.begin()
        self.accept()
        self.peek("device_status", READY)
        for index in range(count):
            self.queue(index, size=min(4, self.facts.queue_sizes[index]))
        self.go()
        self.peek("device_status", LIVE)
        for index in range(count):
            self.kick(index)

    def program(self, *, row: str = "", title: str = "", rules: tuple[str, ...] = ()) -> RegisterProgram:
        """What was written so far."""
        return RegisterProgram(transport=self.transport, row=row, title=title, steps=tuple(self.steps), rules=rules)


def legal_program(draw: Draw, transport: TransportName = "pci", *, facts: Facts | None = None) -> RegisterProgram:
    """A driver that keeps every rule: it brings the device up, in the order that it likes, and kicks what it has."""
    writer = Writer(transport, Facts() if facts is None else facts)
    count = draw.vary(0, len(writer.facts.queue_sizes), len(writer.facts.queue_sizes))
    for _ in range(draw.vary(0, 2, 0)):
        # One that gives up half way.
        writer.begin(to=draw.some((0, 1, UP)))
    writer.bring_up(queues=count)
    if draw.some((False, True)) and count and writer.facts.has("RING_RESET"):
        writer.select(0)
        writer.poke("queue_reset", 1)
        writer.queue(0)
        writer.kick(0)
    writer.peek("device_status", LIVE)
    return writer.program(title="legal")


_WIDTHS: Final = (1, 2, 4, 8, 3, 5)
_VALUES: Final = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    11,
    15,
    16,
    17,
    0x1000,
    0x1800,
    0x8000,
    0xFFFE,
    0xFFFF,
    0x7FFF_FFFF,
    (1 << 64) - 1,
)
_REACH: Final[dict[TransportName, tuple[tuple[Where, int], ...]]] = {
    "pci": (("common", 0x48), ("notify", 0x20), ("isr", 8), ("config", 0x20), ("pci", 0x100)),
    "mmio": (("page", 0x140),),
}


def any_program(
    draw: Draw, transport: TransportName = "pci", *, facts: Facts | None = None, most: int = 40
) -> RegisterProgram:
    """An arbitrary driver: up to `most` accesses of any kind, between steps of a bring-up."""
    writer = Writer(transport, Facts() if facts is None else facts)
    sizes = writer.facts.queue_sizes
    for _ in range(draw.vary(1, most, 8)):
        index = draw.vary(0, len(sizes), 0)
        match draw.vary(0, 9, 0):
            case 0:
                writer.begin()
            case 1:
                writer.accept(writer.accepted ^ draw.some((0, 0, 1 << 32, 1 << 40, 1 << 63)))
            case 2:
                size = draw.some((4, 1, 8, 0, 3, 0xFFFF))
                writer.queue(index, size=size, desc=draw.some((None, None, 0, 0xFFFF_FFFF_FFFF_F000)))
            case 3:
                writer.go()
            case 4:
                writer.kick(index)
            case 5:
                name = draw.choice(tuple(NAMES))
                width = writer.place(name)[2]
                writer.poke(name, draw.some(_VALUES) & (1 << 8 * width) - 1)
            case 6:
                writer.turn()
            case _:
                where, reach = draw.choice(_REACH[transport])
                offset, width = draw.vary(0, reach - 1, 0), draw.choice(_WIDTHS)
                value = draw.some(_VALUES) if draw.some((True, False)) else draw.vary(0, (1 << 64) - 1, 0)
                value &= (1 << 8 * width) - 1
                poke = Poke(where, offset, width, value)
                writer.steps.append(poke if draw.some((True, False)) else Peek(where, offset, width))
    # Peeks of bring-ups know nothing of what came before them.
    steps = tuple(step._replace(value=None) if isinstance(step, Peek) else step for step in writer.steps)
    return replace(writer.program(title="any"), steps=steps)

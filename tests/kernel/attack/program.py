"""Programs for ``guest/attack``: steps in the guest, and the values that they bring back.

The guest knows nothing of virtqueues: it writes and reads its own area of memory and the function's registers, and
waits for values. `virtio_attack.h` says what a step is. Offsets are those of the area; what a device is given are
addresses, so a value may be a place in the area or in a BAR (`At`, `InBar`), which the guest makes an address of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final, TypeAlias

from virtio_test.spec.pci import COMMON, CapType

__all__ = [
    "ANY_VECTOR",
    "AREA",
    "CONFIG",
    "At",
    "FromEnd",
    "InBar",
    "Place",
    "Program",
    "Results",
    "Value",
    "bar",
    "file",
    "parse",
]

AREA: Final = 256 << 10
"""Bytes of the guest's area."""

ANY_VECTOR: Final = 0xFF
"""Instead of a vector: all of them together."""

CONFIG: Final = 0x20
Place: TypeAlias = int
"""A structure by its `CapType`, `bar(n)`, or `CONFIG`."""

_STEP: Final = Struct("<BBBBIQQ")
_HEADER: Final = Struct("<28sI")
_ALL: Final = (1 << 64) - 1
_BASE_AREA: Final = 1
_BASE_END: Final = 2
_BASE_BAR: Final = 0x10


def bar(number: int) -> Place:
    """The place of a BAR's bytes."""
    return 0x10 + number


class Kind(IntEnum):
    """What a step does."""

    PUT = 1
    GET = 2
    FILL = 3
    OUT = 4
    IN = 5
    WAIT_AREA = 6
    WAIT_REGISTER = 7
    INTERRUPTS = 8
    FORGET = 9
    RESET_FUNCTION = 10
    TELL = 11


@dataclass(frozen=True)
class At:
    """The address of an offset of the area."""

    offset: int


@dataclass(frozen=True)
class InBar:
    """The bus address of an offset in a BAR."""

    bar: int
    offset: int = 0


@dataclass(frozen=True)
class FromEnd:
    """The address that lies so many bytes behind the end of memory, which is before it when negative."""

    offset: int


Value: TypeAlias = int | At | InBar | FromEnd
Results: TypeAlias = Mapping[str, int]
"""What steps brought back, by the names that the program gave them."""


class Program:
    """Steps, in order.

    Args:
        name: at most 27 bytes, without blanks.
        end: where the guest's memory ends, if it does not end where its kernel thinks.
    """

    def __init__(self, name: str, *, end: int | None = None) -> None:
        self.name = name
        self._end = end
        self._steps: list[bytes] = []
        self._labels: list[str] = []

    def _add(
        self, kind: Kind, *, width: int = 0, place: int = 0, offset: int = 0, value: Value = 0, mask: int = _ALL
    ) -> None:
        base = 0
        if isinstance(value, At):
            base, value = _BASE_AREA, value.offset
        elif isinstance(value, FromEnd):
            base, value = (_BASE_END, value.offset) if self._end is None else (0, self._end + value.offset)
        elif isinstance(value, InBar):
            base, value = _BASE_BAR + value.bar, value.offset
        self._steps.append(_STEP.pack(kind, width, place, base, offset, value & _ALL, mask & _ALL))

    # --- memory ---------------------------------------------------------------------------------------------

    def put(self, offset: int, value: Value, width: int) -> None:
        """Write `width` bytes at an offset of the area."""
        self._add(Kind.PUT, width=width, offset=offset, value=value)

    def put_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes at an offset of the area."""
        for at in range(0, len(data), 8):
            piece = data[at : at + 8]
            self.put(offset + at, int.from_bytes(piece, "little"), len(piece))

    def fill(self, offset: int, length: int, byte: int = 0) -> None:
        """Make `length` bytes of the area the same."""
        self._add(Kind.FILL, place=byte, offset=offset, value=length)

    def get(self, label: str, offset: int, width: int) -> None:
        """Bring back `width` bytes of the area."""
        self._add(Kind.GET, width=width, offset=offset)
        self._labels.append(label)

    def wait(self, label: str, offset: int, width: int, value: int, mask: int = _ALL) -> None:
        """Wait until the bytes, masked, are `value`; bring back what they were last."""
        self._add(Kind.WAIT_AREA, width=width, offset=offset, value=value, mask=mask)
        self._labels.append(label)

    # --- registers ------------------------------------------------------------------------------------------

    def out(self, name: str, value: Value) -> None:
        """Write a register of the common configuration."""
        self.out_at(CapType.COMMON_CFG, COMMON[name].offset, COMMON[name].size, value)

    def read(self, label: str, name: str) -> None:
        """Bring back a register of the common configuration."""
        self.read_at(label, CapType.COMMON_CFG, COMMON[name].offset, COMMON[name].size)

    def until(self, label: str, name: str, value: int, mask: int = _ALL) -> None:
        """Wait until a register of the common configuration, masked, is `value`; bring back what it was last."""
        at = COMMON[name]
        self._add(Kind.WAIT_REGISTER, width=at.size, place=CapType.COMMON_CFG, offset=at.offset, value=value, mask=mask)
        self._labels.append(label)

    def out_at(self, place: Place, offset: int, width: int, value: Value) -> None:
        """Write `width` bytes anywhere in a structure, a BAR or the configuration space."""
        self._add(Kind.OUT, width=width, place=place, offset=offset, value=value)

    def read_at(self, label: str, place: Place, offset: int, width: int) -> None:
        """Bring back `width` bytes from there."""
        self._add(Kind.IN, width=width, place=place, offset=offset)
        self._labels.append(label)

    # --- interrupts and resets ------------------------------------------------------------------------------

    def interrupts(self, label: str, vector: int, least: int = 0) -> None:
        """Wait until a vector came `least` times; bring back how often it came since `forget`."""
        self._add(Kind.INTERRUPTS, place=vector, value=least)
        self._labels.append(label)

    def forget(self) -> None:
        """Count interrupts from 0."""
        self._add(Kind.FORGET)

    def reset_function(self, label: str) -> None:
        """Reset the function by itself; brings back 0, or the guest's errno."""
        self._add(Kind.RESET_FUNCTION)
        self._labels.append(label)

    def tell(self, label: str, value: Value) -> None:
        """Bring back an address."""
        self._add(Kind.TELL, value=value)
        self._labels.append(label)

    # --- in and out of the guest ----------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The program in the file that the guest reads."""
        return _HEADER.pack(self.name.encode(), len(self._steps)) + b"".join(self._steps)

    def decode(self, values: Sequence[int]) -> Results | str:
        """What came back by its names, or what is wrong with it."""
        if len(values) != len(self._labels):
            return f"{len(values)} results of {len(self._labels)}"
        return dict(zip(self._labels, values, strict=True))


def file(programs: Sequence[Program]) -> bytes:
    """The file that the guest reads."""
    return b"".join(program.encode() for program in programs)


def parse(lines: Sequence[str]) -> dict[str, list[int] | str]:
    """What the guest's ``attack`` printed: results by program, or why it could not be run."""
    found: dict[str, list[int] | str] = {}
    for line in lines:
        name, blank, rest = line.partition(" ")
        if blank and name.endswith("!"):
            found[name[:-1]] = rest
        elif name.endswith(":"):
            values = found.setdefault(name[:-1], [])
            if isinstance(values, list):
                values += [int(each, 16) for each in rest.split()]
    return found

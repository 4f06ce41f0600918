"""What both formats share: memory, segments of a buffer, and the arithmetic of events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

NEXT, WRITE, INDIRECT = 1, 2, 4
"""Descriptor flags of both formats (2.7.5, 2.8.13)."""


class Memory(Protocol):
    """Guest memory as the model needs it."""

    def read(self, address: int, length: int, /) -> bytes: ...
    def write(self, address: int, data: bytes, /) -> None: ...


class FlatMemory:
    """Guest memory of bytearrays; adjacent regions are one run, so an access may cross from one to the next."""

    def __init__(self, regions: Iterable[tuple[int, int]]) -> None:
        self._runs: list[tuple[int, bytearray]] = []
        for address, size in sorted(regions):
            if self._runs and self._runs[-1][0] + len(self._runs[-1][1]) == address:
                self._runs[-1][1].extend(bytes(size))
            else:
                self._runs.append((address, bytearray(size)))

    def _find(self, address: int, length: int) -> tuple[bytearray, int]:
        for start, run in self._runs:
            if start <= address and address + length <= start + len(run):
                return run, address - start
        raise AssertionError(f"{length} bytes at {address:#x} are not mapped")

    def read(self, address: int, length: int, /) -> bytes:
        run, at = self._find(address, length)
        return bytes(run[at : at + length])

    def write(self, address: int, data: bytes, /) -> None:
        run, at = self._find(address, len(data))
        run[at : at + len(data)] = data


class Segment(NamedTuple):
    """One stretch of a buffer: what one descriptor describes."""

    address: int
    length: int
    writable: bool


class Plan(NamedTuple):
    """One buffer to make available: `direct` descriptors, then, if `table` is not None, one INDIRECT descriptor.

    The table lies at `table_at`. `backwards` links its entries in another order than they lie in (split only; a
    packed table is read in sequence, 2.8.7). `junk` goes into every field that the device has to ignore.
    """

    direct: Sequence[Segment]
    table: Sequence[Segment] | None = None
    table_at: int = 0
    backwards: bool = False
    junk: int = 0

    @property
    def segments(self) -> list[Segment]:
        return [*self.direct, *(self.table or ())]

    @property
    def slots(self) -> int:
        """Descriptors of the ring itself."""
        return len(self.direct) + (self.table is not None)


class Element(NamedTuple):
    """One buffer as the device end sees it: `head` is the head index (split) or buffer id (packed)."""

    head: int
    slots: int
    segments: list[Segment]

    @property
    def writable(self) -> int:
        return sum(segment.length for segment in self.segments if segment.writable)


def gather(memory: Memory, segments: Iterable[Segment]) -> bytes:
    """The device-readable bytes of a buffer."""
    return b"".join(memory.read(s.address, s.length) for s in segments if not s.writable)


def scatter(memory: Memory, segments: Iterable[Segment], data: bytes) -> None:
    """Fill the device-writable part of a buffer from its beginning."""
    for segment in segments:
        if segment.writable:
            memory.write(segment.address, data[: segment.length])
            data = data[segment.length :]
    assert not data, "more bytes than the buffer can take"


def passed(event: int, old: int, count: int, *, modulus: int = 1 << 16) -> bool:
    """Whether one of the `count` steps that begin at `old` leaves the place `event` behind (2.7.10, 2.8.10).

    It takes the steps one by one, where the specification's `vring_need_event` subtracts.
    """
    return any((old + step) % modulus == event for step in range(min(count, modulus)))


def as_int(data: bytes) -> int:
    return int.from_bytes(data, "little")


def u16(value: int) -> bytes:
    return (value & 0xFFFF).to_bytes(2, "little")

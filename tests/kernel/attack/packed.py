"""Attacks by packed rings: rows of 2.5, and what suppresses interrupts in both formats (2.10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from virtio_test.features import FeatureSet
from virtio_test.spec.testdevice import RESPONSE

from tests.kernel.attack.case import NUMBER, Case, Machine, Writes, registers, ring, verdict
from tests.kernel.attack.driver import (
    AVAIL,
    BASIC,
    INDIRECT,
    NEXT,
    QUEUE_VECTOR,
    TABLE,
    USED,
    WRITE,
    Queue,
    answer,
    kick,
)
from tests.kernel.attack.pieces import READ, WRITTEN, asked
from tests.kernel.attack.program import At, Program, Results

__all__ = ["CASES"]

_PACKED: Final = Queue(packed=True)


# --- 2.5 ----------------------------------------------------------------------------------------------------


def _flags(flags: int) -> Writes:
    """A whole request whose head has these flags."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        queue.desc(p, 1, *WRITTEN, 1)
        queue.desc(p, 0, *READ[:2], flags ^ AVAIL, 1)

    return write


def _unavailable_second(p: Program, queue: Queue, _: Machine) -> None:
    asked(p)
    queue.desc(p, 1, *WRITTEN[:2], WRITE ^ AVAIL)
    queue.desc(p, 0, *READ[:2], NEXT)


def _ids(first: int, second: int) -> Writes:
    """Two requests, each a table, with these ids."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        queue.entry(p, 0, *READ)
        queue.entry(p, 1, *WRITTEN)
        queue.desc(p, 1, At(TABLE), 32, INDIRECT, second)
        queue.desc(p, 0, At(TABLE), 32, INDIRECT, first)

    return write


def _nothing(flags: int) -> Case:
    """Flags that make nothing available; the request after it lies in the same descriptors."""

    def run(p: Program, machine: Machine) -> None:
        _flags(flags)(p, _PACKED, machine)
        kick(p)
        p.read("status", "device_status")
        p.get("flags", _PACKED.layout.at("desc.flags", 0), 2)

    rows = {0: "P01 P02", AVAIL | USED: "P02", USED: "P03"}[flags & (AVAIL | USED)]
    reads = {"status": 15, "flags": flags}
    return registers(rows, f"flags-{flags:#x}", run, queue=_PACKED, reads=reads)


def _laps(size: int, rows: str) -> Case:
    """Requests in a ring of that size, twice around it and more."""
    queue = Queue(packed=True, size=size)

    def run(p: Program, _: Machine) -> None:
        for position in range(size + 1):
            queue.ask(p, position, position=position)
            queue.used(p, position=position, label=f"{position}.")

    reads = {f"{position}.len": RESPONSE.size for position in range(size + 1)}
    return registers(rows, f"size-{size}", run, queue=queue, outcome="accepted", reads=reads, position=size + 1)


def _one() -> Case:
    """Three buffers in a ring of one descriptor, each of its own lap; nothing is asked for, so nothing is written."""
    queue = Queue(packed=True, size=1)
    wanted = {f"{lap}.{name}": value for lap in range(3)
              for name, value in (("len", 0), ("id", 7), ("flags", 0 if lap % 2 else AVAIL | USED))}  # fmt: skip

    def run(p: Program, _: Machine) -> None:
        queue.start(p)
        asked(p)
        for lap in range(3):
            queue.desc(p, 0, *READ[:2], (AVAIL | USED) * (lap % 2), 7)
            kick(p)
            queue.used(p, slot=lap, label=f"{lap}.")
        p.read("status", "device_status")

    def judge(results: Results) -> str:
        return verdict("completed0", results, {**wanted, "status": 15})

    return Case(rows=("P11", "P12"), name="size-1", packed=True, run=run, judge=judge, verdict="completed0")


def _replayed(p: Program, _: Machine) -> None:
    """What was used is made available again, in descriptors that the device has left."""
    _PACKED.ask(p, NUMBER)
    _PACKED.used(p, label="first.")
    p.put(_PACKED.layout.at("desc.flags", 0), NEXT | AVAIL, 2)
    p.put(_PACKED.layout.at("desc.flags", 1), WRITE | AVAIL, 2)
    kick(p)
    p.read("status", "device_status")


def _used_flags(p: Program, _: Machine) -> None:
    """One request with an answer and one without: the used descriptor has WRITE when something was written."""
    _PACKED.ask(p, NUMBER)
    _PACKED.used(p, label="written.")
    _PACKED.desc(p, 2, *READ, 3)
    kick(p)
    _PACKED.used(p, slot=2, label="unwritten.")
    # The next request is the third by place: put it behind three descriptors.
    _PACKED.desc(p, 3, *READ, 4)
    kick(p)
    _PACKED.used(p, slot=3, label="aligned.")


def _mixed_laps(first: int) -> Writes:
    """A list whose second descriptor is of another lap."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)
        queue.desc(p, 1, *WRITTEN[:2], WRITE ^ first)
        queue.desc(p, 0, *READ[:2], NEXT)

    return write


_DESCRIPTORS: Final = [
    _nothing(NEXT),
    _nothing(NEXT | AVAIL | USED),
    _nothing(NEXT | USED),
    *ring("P04 P18", "second-not-available", _unavailable_second, rules="ChainNotAvail", formats="packed"),
    *ring("P04", "second-of-another-lap", _mixed_laps(AVAIL | USED), rules="ChainNotAvail", formats="packed"),
    *ring("P06", "ids-beyond-the-queue", _ids(8, 0xFFFF), outcome="accepted", formats="packed", chains=2, slot=1,
          answered=True),
    *ring("P07", "id-twice", _ids(3, 3), outcome="accepted", formats="packed", chains=2, slot=1, answered=True),
    *(_laps(size, "P09 P11") for size in (2, 3, 5, 7)),
    _one(),
    registers("P24", "replayed", _replayed, queue=_PACKED, reads={"status": 15, "first.len": 12}, position=1),
    registers(
        "P19", "used-flags", _used_flags, queue=_PACKED, outcome="accepted",
        reads={
            "written.flags": AVAIL | USED | WRITE, "written.id": 1, "written.len": 12,
            "unwritten.flags": AVAIL | USED, "unwritten.id": 3, "unwritten.len": 0, "aligned.id": 4,
        },
        position=2,
    ),
]  # fmt: skip

# --- 2.10 ---------------------------------------------------------------------------------------------------

_EVENTS: Final = BASIC | FeatureSet("EVENT_IDX")


def _event(flags: int, off_wrap: int = 0) -> Writes:
    """A request, with what the driver says about interrupts in its event suppression structure."""

    def write(p: Program, queue: Queue, machine: Machine) -> None:
        queue.put(p, "driver_event.off_wrap", 0, off_wrap)
        queue.put(p, "driver_event.flags", 0, flags)
        _flags(NEXT | AVAIL)(p, queue, machine)

    return write


def _silent(
    rows: str,
    name: str,
    fields: Mapping[str, int],
    *,
    packed: bool = False,
    features: FeatureSet = BASIC,
    interrupts: int = 0,
) -> Case:
    """Two requests whose interrupts the driver does not want: they are answered all the same.

    The very first interrupt comes where an event index decides: nobody knows yet what the driver has seen.
    """
    queue = Queue(packed=packed, features=features)

    def run(p: Program, _: Machine) -> None:
        queue.start(p)
        for field, value in fields.items():
            queue.put(p, field, 0, value)
        for position in (0, 1):
            queue.ask(p, NUMBER, position=position)
            queue.used(p, position=position, label=f"{position}.")
            queue.answered(p, position=position, label=f"{position}.")
        p.read("status", "device_status")
        p.interrupts("queue", QUEUE_VECTOR, interrupts)

    def judge(results: Results) -> str:
        low, high = answer(NUMBER)
        wanted = {
            f"{position}.{name}": value
            for position in (0, 1)
            for name, value in (("low", low), ("high", high), ("len", RESPONSE.size))
        }
        return verdict("accepted", results, {**wanted, "status": 15, "queue": interrupts})

    return Case(rows=tuple(rows.split()), name=name, packed=packed, run=run, judge=judge, verdict="accepted")


def _with_used_event(value: int) -> Writes:
    def write(p: Program, queue: Queue, _: Machine) -> None:
        queue.put(p, "used_event", 0, value)
        queue.put(p, "avail.flags", 0, 1)
        queue.ask(p, NUMBER, kicks=False)

    return write


_SUPPRESSED: Final = [
    *(
        each
        for flags in (2, 3, 0xFFFC, 0xFFFF)
        for each in ring("P22", f"event-flags-{flags:#x}", _event(flags), outcome="accepted", formats="packed",
                         answered=True)
    ),
    *(
        each
        for off_wrap in (0x8008, 0xFFFF, 0x7FFF)
        for each in ring("P23", f"event-at-{off_wrap:#x}-and-flags-3", _event(3, off_wrap), outcome="accepted",
                         formats="packed", answered=True, queue=Queue(features=_EVENTS))
    ),
    # An event beyond the queue names no descriptor: the driver is told rather than not.
    *(
        _silent("P23 N04", f"event-at-{off_wrap:#x}",
                {"driver_event.off_wrap": off_wrap, "driver_event.flags": 2}, packed=True, features=_EVENTS,
                interrupts=2)
        for off_wrap in (0x8008, 0xFFFF, 0x7FFF)
    ),
    _silent("N03 N04 P23", "event-of-another-lap", {"driver_event.off_wrap": 3, "driver_event.flags": 2}, packed=True,
            features=_EVENTS, interrupts=1),
    _silent("N04", "driver-event-disabled", {"driver_event.flags": 1}, packed=True),
    _silent("N04", "no-interrupt", {"avail.flags": 1}),
    *(
        _silent("N03 N04", f"used-event-{event:#x}", {"used_event": event}, features=_EVENTS, interrupts=1)
        for event in (0xFFFF, 0x8000, 5)
    ),
    *ring("N03 N05", "avail-flags-with-events", _with_used_event(0), outcome="accepted", formats="split",
          queue=Queue(features=_EVENTS)),
]  # fmt: skip

CASES: Final[list[Case]] = [*_DESCRIPTORS, *_SUPPRESSED]

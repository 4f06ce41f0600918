"""Attacks by the registers of queues: rows of 2.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from virtio_test.features import FeatureSet
from virtio_test.spec.pci import NO_VECTOR, CapType
from virtio_test.spec.status import Status
from virtio_test.spec.testdevice import QUEUE_SIZE

from tests.kernel.attack.case import NUMBER, Case, Machine, Steps, registers, ring, verdict
from tests.kernel.attack.driver import (
    BASIC,
    DEVICE,
    DRIVER,
    RING,
    Queue,
    kick,
    reset,
)
from tests.kernel.attack.pieces import asked
from tests.kernel.attack.program import At, FromEnd, InBar, Program, Results, Value

__all__ = ["CASES"]

_RESETTABLE: Final = Queue(features=BASIC | FeatureSet("RING_RESET"))
_LIVE: Final = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)


def _both(rows: str, name: str, run: Steps, *, rules: str, reads: Mapping[str, int]) -> list[Case]:
    """`registers` with either format of the ring."""
    return [
        registers(rows, name, run, queue=Queue(packed=packed), rules=rules, reads=reads) for packed in (False, True)
    ]


# --- 2.6 ----------------------------------------------------------------------------------------------------


def _size(rows: str, size: int, *, packed: bool) -> Case:
    """A size that no queue has; the register keeps what it was."""

    def run(p: Program, _: Machine) -> None:
        p.out("queue_select", 0)
        p.out("queue_size", size)
        p.read("size", "queue_size")

    return registers(
        rows, f"size-{size}", run, when="agreed", outcome="refused", rules="BadQueueSize", queue=Queue(packed=packed),
        reads={"size": QUEUE_SIZE},
    )  # fmt: skip


def _written(rows: str, name: str, value: Value, label: str = "", keeps: int | None = None) -> list[Case]:
    """A register of the running queue is written, and keeps what it was."""
    found: list[Case] = []
    for packed in (False, True):
        queue = Queue(packed=packed, size=16)

        def run(p: Program, _: Machine, name: str = name) -> None:
            p.out(name, value)
            if keeps is not None:
                p.read("kept", name)

        reads = {} if keeps is None else {"kept": keeps}
        found.append(registers(rows, label or name, run, queue=queue, rules="EnabledQueueWritten", reads=reads))
    return found


def _resized_twice(p: Program, _: Machine) -> None:
    """As a guest of Firecracker could: large, then none at all, with a kick after each."""
    for size in (32768, 0):
        p.out("queue_size", size)
        kick(p)
    p.read("size", "queue_size")


def _enable(value: int) -> list[Case]:
    def run(p: Program, _: Machine) -> None:
        p.out("queue_enable", value)
        p.read("enabled", "queue_enable")

    rule = "EnabledQueueWritten" if value == 1 else "BadQueueEnable"
    return _both("Q06", f"enable-{value:#x}", run, rules=rule, reads={"enabled": 1})


def _misplaced(
    rows: str, name: str, rules: str, places: Mapping[str, Value], formats: str = "split packed"
) -> list[Case]:
    """An area where no area can be: the queue breaks the device when it is enabled, before DRIVER_OK."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        asked(p)

    return ring(rows, name, write, rules=rules, queue=Queue(places=places), told=False, formats=formats)


def _placed(rows: str, name: str, places: Mapping[str, Value], *, packed: bool) -> Case:
    """An area at the last place where it can be: the queue is enabled and nothing breaks."""

    def run(p: Program, _: Machine) -> None:
        Queue(packed=packed, places=places).start(p, settled=False)
        p.read("enabled", "queue_enable")

    def judge(results: Results) -> str:
        return verdict("accepted", results, {"started": _LIVE, "enabled": 1})

    return Case(rows=tuple(rows.split()), name=name, packed=packed, run=run, judge=judge, verdict="accepted")


def _at_one_place(p: Program, _: Machine) -> None:
    """All three areas lie over each other.

    The available index is a part of the first descriptor, whose length is 0, and is where the used index comes. What
    the device says about kicks reads as that no interrupt is wanted.
    """
    queue = Queue(places={"desc": At(RING), "driver": At(RING), "device": At(RING)})
    queue.start(p, settled=False)
    p.put(queue.layout.at("avail.idx"), 1, 2)
    kick(p)
    p.read("turn", "device_status")
    p.read("status", "device_status")
    p.get("used", queue.layout.at("used.idx"), 2)
    p.get("len", queue.layout.at("used.ring.len", 0), 4)


def _at_one_place_judged(results: Results) -> str:
    if results["status"] & 0x40:
        return verdict("broken", results, {"used": 1})
    return verdict("completed0", results, {"status": _LIVE, "used": 1, "len": 0})


def _no_queue(p: Program, _: Machine) -> None:
    for index in (1, 0x7FFF, 0xFFFF):
        p.out("queue_select", index)
        for name in ("queue_size", "queue_msix_vector", "queue_enable"):
            p.out(name, 1)
        for name in ("queue_desc", "queue_driver", "queue_device"):
            p.out(name, At(RING))
        for name in ("queue_size", "queue_enable", "queue_notify_off", "queue_desc", "queue_msix_vector"):
            p.read(f"{index}.{name}", name)
    p.out("queue_select", 0)


_NO_QUEUE: Final = {
    f"{index}.{name}": value
    for index in (1, 0x7FFF, 0xFFFF)
    for name, value in (
        ("queue_size", 0), ("queue_enable", 0), ("queue_notify_off", 0), ("queue_desc", 0),
        ("queue_msix_vector", NO_VECTOR),
    )
}  # fmt: skip


def _low_halves(p: Program, _: Machine) -> None:
    """Once the queue is enabled its addresses are written by halves, each with what would move it."""
    for offset in range(0x20, 0x38, 4):
        p.out_at(CapType.COMMON_CFG, offset, 4, 0xFFFF_F000)


def _queue_reset(value: int) -> Steps:
    def run(p: Program, _: Machine) -> None:
        p.out("queue_reset", value)
        p.read("enabled", "queue_enable")
        p.read("reset_reads", "queue_reset")

    return run


def _set_up_anew(p: Program, _: Machine) -> None:
    """The queue is reset and set up with another size elsewhere; the old ring is as good as gone."""
    _RESETTABLE.ask(p, NUMBER, kicks=False)
    p.out("queue_reset", 1)
    p.until("reset_reads", "queue_reset", 0)
    p.read("enabled", "queue_enable")
    p.read("size", "queue_size")
    kick(p)
    p.read("status", "device_status")
    p.get("untouched", _RESETTABLE.layout.at("used.idx"), 2)
    p.fill(0, 0x4000)
    moved = Queue(size=64, places={"desc": At(RING + 0x1000), "driver": At(DRIVER), "device": At(DEVICE)})
    moved.place(p)
    p.out("queue_enable", 1)
    moved.ask(p, NUMBER)
    moved.used(p, label="moved.")
    p.out("queue_reset", 1)
    p.fill(0, 0x4000)
    _RESETTABLE.place(p)
    p.out("queue_enable", 1)


def _nothing_enabled(p: Program, _: Machine) -> None:
    """DRIVER_OK without a queue; then kicks, and everything from the beginning."""
    Queue(enabled=False).start(p)
    kick(p)
    p.read("status", "device_status")
    reset(p, "again")


_FORMATS: Final = {
    ("desc", 1): "packed", ("desc", 8): "packed", ("driver", 2): "packed", ("driver", 8): "", ("device", 8): "",
}  # fmt: skip
"""Where a place is legal in a format, or C11 has it."""

CASES: Final[list[Case]] = [
    *(_size("Q01 CVE-2026-5747 mvm#1860" if size == 0 else "Q02", size, packed=False) for size in (0, 3, 5, 127)),
    *(
        _size("Q03 CVE-2026-50626" if size < 32768 else "Q04", size, packed=False)
        for size in (256, 1024, 32768, 32769, 0xFFFF)
    ),
    *(_size("P13 Q01 openvmm#2983" if not size else "P13", size, packed=True) for size in (0, 129, 32769, 0xFFFF)),
    *_written("Q05", "queue_size", 8, keeps=16),
    *(
        each
        for name in ("queue_desc", "queue_driver", "queue_device")
        for each in _written("Q05", name, 1 << 40)
    ),
    *_both(
        "Q05 CVE-2026-5747", "resized-twice", _resized_twice, rules="EnabledQueueWritten", reads={"size": 8},
    ),
    *(each for value in (1, 0, 2, 0xFFFF) for each in _enable(value)),
    *(
        each
        for name in ("desc", "driver", "device")
        for at in (1, 2, 3, 8)
        for each in _misplaced(
            "Q08 D11", f"{name}-at-{at}", "RingMisaligned",
            {name: At({"desc": RING, "driver": DRIVER, "device": DEVICE}[name] + at)},
            formats=_FORMATS.get((name, at), "split packed"),
        )
    ),
    *(
        each
        for name in ("desc", "driver", "device")
        for place, where in (("nowhere", 1 << 40), ("last", (1 << 64) - 16))
        for each in _misplaced("Q09 A13 D11 cloud-hypervisor@2d2931a76", f"{name}-{place}", "RingUnmapped",
                               {name: where})
    ),
    *_misplaced("Q09", "desc-one-beyond-memory", "RingUnmapped", {"desc": FromEnd(-112)}),
    *(_placed("Q09", "desc-ends-with-memory", {"desc": FromEnd(-128)}, packed=packed) for packed in (False, True)),
    *_misplaced("A13 B14", "driver-in-own-bar", "RingUnmapped", {"driver": InBar(4)}),
    Case(
        rows=("Q10",), name="areas-at-one-place", run=_at_one_place, judge=_at_one_place_judged,
        verdict="completed0", strict=("broken", ("ZeroLength",)),
    ),
    registers("Q12 X16 cloud-hypervisor@082fdc4d0", "no-such-queue", _no_queue, rules="NoSuchQueue", reads=_NO_QUEUE),
    registers("Q11", "halves-of-addresses", _low_halves, rules="EnabledQueueWritten"),
    registers(
        "Q14", "reset-not-negotiated", _queue_reset(1), rules="QueueResetNotNegotiated",
        reads={"enabled": 1, "reset_reads": 0},
    ),
    *(
        registers(
            "Q14", f"reset-by-{value:#x}", _queue_reset(value), rules="BadQueueReset", queue=_RESETTABLE,
            reads={"enabled": 1, "reset_reads": 0},
        )
        for value in (0, 2, 0xFFFF)
    ),
    registers(
        "Q15", "set-up-anew", _set_up_anew, queue=_RESETTABLE, outcome="accepted",
        reads={"reset_reads": 0, "enabled": 0, "size": QUEUE_SIZE, "status": _LIVE, "untouched": 0, "moved.len": 12},
    ),
    registers("Q16", "nothing-enabled", _nothing_enabled, when="fresh", reads={"status": _LIVE}),
]  # fmt: skip

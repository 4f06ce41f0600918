"""Attacks on the PCI function: rows of 2.8. Widths, vectors, notifications, the window, what decodes, and its reset."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtio_test.devices.test import TestDevice
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import CAP, CAP_PCI_CFG_DATA, COMMON, COMMON_SIZE, NO_VECTOR, CapType
from virtio_test.spec.pcibus import (
    BAR0,
    COMMAND_INTX_DISABLE,
    COMMAND_IO,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    HEADER,
    MSIX_CONTROL,
    MSIX_ENABLE,
    MSIX_MASK_ALL,
)
from virtio_test.transport.pci.configspace import ConfigBytes
from virtio_test.transport.pci.flavours import declare

from tests.kernel.attack.case import NUMBER, Case, Machine, Steps, registers, ring, verdict
from tests.kernel.attack.driver import BASIC, CONFIG_VECTOR, QUEUE_VECTOR, Queue, answer, kick
from tests.kernel.attack.pieces import NOWHERE, READ, WRITTEN, joined
from tests.kernel.attack.program import CONFIG, InBar, Program, Results, bar

__all__ = ["CASES"]

_DECLARED: Final = declare(TestDevice())
_AT: Final = ConfigBytes(_DECLARED).capabilities
_BAR: Final = BAR0 + 4 * 4
_COMMAND: Final = HEADER["command"][0]
_REST: Final = COMMAND_INTX_DISABLE | COMMAND_IO
"""What else stands in the command register while the function works."""

_ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: (1 << 64) - 1}
_QUEUE: Final = Queue()
_LIVE: Final = 15


def _ask(p: Program, label: str, *, position: int = 0, kicks: bool = True) -> None:
    """A request of the running queue, and its used element."""
    _QUEUE.ask(p, NUMBER, position=position, kicks=kicks)
    _QUEUE.used(p, position=position, label=label)


# --- X01, X07: widths and what can only be read -------------------------------------------------------------


def _legal() -> set[tuple[int, int]]:
    """The accesses that are a register: its own width, and the halves of the addresses."""
    found = {(each.offset, each.size) for each in COMMON.values()}
    return found | {(offset + half, 4) for offset, size in found if size == 8 for half in (0, 4)}


_STRAY: Final = [
    (offset, width)
    for width in (1, 2, 4, 8)
    for offset in range(0, COMMON_SIZE, width)
    if (offset, width) not in _legal()
]
"""Every aligned access to the common configuration that is none of a register."""


def _stray_reads(p: Program, _: Machine) -> None:
    for offset, width in _STRAY:
        p.read_at(f"{offset:#x}/{width}", CapType.COMMON_CFG, offset, width)


def _stray_writes(p: Program, _: Machine) -> None:
    for value in (0, (1 << 64) - 1):
        for offset, width in _STRAY:
            p.out_at(CapType.COMMON_CFG, offset, width, value & _ONES[width])
    for name in _KEPT:
        p.read(name, name)


_KEPT: Final = {"device_status": _LIVE, "queue_select": 0, "queue_size": 8, "queue_enable": 1, "config_msix_vector": 0}


def _beyond(p: Program, _: Machine) -> None:
    """Between the structures of the BAR there is nothing."""
    for width in (1, 2, 4, 8):
        for offset in (COMMON_SIZE, 0x800, 0x1008, 0x2FF8, 0x3008, 0x3FF8):
            p.out_at(bar(4), offset, width, 0)
            p.read_at(f"{offset:#x}/{width}", bar(4), offset, width)


_BEYOND: Final = {
    f"{offset:#x}/{width}": _ONES[width]
    for width in (1, 2, 4, 8)
    for offset in (COMMON_SIZE, 0x800, 0x1008, 0x2FF8, 0x3008, 0x3FF8)
}

_READ_ONLY: Final = {name: each.size for name, each in COMMON.items() if not each.driver_writable}


def _read_only(p: Program, _: Machine) -> None:
    for name, size in _READ_ONLY.items():
        p.read(f"before.{name}", name)
        p.out(name, _ONES[size])
        p.read(f"after.{name}", name)


def _read_only_case() -> Case:
    case = registers("X07", "read-only-registers", _read_only, rules="ReadOnlyRegister")

    def judge(results: Results) -> str:
        changed = {f"after.{name}": results[f"before.{name}"] for name in _READ_ONLY}
        return verdict(case.judge(results), results, changed)

    return replace(case, judge=judge)


def _capabilities(p: Program, _: Machine) -> None:
    """Bytes of the capabilities that say where things are."""
    for name in ("common", "isr", "device", "notify"):
        for field in ("cap_vndr", "cap_next", "cap_len", "cfg_type", "bar"):
            at = _AT[name] + CAP[field].offset
            p.out_at(CONFIG, at, 1, 0xA5)
            p.read_at(f"{name}.{field}", CONFIG, at, 1)
        for field in ("offset", "length"):
            at = _AT[name] + CAP[field].offset
            p.out_at(CONFIG, at, 4, 0xA5A5_A5A5)
            p.read_at(f"{name}.{field}", CONFIG, at, 4)


def _declared_bytes() -> dict[str, int]:
    data = ConfigBytes(_DECLARED).data
    return {
        f"{name}.{field}": int.from_bytes(data[(at := _AT[name] + CAP[field].offset) : at + CAP[field].size], "little")
        for name in ("common", "isr", "device", "notify")
        for field in ("cap_vndr", "cap_next", "cap_len", "cfg_type", "bar", "offset", "length")
    }


# --- X02, X12 to X14: vectors -------------------------------------------------------------------------------


def _vectors(p: Program, _: Machine) -> None:
    for vector in (2, 3, 0x7FF, 0x800, 0xFFFE):
        for name in ("config_msix_vector", "queue_msix_vector"):
            p.out(name, vector)
            p.read(f"{name}.{vector:#x}", name)
    p.out("config_msix_vector", NO_VECTOR)
    p.read("none", "config_msix_vector")
    p.out("config_msix_vector", CONFIG_VECTOR)
    p.out("queue_msix_vector", QUEUE_VECTOR)


_NO_SUCH: Final = {
    f"{name}.{vector:#x}": NO_VECTOR
    for vector in (2, 3, 0x7FF, 0x800, 0xFFFE)
    for name in ("config_msix_vector", "queue_msix_vector")
}


def _moved_vector(p: Program, _: Machine) -> None:
    """The vector of an enabled queue changes: the next interrupt comes by the new one."""
    p.out("queue_msix_vector", CONFIG_VECTOR)
    _ask(p, "moved.")
    p.interrupts("moved.new", CONFIG_VECTOR, 1)
    p.interrupts("moved.old", QUEUE_VECTOR)
    p.out("queue_msix_vector", QUEUE_VECTOR)
    p.forget()


def _no_vector(p: Program, _: Machine) -> None:
    p.out("queue_msix_vector", NO_VECTOR)
    _ask(p, "silent.")
    p.read("turn", "device_status")
    p.interrupts("silent.config", CONFIG_VECTOR)
    p.interrupts("silent.queue", QUEUE_VECTOR)
    p.out("queue_msix_vector", QUEUE_VECTOR)


_CONTROL: Final = _AT["msix"] + MSIX_CONTROL


def _control(p: Program, bits: int) -> None:
    p.out_at(CONFIG, _CONTROL, 2, bits | 1)


def _function_masked(p: Program, machine: Machine) -> None:
    """Two requests while the function is masked make one message when it is not any more."""
    pending = _DECLARED.layout.pba
    assert pending is not None
    _control(p, MSIX_ENABLE | MSIX_MASK_ALL)
    for position in (0, 1):
        _ask(p, f"{position}.", position=position)
    p.read("turn", "device_status")
    p.interrupts("masked", QUEUE_VECTOR)
    if machine.keeps_table:
        # Whoever keeps the table keeps the pending bits, and QEMU shows them only while one vector is masked alone. Of
        # the two events that we sent it may hear the second when nothing is masked any more: a message of its own.
        p.tell("pending", 2)
        _control(p, MSIX_ENABLE)
        p.interrupts("came", QUEUE_VECTOR, 1)
        p.tell("unmasked", 1)
    else:
        p.read_at("pending", bar(pending.bar), pending.offset, 4)
        _control(p, MSIX_ENABLE)
        p.interrupts("unmasked", QUEUE_VECTOR, 1)
    p.read_at("delivered", bar(pending.bar), pending.offset, 4)
    p.forget()


def _disabled_msix(p: Program, _: Machine) -> None:
    """The device breaks while MSI-X, whose vectors are set, is disabled."""
    _QUEUE.start(p)
    _control(p, 0)
    _QUEUE.desc(p, 0, 1 << 40, 16, 0)
    _QUEUE.publish(p, 0)
    kick(p)
    p.until("status", "device_status", 0x40, 0x40)
    p.read_at("isr", CapType.ISR_CFG, 0, 1)
    _control(p, MSIX_ENABLE)


# --- X03: notifications -------------------------------------------------------------------------------------


def _notified(offset: int, width: int, value: int) -> Steps:
    return lambda p, _: p.out_at(CapType.NOTIFY_CFG, offset, width, value)


def _many_kicks(p: Program, _: Machine) -> None:
    for _each in range(20):
        kick(p)
    p.read("status", "device_status")


# --- X04: ISR status ----------------------------------------------------------------------------------------


def _isr(p: Program, _: Machine) -> None:
    """A broken device has the configuration's bit, which reading clears, in whatever width."""
    for width in (1, 2, 4):
        _QUEUE.start(p)
        _QUEUE.desc(p, 0, 1 << 40, 16, 0)
        _QUEUE.publish(p, 0)
        kick(p)
        p.interrupts(f"{width}.told", CONFIG_VECTOR, 1)
        p.out_at(CapType.ISR_CFG, 0, width, 0)
        p.read_at(f"{width}.first", CapType.ISR_CFG, 0, width)
        p.read_at(f"{width}.second", CapType.ISR_CFG, 0, width)
        p.out("device_status", 0)
        p.until(f"{width}.reset", "device_status", 0)


_CLEARED: Final = {f"{width}.{name}": value for width in (1, 2, 4)
                   for name, value in (("told", 1), ("first", 2), ("second", 0), ("reset", 0))}  # fmt: skip


# --- X05: the window ----------------------------------------------------------------------------------------


def _through_window(*aims: tuple[int, int, int]) -> Steps:
    """Reads and writes through the window, aimed at these (BAR, offset, length)."""

    def run(p: Program, _: Machine) -> None:
        at = _AT["pci_cfg"]
        for number, (which, offset, length) in enumerate(aims):
            p.out_at(CONFIG, at + CAP["bar"].offset, 1, which)
            p.out_at(CONFIG, at + CAP["offset"].offset, 4, offset)
            p.out_at(CONFIG, at + CAP["length"].offset, 4, length)
            p.read_at(f"{number}.read", CONFIG, at + CAP_PCI_CFG_DATA.offset, 4)
            p.out_at(CONFIG, at + CAP_PCI_CFG_DATA.offset, 4, 0)
        p.out_at(CONFIG, at + CAP["length"].offset, 4, 0)
        p.read("status", "device_status")

    return run


_NO_AIMS: Final = (
    (6, 0, 4), (7, 0, 4), (255, 0, 4), (2, 0, 4), (4, 0x4000, 4), (4, 0xFFFF_FFFC, 4), (4, 0x14, 3), (4, 0x10, 5),
    (4, 0x10, 8), (4, 0x10, 0xFFFF_FFFF), (4, 0x16, 4), (4, 0x15, 2), (4, 0x2001, 2), (4, 0x2002, 4), (1, 0, 4),
    (4, 0x3FFC, 4),
)  # fmt: skip


# --- X10, X11: what decodes, bus mastering, resets ----------------------------------------------------------


def _not_decoding(p: Program, _: Machine) -> None:
    """A kick that reaches nothing, since the BARs do not answer."""
    _QUEUE.ask(p, NUMBER, kicks=False)
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MASTER)
    kick(p)
    p.read("deaf", "device_status")
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MASTER | COMMAND_MEMORY)
    p.read("status", "device_status")
    p.get("unused", _QUEUE.layout.at("used.idx"), 2)
    kick(p)
    _QUEUE.used(p, label="then.")


def _no_master(p: Program, _: Machine) -> None:
    """A kick while the function may not use memory: it is looked at when it may."""
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MEMORY)
    _QUEUE.ask(p, NUMBER)
    p.read("turn", "device_status")
    p.read("status", "device_status")
    p.get("unused", _QUEUE.layout.at("used.idx"), 2)
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MASTER | COMMAND_MEMORY)
    _QUEUE.used(p, label="then.")


def _sized(p: Program, _: Machine) -> None:
    """The BAR with the registers is sized while it decodes, as a driver should not do it, with a kick meanwhile."""
    p.out_at(CONFIG, _BAR, 4, 0xFFFF_FFFF)
    p.read_at("size", CONFIG, _BAR, 4)
    kick(p)
    p.out_at(CONFIG, _BAR, 4, InBar(4))
    p.read("status", "device_status")


def _elsewhere(p: Program, _: Machine) -> None:
    """The BAR with the registers is moved: at the old place nobody answers; back again, all is as it was."""
    _QUEUE.ask(p, NUMBER, kicks=False)
    p.out_at(CONFIG, _BAR, 4, 0xF000_0000)
    kick(p)
    p.read("deaf", "device_status")
    p.out_at(CONFIG, _BAR, 4, InBar(4))
    p.read("status", "device_status")
    p.get("unused", _QUEUE.layout.at("used.idx"), 2)
    kick(p)
    _QUEUE.used(p, label="then.")


def _function_reset(p: Program, _: Machine) -> None:
    """The function is reset with a request made available; a kick after it means nothing any more."""
    _QUEUE.start(p)
    _QUEUE.ask(p, NUMBER, kicks=False)
    p.reset_function("errno")
    p.read("status", "device_status")
    kick(p)
    p.read("turn", "device_status")
    p.read("config_vector", "config_msix_vector")
    p.read("queue_vector", "queue_msix_vector")
    p.get("unused", _QUEUE.layout.at("used.idx"), 2)


def _with_data(p: Program, _: Machine) -> None:
    """With NOTIFICATION_DATA a notification of 2 bytes is none, and one of 4 has the ring's position too."""
    queue = Queue(features=BASIC | FeatureSet("NOTIFICATION_DATA"))
    queue.start(p)
    queue.ask(p, NUMBER)
    p.read("turn", "device_status")
    p.read("status", "device_status")
    p.get("unused", queue.layout.at("used.idx"), 2)
    p.out_at(CapType.NOTIFY_CFG, 0, 4, 1 << 16)
    queue.used(p)
    queue.answered(p)


def _with_data_judged(results: Results) -> str:
    low, high = answer(NUMBER)
    return verdict("accepted", results, {"status": _LIVE, "unused": 0, "len": 12, "low": low, "high": high})


# --- X15: the line ------------------------------------------------------------------------------------------


def _line_disabled(p: Program, _: Machine) -> None:
    """Two requests while the line is off: only the ISR status tells of them, and only once."""
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MASTER | COMMAND_MEMORY)
    for position in (0, 1):
        _ask(p, f"{position}.", position=position)
    p.read("turn", "device_status")
    p.interrupts("queue", QUEUE_VECTOR)
    p.read_at("isr", CapType.ISR_CFG, 0, 1)
    p.read_at("isr_again", CapType.ISR_CFG, 0, 1)
    p.out_at(CONFIG, _COMMAND, 2, COMMAND_IO | COMMAND_MASTER | COMMAND_MEMORY)
    p.read("status", "device_status")
    p.interrupts("later", QUEUE_VECTOR)


def _pending_line(p: Program, _: Machine) -> None:
    """An interrupt that waits while the line is off comes when it is on."""
    p.out_at(CONFIG, _COMMAND, 2, _REST | COMMAND_MASTER | COMMAND_MEMORY)
    _ask(p, "then.")
    p.read("turn", "device_status")
    p.interrupts("before", QUEUE_VECTOR)
    p.out_at(CONFIG, _COMMAND, 2, COMMAND_IO | COMMAND_MASTER | COMMAND_MEMORY)
    p.interrupts("after", QUEUE_VECTOR, 1)
    p.read_at("isr", CapType.ISR_CFG, 0, 1)


_BY_LINE: Final = [
    *ring("X15", "line", joined(READ, WRITTEN), outcome="accepted", answered=True, needs="line"),
    *ring("X15 N07", "line-when-broken", joined((NOWHERE, 16, 0)), rules="UnmappedAddress", needs="line"),
    registers("X15", "line-disabled", _line_disabled, outcome="accepted", position=2, needs="line",
              reads={"0.len": 12, "1.len": 12, "queue": 0, "isr": 1, "isr_again": 0, "later": 0}),
    registers("X15", "line-enabled-later", _pending_line, outcome="accepted", position=1, needs="line",
              reads={"then.len": 12, "before": 0, "after": 1, "isr": 0}),
]  # fmt: skip


def _deaf(case: Case) -> Case:
    """What a register reads at which nobody answers is the machine's matter: not what the device has there."""

    def judge(results: Results) -> str:
        return "the registers answer" if results["deaf"] == _LIVE else case.judge(results)

    return replace(case, judge=judge)


_AGAIN: Final = {"unused": 0, "then.len": 12, "status": _LIVE}


CASES: Final[list[Case]] = [
    registers("X01 openvmm#4145", "stray-reads", _stray_reads, rules="AccessWidth",
              reads={f"{offset:#x}/{width}": _ONES[width] for offset, width in _STRAY}),
    registers("X01 D15", "stray-writes", _stray_writes, rules="AccessWidth", reads=_KEPT),
    registers("X01 X09", "between-structures", _beyond, rules="AccessWidth", reads=_BEYOND),
    _read_only_case(),
    registers("X07", "capability-bytes", _capabilities, reads=_declared_bytes()),
    registers("X02 firecracker#5353 cloud-hypervisor@3b431afba", "vectors", _vectors, outcome="refused",
              rules="BadVector", reads={**_NO_SUCH, "none": NO_VECTOR}),
    *(
        registers("X03 A17 CVE-2011-2512" if offset else "X03", f"notify-{offset:#x}/{width}-{value:#x}",
                  _notified(offset, width, value), rules=rules)
        for offset, width, value, rules in (
            (0, 1, 0, "BadNotification"), (0, 4, 0, "BadNotification"), (0, 8, 0, "AccessWidth"),
            (2, 2, 0, "BadNotification"), (1, 1, 0, "BadNotification"), (4, 2, 1, "AccessWidth"),
            (0xFFC, 2, 0x3FF, "AccessWidth"),
        )
    ),
    *(
        registers("X03 A17 CVE-2011-2512", f"notify-value-{value:#x}", _notified(0, 2, value),
                  rules="NotificationValue")
        for value in (1, 0x8000, 0xFFFF)
    ),
    Case(rows=("X03",), name="notify-with-data", run=_with_data, judge=_with_data_judged, verdict="accepted",
         rules=("BadNotification",)),
    registers("A16 X03", "kicks-for-nothing", _many_kicks, reads={"status": _LIVE}),
    Case(rows=("X04", "N07"), name="isr", run=_isr, judge=lambda results: verdict("broken", results, _CLEARED),
         verdict="broken", rules=("UnmappedAddress", "ReadOnlyRegister") * 3),
    registers("X05", "window", _through_window((4, 0x12, 2), (4, 0x18, 2)), outcome="accepted",
              rules="BadWindow EnabledQueueWritten",
              reads={"0.read": 1, "1.read": 8, "status": _LIVE}),
    registers("X05", "window-nowhere", _through_window(*_NO_AIMS), rules="BadWindow",
              reads={f"{number}.read": 0xFFFF_FFFF for number in range(len(_NO_AIMS))} | {"status": _LIVE}),
    _deaf(registers("X10", "not-decoding", _not_decoding, reads=_AGAIN, position=1)),
    registers("X10", "no-bus-master", _no_master, outcome="accepted", reads=_AGAIN, position=1),
    registers("X10", "bar-sized", _sized, reads={"size": 0xFFFF_C00C, "status": _LIVE}),
    _deaf(registers("X10", "bar-elsewhere", _elsewhere, reads=_AGAIN, position=1, needs="relocates")),
    registers("X11 D08", "function-reset", _function_reset, when="fresh", outcome="accepted", rules="NotifiedEarly",
              reads={"errno": 0, "status": 0, "unused": 0, "config_vector": NO_VECTOR, "queue_vector": NO_VECTOR}),
    registers("X12", "vector-moved", _moved_vector, outcome="accepted", position=1,
              reads={"moved.len": 12, "moved.new": 1, "moved.old": 0}),
    registers("X13", "function-masked", _function_masked, outcome="accepted", position=2,
              reads={"0.len": 12, "1.len": 12, "masked": 0, "pending": 2, "unmasked": 1, "delivered": 0}),
    registers("X14", "no-vector", _no_vector, outcome="accepted", position=1,
              reads={"silent.len": 12, "silent.config": 0, "silent.queue": 0}),
    Case(rows=("CVE-2024-4693",), name="msix-disabled", run=_disabled_msix,
         judge=lambda results: verdict("broken", results, {"status": _LIVE | 0x40, "isr": 2}), verdict="broken",
         rules=("UnmappedAddress",)),
    *_BY_LINE,
]  # fmt: skip

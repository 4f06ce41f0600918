"""The device status machine as a table, for both ends (VIRTIO 1.4, 2.1, 2.4, 3.1.1, 3.4).

Theory
------
The register has two writers. The driver writes values: its bits only ever grow, and 0 means reset. The device
sets DEVICE_NEEDS_RESET, and clears or sets DRIVER_OK and SUSPEND when it has suspended or resumed. This module
holds no register and sends nothing: events go in, the new status and a list of actions come out.

It does not know which role we play. A transport feeds it what the driver wrote and carries out the actions; a
driver feeds it what it is about to write, and has at once what a faithful device must answer: `check_read_back`
compares that with what the device did answer. The same table judges both.

A driver's write of V over status S is decided bit by bit, in the order of `BIT_RULES`:

1. V is 0: reset, whatever the state. Nothing else in the table applies.
2. A write of the wrong width changes nothing.
3. A bit of S that V lacks stays set: only a reset clears.
4. Each bit of V that S lacks meets its rows; the first whose condition holds decides. The order of the rows is
   the order of 3.1.1, and FEATURES_OK comes before DRIVER_OK, so one write may carry both.

What the driver must not do is ignored where the specification lets the device choose, reported in
`StatusChange.violations` and counted in `DeviceStatus.ignored`; nothing is raised. "D01" and so on are rows of
the robustness catalogue.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from .console import shown
from .errors import DeviceNeedsReset, InvalidArgument, SavedStateError, StatusViolation
from .spec.status import INIT_SEQUENCE, STATUS_DEFINED, Status

__all__ = [
    "BIT_RULES",
    "INIT_SEQUENCE",
    "Action",
    "BitRule",
    "DeviceStatus",
    "Status",
    "StatusChange",
    "When",
    "check_read_back",
    "describe",
    "table_text",
]


class Action(Enum):
    """What the owner of the status has to do after a change."""

    RESET = "reset the device"
    FEATURES_ACCEPTED = "freeze the accepted features"
    FEATURES_REFUSED = "leave FEATURES_OK clear"
    ACTIVATE = "start the queues"
    SUSPEND = "drain, then call suspended()"
    RESUME = "start again, then call resumed()"
    FAILED = "stop the queues, the driver has given up"
    NOTIFY_CONFIG = "send a configuration change notification"


class When(Enum):
    """Conditions of the table, each on the status as it stands and the facts that came with the write."""

    ALWAYS = "always"
    GIVEN_UP = "FAILED is set"
    FEATURES_GOOD = "the accepted features are good"
    FEATURES_SET = "FEATURES_OK is set"
    BROKEN = "DEVICE_NEEDS_RESET is set, FEATURES_OK is set"
    SUSPENDED = "SUSPEND is set"
    SUSPENDED_BROKEN = "SUSPEND and DEVICE_NEEDS_RESET are set"
    CAN_SUSPEND = "SUSPEND is negotiated, DRIVER_OK is set, DEVICE_NEEDS_RESET is clear"


@dataclass(frozen=True, slots=True)
class BitRule:
    """One row: what becomes of one bit that the driver newly sets.

    Attributes:
        bit: the bit, or 0 for every bit without a meaning.
        when: the row decides if this holds and no row of the bit above it did.
        outcome: whether the bit is then set in the status, or stays clear.
        action: what the device has to do, or None.
        broken: name of the rule that the driver broke, or None.
        clause: clause of VIRTIO 1.4.
        row: row of the robustness catalogue, or "".
    """

    bit: int
    when: When
    outcome: Literal["set", "clear"]
    action: Action | None = None
    broken: str | None = None
    clause: str = "3.1.1"
    row: str = ""


_S = Status
BIT_RULES: Final = (
    BitRule(_S.ACKNOWLEDGE, When.GIVEN_UP, "clear", None, "StatusAfterFailed", "2.1.1"),
    BitRule(_S.ACKNOWLEDGE, When.ALWAYS, "set"),
    BitRule(_S.DRIVER, When.GIVEN_UP, "clear", None, "StatusAfterFailed", "2.1.1"),
    BitRule(_S.DRIVER, When.ALWAYS, "set"),
    BitRule(_S.FEATURES_OK, When.GIVEN_UP, "clear", None, "StatusAfterFailed", "2.1.1"),
    BitRule(_S.FEATURES_OK, When.FEATURES_GOOD, "set", Action.FEATURES_ACCEPTED, None, "2.2.2"),
    BitRule(_S.FEATURES_OK, When.ALWAYS, "clear", Action.FEATURES_REFUSED, "BadFeatures", "2.2.2", "D01 D03"),
    BitRule(_S.DRIVER_OK, When.GIVEN_UP, "clear", None, "StatusAfterFailed", "2.1.1"),
    BitRule(_S.DRIVER_OK, When.SUSPENDED_BROKEN, "clear", None, None, "3.4.2", "D17"),
    BitRule(_S.DRIVER_OK, When.SUSPENDED, "clear", Action.RESUME, None, "3.4.2", "D17"),
    BitRule(_S.DRIVER_OK, When.BROKEN, "set", None, None, "2.1.2", "D12"),
    BitRule(_S.DRIVER_OK, When.FEATURES_SET, "set", Action.ACTIVATE, None, "3.1.1", "D10"),
    BitRule(_S.DRIVER_OK, When.ALWAYS, "clear", None, "DriverOkWithoutFeaturesOk", "3.1.1", "D04"),
    BitRule(_S.SUSPEND, When.GIVEN_UP, "clear", None, "StatusAfterFailed", "2.1.1"),
    BitRule(_S.SUSPEND, When.CAN_SUSPEND, "clear", Action.SUSPEND, None, "3.4.2", "D17"),
    BitRule(_S.SUSPEND, When.ALWAYS, "clear", None, "SuspendNotPossible", "3.4.1", "D17"),
    BitRule(_S.DEVICE_NEEDS_RESET, When.ALWAYS, "clear", None, "DriverSetNeedsReset", "2.1", "D06"),
    BitRule(_S.FAILED, When.ALWAYS, "set", Action.FAILED, None, "2.1.1"),
    BitRule(0, When.ALWAYS, "clear", None, "UndefinedStatusBit", "2.1", "D07"),
)

_REGISTER: Final = 0xFF
_SET_BY_DEVICE: Final = int(Status.DEVICE_NEEDS_RESET | Status.SUSPEND)
_STOPPED: Final = int(Status.DEVICE_NEEDS_RESET | Status.FAILED | Status.SUSPEND)


@dataclass(frozen=True, slots=True)
class StatusChange:
    """What one write did.

    Attributes:
        before: status before.
        after: status after, which is what the register reads now.
        actions: what has to be done, in this order.
        violations: what the driver did against the rules; already ignored and counted.
    """

    before: int
    after: int
    actions: tuple[Action, ...] = ()
    violations: tuple[StatusViolation, ...] = ()


def describe(status: int) -> str:
    """A status as names: ``"ACKNOWLEDGE|DRIVER"``, ``"0"`` for none, bits without a name as ``"0x20"``."""
    names = [each.name or "" for each in Status if status & each]
    rest = status & ~STATUS_DEFINED
    return "|".join([*names, *([f"{rest:#x}"] if rest else [])]) or "0"


def table_text() -> str:
    """The table as text, one line per row: what a driver's write of each bit does."""
    head = ("driver sets", "when", "bit is", "device then", "rule broken", "clause", "row")
    rows = [
        (
            describe(each.bit) if each.bit else "other bits",
            each.when.value,
            each.outcome,
            each.action.value if each.action else "-",
            each.broken or "-",
            each.clause,
            each.row or "-",
        )
        for each in BIT_RULES
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def check_read_back(written: int, read: int) -> None:
    """Judge what a device answers when the driver reads the status back after writing `written` (3.1.1).

    A write of 0 is not judged here: the driver polls, bounded, until it reads 0 (2.4.2). After a write that
    sets SUSPEND, or DRIVER_OK on a suspended device, poll for the outcome (3.4.1) instead.

    Raises:
        DeviceNeedsReset: the device has set DEVICE_NEEDS_RESET.
        StatusViolation: `FeaturesRefused`, `StatusBitLost` (a bit vanished without a reset) or
            `StatusBitInvented` (a bit appeared that nobody wrote).
    """
    if read & Status.DEVICE_NEEDS_RESET:
        raise DeviceNeedsReset(f"the device needs a reset: its status reads {describe(read)}")
    lost = written & ~read & ~_SET_BY_DEVICE
    if lost == Status.FEATURES_OK:
        raise StatusViolation("FeaturesRefused", "3.1.1", "the device cleared FEATURES_OK: it refuses our features")
    if lost:
        raise StatusViolation("StatusBitLost", "2.1", f"wrote {describe(written)}, read {describe(read)} back")
    if read & ~written & ~_SET_BY_DEVICE:
        raise StatusViolation("StatusBitInvented", "2.1", f"wrote {describe(written)}, read {describe(read)} back")


class DeviceStatus:
    """The status of one device: the table above and the few words of state that it works on.

    Args:
        status: status to start from (for `repr`; a fresh device has 0).
        width: bytes of the register: 1 for PCI, 4 for MMIO.

    Raises:
        InvalidArgument: a status that no device can have, or a width other than 1, 2, 4, 8.
    """

    __slots__ = ("_ignored", "_moving", "_status", "_width")

    def __init__(self, status: int = 0, *, width: int = 1) -> None:
        if width not in (1, 2, 4, 8):
            raise InvalidArgument(f"width is {width}; a status register has 1, 2, 4 or 8 bytes")
        problem = _impossible(status)
        if problem:
            raise InvalidArgument(problem)
        self._status = int(status)
        self._width = width
        self._moving: Action | None = None
        self._ignored: Counter[str] = Counter()

    @property
    def value(self) -> int:
        """What the register reads."""
        return self._status

    @property
    def ignored(self) -> dict[str, int]:
        """How often which rule of the driver's was broken and ignored, since the object was made."""
        return dict(self._ignored)

    @property
    def features_ok(self) -> bool:
        """FEATURES_OK is set: the driver's features stand, a later write of them is ignored (D02)."""
        return bool(self._status & Status.FEATURES_OK)

    @property
    def driver_ok(self) -> bool:
        """DRIVER_OK is set."""
        return bool(self._status & Status.DRIVER_OK)

    @property
    def moving(self) -> Action | None:
        """`Action.SUSPEND` or `Action.RESUME` from the driver's write until `suspended` or `resumed`; else None."""
        return self._moving

    @property
    def broken(self) -> bool:
        """DEVICE_NEEDS_RESET is set."""
        return bool(self._status & Status.DEVICE_NEEDS_RESET)

    @property
    def live(self) -> bool:
        """The device may use buffers and notify: DRIVER_OK, and neither broken, nor given up, nor suspending."""
        return self.driver_ok and not self._status & _STOPPED and self._moving is None

    def write(
        self, value: int, *, features_ok: bool, suspend_negotiated: bool = False, width: int | None = None
    ) -> StatusChange:
        """The driver writes `value`.

        Args:
            value: what it wrote, not negative; bits above the register's width count as undefined.
            features_ok: whether the features that it accepted so far are good (`features.judge_accepted`).
            suspend_negotiated: whether SUSPEND is among them.
            width: bytes of the access, when the transport allows others than the register's.

        Raises:
            InvalidArgument: the value is negative.
        """
        if value < 0:
            raise InvalidArgument(f"status value is {value}; a register holds no negative number")
        before = self._status
        if width is not None and width != self._width:
            message = f"status written with {width} bytes, the register has {self._width}"
            return self._ignore_all("StatusWidth", "4.2.2.2" if self._width == 4 else "4.1.3.1", message)
        if value == 0:
            self._status = 0
            self._moving = None
            return StatusChange(before, 0, (Action.RESET,))
        actions: list[Action] = []
        violations: list[StatusViolation] = []
        cleared = before & ~value & ~_SET_BY_DEVICE
        if cleared:
            message = f"wrote {describe(value)} over {describe(before)}: {describe(cleared)} stays set"
            violations.append(StatusViolation("StatusBitCleared", "2.1.1", message))
        for bit in _new_bits(value & ~before):
            rule = self._rule(bit, features_ok=features_ok, suspend_negotiated=suspend_negotiated)
            if rule.broken:
                message = f"wrote {describe(value)} over {describe(before)}: {describe(bit)} is ignored"
                violations.append(StatusViolation(rule.broken, rule.clause, message))
            if rule.outcome == "set":
                self._status |= int(bit)
            if rule.action in (Action.SUSPEND, Action.RESUME):
                if self._moving is rule.action:
                    continue
                self._moving = rule.action
            if rule.action:
                actions.append(rule.action)
        self._ignored.update(each.rule for each in violations)
        return StatusChange(before, self._status, tuple(actions), tuple(violations))

    def needs_reset(self) -> bool:
        """The device breaks: set DEVICE_NEEDS_RESET. True when a configuration change notification is due.

        That is once per reset, and only with DRIVER_OK (2.1.2).
        """
        first = not self.broken
        self._status |= int(Status.DEVICE_NEEDS_RESET)
        self._moving = None
        return first and self.driver_ok

    def reset(self) -> StatusChange:
        """Reset by another way than a write of 0, such as a transport's own reset."""
        return self.write(0, features_ok=False)

    def suspended(self) -> None:
        """The device has drained: SUSPEND appears, DRIVER_OK vanishes. No effect unless a suspend is under way."""
        if self._moving is Action.SUSPEND:
            self._moving = None
            self._status = int(self._status & ~Status.DRIVER_OK | Status.SUSPEND)

    def resumed(self) -> None:
        """The device runs again: DRIVER_OK appears, SUSPEND vanishes. No effect unless a resume is under way."""
        if self._moving is Action.RESUME:
            self._moving = None
            self._status = int(self._status & ~Status.SUSPEND | Status.DRIVER_OK)

    def save(self) -> int:
        """The status for a saved state; park and drain first, a suspend under way is not kept."""
        return self._status

    def restore(self, status: object) -> None:
        """Take over a saved status.

        Raises:
            SavedStateError: not a status that a device can have; nothing was changed.
        """
        if not isinstance(status, int) or isinstance(status, bool):
            raise SavedStateError(f"saved status is {shown(status)}; it must be an integer")
        if not 0 <= status <= _REGISTER:
            raise SavedStateError(f"saved status is {shown(status)}; the register has 8 bits")
        problem = _impossible(status)
        if problem:
            raise SavedStateError(f"saved {problem}")
        self._status = int(status)
        self._moving = None

    def _ignore_all(self, rule: str, clause: str, message: str) -> StatusChange:
        self._ignored[rule] += 1
        return StatusChange(self._status, self._status, (), (StatusViolation(rule, clause, message),))

    def _rule(self, bit: int, *, features_ok: bool, suspend_negotiated: bool) -> BitRule:
        status = self._status
        holds = {
            When.ALWAYS: True,
            When.GIVEN_UP: bool(status & Status.FAILED),
            When.FEATURES_GOOD: features_ok,
            When.FEATURES_SET: self.features_ok,
            When.BROKEN: self.broken and self.features_ok,
            When.SUSPENDED_BROKEN: bool(status & Status.SUSPEND) and self.broken,
            When.SUSPENDED: bool(status & Status.SUSPEND),
            When.CAN_SUSPEND: suspend_negotiated and self.driver_ok and not self.broken,
        }
        named = bit if bit & STATUS_DEFINED else 0
        return next(each for each in BIT_RULES if each.bit == named and holds[each.when])

    def __repr__(self) -> str:
        width = "" if self._width == 1 else f", width={self._width}"
        return f"DeviceStatus({self._status:#x}{width})"

    def __str__(self) -> str:
        return describe(self._status)


def _new_bits(bits: int) -> list[int]:
    """The bits one by one in the order of the table; what lies outside of it comes last, as one."""
    order = list(dict.fromkeys(each.bit for each in BIT_RULES if each.bit))
    undefined = bits & ~STATUS_DEFINED
    return [each for each in order if bits & each] + ([undefined] if undefined else [])


def _impossible(status: int) -> str | None:
    if status < 0 or status & ~STATUS_DEFINED:
        return f"status is {status:#x}; only the bits {STATUS_DEFINED:#x} have a meaning"
    if status & (Status.DRIVER_OK | Status.SUSPEND) and not status & Status.FEATURES_OK:
        return f"status is {describe(status)}; DRIVER_OK and SUSPEND need FEATURES_OK"
    if status & Status.DRIVER_OK and status & Status.SUSPEND:
        return f"status is {describe(status)}; DRIVER_OK and SUSPEND exclude each other"
    return None

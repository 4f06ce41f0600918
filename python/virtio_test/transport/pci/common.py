"""The common configuration structure as a table of registers (VIRTIO 1.4, 4.1.4.3).

Theory
------
Each register has one place, one width, one way to be read and at most one to be written. An access that is not
exactly one register, or one 32-bit half of a 64-bit one, reads as ones, writes nothing and is kept as a violation
(4.1.3.1). What a value means is the bank's matter.

Registers "about a specific virtqueue" belong to the one that `queue_select` names. Administration virtqueues are
the device's last ones: `num_queues` leaves them out, and they exist for a driver that accepted ADMIN_VQ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtio_test.errors import QueueViolation, StatusViolation
from virtio_test.spec.pci import COMMON, NO_VECTOR
from virtio_test.transport.bank import RegisterBank
from virtio_test.transport.slot import Area, QueueSlot

from .declaration import Declaration
from .interrupts import Interrupts

__all__ = ["ROWS", "CommonRegisters", "Row"]


class CommonRegisters:
    """The registers of one function.

    Args:
        bank: what is behind them.
        interrupts: the vectors.
        declaration: what reads otherwise, or takes no write.
    """

    def __init__(self, bank: RegisterBank, interrupts: Interrupts, declaration: Declaration) -> None:
        self.bank = bank
        self.interrupts = interrupts
        self.queues = len(bank.slots) - declaration.layout.admin_queues
        self.admin_queues = declaration.layout.admin_queues
        self._registers = declaration.registers
        self._deaf = declaration.deaf
        self.reset()

    def reset(self) -> None:
        """The device was reset: so are the selectors."""
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0

    # --- accesses -------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes | None:
        """One read; None when it is not defined."""
        found = _find(offset, length)
        if found is None:
            return None
        row, half = found
        value = self.value(row.name)
        value = value >> 32 * half if row.size == 8 else value
        return (value & (1 << 8 * length) - 1).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> StatusViolation | None:
        """One write; the broken rule, when it is not defined."""
        found = _find(offset, len(data))
        if found is None:
            message = f"common configuration written with {len(data)} bytes at {offset:#x}"
            return StatusViolation("AccessWidth", "4.1.3.1", message)
        row, half = found
        value = int.from_bytes(data, "little")
        reset = row.name == "device_status" and value == 0
        if row.name in self._deaf or (not reset and not self.bank.claim("modern")):
            return None
        if row.write is None:
            return StatusViolation("ReadOnlyRegister", "4.1.4.3.2", f"{row.name} written with {value:#x}")
        if row.area is not None:
            self._write_area(row.area, value, None if len(data) == 8 else half)
        else:
            row.write(self, value)
        return None

    def value(self, name: str) -> int:
        """What the register `name` reads, as the declaration shows it."""
        real = ROWS[name].read(self)
        override = self._registers.get(name)
        return real if override is None else override if isinstance(override, int) else override(real)

    # --- what the rows call ---------------------------------------------------------------------------------

    def selected(self) -> QueueSlot | None:
        """The virtqueue that is selected; None when it is not available."""
        index = self.queue_select
        if self.queues <= index and "ADMIN_VQ" not in self.bank.accepted:
            return None
        return self.bank.slot(index)

    def _writable(self, name: str) -> int | None:
        """Index of the selected virtqueue, for a write."""
        if self.selected() is None:
            message = f"{name} written, but there are {self.queues} queues"
            self._note(QueueViolation("NoSuchQueue", "4.1.4.3.1", message, queue=self.queue_select))
            return None
        return self.queue_select

    def _write_area(self, area: Area, value: int, half: int | None) -> None:
        index = self._writable(f"queue_{area}")
        if index is not None:
            self.bank.write_queue_address(index, area, value, half=None if half is None else "high" if half else "low")

    def write_queue_size(self, value: int) -> None:
        """See `RegisterBank.write_queue_size`."""
        index = self._writable("queue_size")
        if index is not None:
            self.bank.write_queue_size(index, value)

    def write_queue_enable(self, value: int) -> None:
        """1 enables; a driver writes nothing else (4.1.4.3.2)."""
        index = self._writable("queue_enable")
        if index is None:
            return
        if value == 1:
            self.bank.enable_queue(index)
        else:
            self._note(QueueViolation("BadQueueEnable", "4.1.4.3.2", f"queue_enable = {value}", queue=index))

    def write_queue_reset(self, value: int) -> None:
        """1 resets the queue, vector and all; it is reset when this returns."""
        index = self._writable("queue_reset")
        if index is None:
            return
        if value != 1:
            self._note(QueueViolation("BadQueueReset", "4.1.4.3.1", f"queue_reset = {value}", queue=index))
            return
        before = self.bank.slots[index]
        self.bank.reset_queue(index)
        if self.bank.slots[index] is not before:
            self.interrupts.queue_vectors[index] = NO_VECTOR

    def queue_vector(self) -> int:
        """The vector of the selected virtqueue."""
        return NO_VECTOR if self.selected() is None else self.interrupts.queue_vectors[self.queue_select]

    def write_queue_vector(self, value: int) -> None:
        """Map the selected virtqueue to a vector."""
        index = self._writable("queue_msix_vector")
        if index is not None:
            self.interrupts.queue_vectors[index] = self.checked_vector(value)

    def checked_vector(self, value: int) -> int:
        """`value`, or NO_VECTOR when there is no such vector (4.1.5.1.2)."""
        vector = self.interrupts.valid(value)
        if vector != value:
            self._note(StatusViolation("BadVector", "4.1.5.1.2.2", f"vector {value} of a table without it"))
        return vector

    def write_config_vector(self, value: int) -> None:
        """Map the configuration changes to a vector."""
        self.interrupts.config_vector = self.checked_vector(value)

    def _note(self, error: Exception) -> None:
        self.bank.note(error)


@dataclass(frozen=True)
class Row:
    """One register.

    Attributes:
        name: its name in the specification.
        offset: bytes from the start of the structure.
        size: bytes.
        read: its true value.
        write: what a write does; None when the driver must not.
        area: of a queue address, which one.
    """

    name: str
    offset: int
    size: int
    read: Callable[[CommonRegisters], int]
    write: Callable[[CommonRegisters, int], object] | None = None
    area: Area | None = None


def _row(
    name: str,
    read: Callable[[CommonRegisters], int],
    write: Callable[[CommonRegisters, int], object] | None = None,
    *,
    area: Area | None = None,
) -> Row:
    place = COMMON[name]
    assert place.driver_writable == (write is not None)
    return Row(name, place.offset, place.size, read, write, area)


def _selector(name: str) -> Row:
    return _row(name, lambda r: getattr(r, name), lambda r, value: setattr(r, name, value))


def _queue(name: str, read: Callable[[QueueSlot], int]) -> Callable[[CommonRegisters], int]:
    """A register of the selected virtqueue; 0 when it is not available."""

    def value(registers: CommonRegisters) -> int:
        slot = registers.selected()
        return 0 if slot is None else read(slot)

    value.__name__ = name
    return value


def _address(name: str, area: Area) -> Row:
    # Never called: addresses are written by halves.
    return _row(name, _queue(name, lambda slot: getattr(slot, area)), lambda r, _: r, area=area)


_ROWS: Final = (
    _selector("device_feature_select"),
    _row("device_feature", lambda r: r.bank.device_features(r.device_feature_select)),
    _selector("driver_feature_select"),
    _row(
        "driver_feature",
        lambda r: r.bank.driver_features(r.driver_feature_select),
        lambda r, value: r.bank.write_driver_features(r.driver_feature_select, value),
    ),
    _row("config_msix_vector", lambda r: r.interrupts.config_vector, CommonRegisters.write_config_vector),
    _row("num_queues", lambda r: r.queues),
    _row("device_status", lambda r: int(r.bank.read_status()), lambda r, value: r.bank.write_status(value, width=1)),
    _row("config_generation", lambda r: r.bank.config_generation() & 0xFF),
    _selector("queue_select"),
    _row("queue_size", _queue("queue_size", lambda slot: slot.size), CommonRegisters.write_queue_size),
    _row("queue_msix_vector", CommonRegisters.queue_vector, CommonRegisters.write_queue_vector),
    _row("queue_enable", _queue("queue_enable", lambda slot: int(slot.enabled)), CommonRegisters.write_queue_enable),
    _row("queue_notify_off", _queue("queue_notify_off", lambda slot: slot.index)),
    _address("queue_desc", "desc"),
    _address("queue_driver", "driver"),
    _address("queue_device", "device"),
    _row("queue_notif_config_data", _queue("queue_notif_config_data", lambda slot: slot.index)),
    # A queue is reset when the write returns, so nobody ever sees the 1.
    _row("queue_reset", lambda _: 0, CommonRegisters.write_queue_reset),
    _row("admin_queue_index", lambda r: r.queues),
    _row("admin_queue_num", lambda r: r.admin_queues),
)
ROWS: Final = {row.name: row for row in _ROWS}
"""The registers by name, in the order of the structure."""

_PLACES: Final = {
    (row.offset + half * 4, size): (row, half)
    for row in _ROWS
    for half, size in ([(0, 8), (0, 4), (1, 4)] if row.size == 8 else [(0, row.size)])
}


def _find(offset: int, length: int) -> tuple[Row, int] | None:
    """The register that an access of `length` bytes at `offset` is, and which half of it."""
    return _PLACES.get((offset, length))

"""The legacy interface in I/O BAR 0 (VIRTIO 1.4, 4.1.4.10): a few registers, and the configuration behind them.

Theory
------
Legacy drivers know 32 feature bits, no FEATURES_OK, one page number per queue and no way to choose a size. With MSI-X
enabled the two vector registers are there and everything behind them moves by 4 bytes. The device configuration
is in the guest's own byte order, which is little endian here, as the machines are that have PCI I/O ports.

Header registers are accessed with their width; the configuration space with any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtio_test.errors import PeerError, StatusViolation
from virtio_test.spec.pci import NO_VECTOR
from virtio_test.transport.bank import RegisterBank
from virtio_test.transport.slot import QueueSlot

from .declaration import Declaration
from .interrupts import Interrupts

__all__ = ["HEADER", "HEADER_MSIX", "LegacyRegisters"]

HEADER: Final = 20
"""Bytes of the header without MSI-X."""
HEADER_MSIX: Final = 24
"""Bytes of the header while MSI-X is enabled."""

_PAGE: Final = 4096


class LegacyRegisters:
    """The legacy registers of one function."""

    def __init__(self, bank: RegisterBank, interrupts: Interrupts, declaration: Declaration) -> None:
        self.bank = bank
        self.interrupts = interrupts
        self._registers = declaration.registers
        self._deaf = declaration.deaf
        self._queues = len(bank.slots) - declaration.layout.admin_queues
        self.queue_select = 0

    def reset(self) -> None:
        """The device was reset."""
        self.queue_select = 0

    @property
    def header(self) -> int:
        """Where the device configuration begins now."""
        return HEADER_MSIX if self.interrupts.msix_enabled else HEADER

    def read(self, offset: int, length: int) -> bytes | None:
        """See `regions.Region`."""
        if offset >= self.header:
            try:
                return self.bank.read_config(offset - self.header, length)
            except PeerError as error:
                self.bank.note(error)
                return b"\xff" * length
        row = self._find(offset, length)
        if row is None:
            return None
        real = row.read(self)
        override = self._registers.get(f"legacy.{row.name}")
        value = real if override is None else override if isinstance(override, int) else override(real)
        return (value & (1 << 8 * length) - 1).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> StatusViolation | None:
        """See `regions.Region`."""
        if offset >= self.header:
            if self.bank.claim("legacy") and "legacy.config" not in self._deaf:
                try:
                    self.bank.write_config(offset - self.header, data)
                except PeerError as error:
                    self.bank.note(error)
            return None
        row = self._find(offset, len(data))
        if row is None or row.write is None:
            rule = "AccessWidth" if row is None else "ReadOnlyRegister"
            message = f"legacy registers written with {len(data)} bytes at {offset:#x}"
            return StatusViolation(rule, "4.1.4.10", message)
        value = int.from_bytes(data, "little")
        reset = row.name == "device_status" and value == 0
        if f"legacy.{row.name}" not in self._deaf and (reset or self.bank.claim("legacy")):
            row.write(self, value)
        return None

    # --- what the rows call ---------------------------------------------------------------------------------

    def selected(self) -> QueueSlot | None:
        """The virtqueue that is selected; None when there is none. Administration virtqueues are not for it."""
        return self.bank.slot(self.queue_select) if self.queue_select < self._queues else None

    def queue_pfn(self) -> int:
        """Page number of the selected virtqueue; 0 while it has no place."""
        slot = self.selected()
        return slot.desc // _PAGE if slot is not None and slot.enabled else 0

    def write_queue_pfn(self, value: int) -> None:
        """Place the selected virtqueue, or take it away."""
        index = self.queue_select if self.queue_select < self._queues else len(self.bank.slots)
        self.bank.place_legacy_queue(index, value * _PAGE, align=_PAGE)

    def queue_size(self) -> int:
        """Size of the selected virtqueue; 0 when there is none."""
        slot = self.selected()
        return 0 if slot is None else slot.size

    def queue_vector(self) -> int:
        """Vector of the selected virtqueue."""
        if self.selected() is None:
            return NO_VECTOR
        return self.interrupts.queue_vectors[self.queue_select]

    def write_queue_vector(self, value: int) -> None:
        """Map the selected virtqueue to a vector."""
        if self.selected() is not None:
            self.interrupts.queue_vectors[self.queue_select] = self.interrupts.valid(value)

    def write_config_vector(self, value: int) -> None:
        """Map the configuration changes to a vector."""
        self.interrupts.config_vector = self.interrupts.valid(value)

    def select_queue(self, value: int) -> None:
        """The other registers are about this virtqueue."""
        self.queue_select = value

    def _find(self, offset: int, length: int) -> _Row | None:
        return _ROWS.get((offset, length))


@dataclass(frozen=True)
class _Row:
    """One register: what it reads, and what a write does; None when it is read-only."""

    name: str
    read: Callable[[LegacyRegisters], int]
    write: Callable[[LegacyRegisters, int], object] | None = None


_ROWS: Final = {
    (0, 4): _Row("device_features", lambda r: r.bank.legacy_features()),
    (4, 4): _Row(
        "driver_features",
        lambda r: r.bank.driver_features(0),
        lambda r, value: r.bank.write_driver_features(0, value),
    ),
    (8, 4): _Row("queue_pfn", LegacyRegisters.queue_pfn, LegacyRegisters.write_queue_pfn),
    (12, 2): _Row("queue_size", LegacyRegisters.queue_size),
    (14, 2): _Row("queue_select", lambda r: r.queue_select, LegacyRegisters.select_queue),
    (16, 2): _Row("queue_notify", lambda _: 0, lambda r, value: r.bank.kick(value)),
    (18, 1): _Row(
        "device_status", lambda r: r.bank.read_status(), lambda r, value: r.bank.write_status(value, width=1)
    ),
    (19, 1): _Row("isr", lambda r: r.interrupts.read_isr()),
    (20, 2): _Row("config_msix_vector", lambda r: r.interrupts.config_vector, LegacyRegisters.write_config_vector),
    (22, 2): _Row("queue_msix_vector", LegacyRegisters.queue_vector, LegacyRegisters.write_queue_vector),
}

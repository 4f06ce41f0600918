"""The smaller structures in the BARs: ISR status, notifications, device configuration, shared memory.

Theory
------
All structures have the same two methods. `read` gives bytes, or None when the access is not defined; `write` gives
None, or the rule that it breaks. `function` turns those into ones, nothing, and a kept violation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from virtio_test.errors import PeerError, QueueViolation, RuleViolation, StatusViolation
from virtio_test.transport.bank import RegisterBank

from .declaration import Declaration, Place
from .interrupts import Interrupts

__all__ = ["DeviceConfig", "IsrStatus", "Notifications", "Ram", "Region", "find_region"]


class Region(Protocol):
    """One structure in a BAR."""

    def read(self, offset: int, length: int) -> bytes | None:
        """One read of `length` bytes; None when it is not defined."""
        ...

    def write(self, offset: int, data: bytes) -> RuleViolation | None:
        """One write; the broken rule, when it is not defined."""
        ...


class IsrStatus:
    """The ISR status (4.1.4.5): its first byte is cleared by being read, in whatever width."""

    def __init__(self, interrupts: Interrupts, declaration: Declaration) -> None:
        self._interrupts = interrupts
        self._override = declaration.registers.get("isr")

    def read(self, offset: int, length: int) -> bytes | None:
        """See `Region.read`."""
        if offset:
            return bytes(length)
        real = self._interrupts.read_isr()
        override = self._override
        value = real if override is None else override if isinstance(override, int) else override(real)
        return (value & 0xFF).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> RuleViolation | None:
        """See `Region.write`: a driver only reads."""
        message = f"ISR status written with {len(data)} bytes at {offset:#x}"
        return StatusViolation("ReadOnlyRegister", "4.1.4.5.1", message)


class DeviceConfig:
    """The device configuration space (4.1.4.6), in any width."""

    def __init__(self, bank: RegisterBank, declaration: Declaration) -> None:
        self._bank = bank
        self._deaf = "config" in declaration.deaf

    def read(self, offset: int, length: int) -> bytes | None:
        """See `Region.read`."""
        try:
            return self._bank.read_config(offset, length)
        except PeerError as error:
            self._bank.note(error)
            return b"\xff" * length

    def write(self, offset: int, data: bytes) -> RuleViolation | None:
        """See `Region.write`."""
        if self._bank.claim("modern") and not self._deaf:
            try:
                self._bank.write_config(offset, data)
            except PeerError as error:
                self._bank.note(error)
        return None


class Notifications:
    """The notification structure (4.1.4.4 and 4.1.5.2).

    With a multiplier the place says which queue is meant, and the value is only compared; without one all queues
    share a place and the value says it. The value is the queue's index, or what the queue's
    `queue_notif_config_data` shows; NOTIFICATION_DATA adds the ring position, which the ring itself says better.
    """

    def __init__(self, bank: RegisterBank, declaration: Declaration) -> None:
        self._bank = bank
        self._multiplier = declaration.layout.multiplier
        self._data = declaration.registers.get("queue_notif_config_data")
        self._deaf = "notify" in declaration.deaf

    def read(self, offset: int, length: int) -> bytes | None:  # noqa: ARG002 - all of it
        """See `Region.read`: there is nothing to be read."""
        return None

    def write(self, offset: int, data: bytes) -> RuleViolation | None:
        """See `Region.write`."""
        wanted = 4 if "NOTIFICATION_DATA" in self._bank.accepted else 2
        if len(data) != wanted:
            return _odd(f"{len(data)} bytes at {offset:#x}, where it takes {wanted}")
        value = int.from_bytes(data[:2], "little")
        meant = next((each.index for each in self._bank.slots if self._value(each.index) == value), None)
        if self._multiplier:
            index, odd = divmod(offset, self._multiplier)
            if odd or index >= len(self._bank.slots):
                return _odd(f"{value:#x} at {offset:#x}, which is no queue's place")
        elif offset or meant is None:
            return _odd(f"{value:#x} at {offset:#x}, which is no queue's value")
        else:
            index = meant
        if not self._bank.claim("modern"):
            return None
        if index != meant:
            message = f"the value is {value:#x}, the place is queue {index}'s"
            self._bank.note(QueueViolation("NotificationValue", "4.1.5.2.1", message, queue=index))
        if not self._bank.status.driver_ok and not self._bank.suspension.active:
            # It is looked at all the same once the device is live (3.1.1).
            self._bank.note(StatusViolation("NotifiedEarly", "3.1.1", f"queue {index} notified before DRIVER_OK"))
        if not self._deaf:
            self._bank.kick(index)
        return None

    def _value(self, index: int) -> int:
        if "NOTIF_CONFIG_DATA" not in self._bank.accepted or self._data is None:
            return index
        return (self._data if isinstance(self._data, int) else self._data(index)) & 0xFFFF


def _odd(what: str) -> RuleViolation:
    return StatusViolation("BadNotification", "4.1.5.2.1", f"notified with {what}")


class Ram:
    """Plain memory: a shared memory region (4.1.4.7)."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, length: int) -> bytes | None:
        """See `Region.read`."""
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> RuleViolation | None:
        """See `Region.write`."""
        self.data[offset : offset + len(data)] = data
        return None


def find_region(
    regions: Sequence[tuple[Place, Region]], bar: int, offset: int, length: int
) -> tuple[Region, int] | None:
    """The structure that holds the whole access, and the offset in it."""
    for place, region in regions:
        if place.bar == bar and place.offset <= offset and offset + length <= place.offset + place.length:
            return region, offset - place.offset
    return None

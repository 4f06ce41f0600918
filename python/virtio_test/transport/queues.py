"""`QueueRegisters`: what a driver writes for its virtqueues before they run, of every register transport.

Theory
------
A queue is chosen in parts: a size, three addresses, then it is enabled; or by one page number, at the legacy interface.
Values that cannot be a queue are not taken over, and the registers of an enabled queue are frozen (rows Q01 to Q08 of
the robustness catalogue). `bank` is what becomes of an enabled one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Literal

from virtio_test._core import DeviceQueue, RingLayout
from virtio_test.errors import InvalidArgument, QueueViolation, StateError
from virtio_test.features import FeatureSet

from .slot import Area, QueueSlot

__all__ = ["QueueRegisters"]

_WORD: Final = 0xFFFF_FFFF


class QueueRegisters(ABC):
    """The registers of the virtqueues, as a part of a `RegisterBank`."""

    _slots: list[QueueSlot]
    _accepted: FeatureSet

    @abstractmethod
    def note(self, error: Exception) -> None:
        """See `RegisterBank.note`."""

    @abstractmethod
    def enable_queue(self, index: int) -> None:
        """See `RegisterBank.enable_queue`."""

    @abstractmethod
    def disable_queue(self, index: int) -> None:
        """See `RegisterBank.disable_queue`."""

    @property
    def slots(self) -> Sequence[QueueSlot]:
        """The virtqueues, by index; to be read, and changed by the methods below."""
        return self._slots

    def slot(self, index: int) -> QueueSlot | None:
        """The virtqueue that a driver has selected; None when there is none."""
        return self._slots[index] if 0 <= index < len(self._slots) else None

    def queue(self, index: int) -> DeviceQueue:
        """The device end of an enabled queue.

        Raises:
            StateError: it is not enabled.
        """
        slot = self.slot(index)
        if slot is None or slot.queue is None:
            raise StateError(
                f"queue {index} is not enabled; enabled are {[each.index for each in self._slots if each.enabled]}"
            )
        return slot.queue

    def write_queue_size(self, index: int, size: int) -> None:
        """The driver chooses a size; one that cannot be is not taken over (Q01 to Q04)."""
        slot = self._writable(index, "size")
        if slot is None:
            return
        packed = "RING_PACKED" in self._accepted
        if not 1 <= size <= slot.max_size or (not packed and size & (size - 1)):
            limit = f"1 to {slot.max_size}" + ("" if packed else ", a power of two")
            self._note_queue("BadQueueSize", "2.6", f"size {size}, where it can be {limit}", index)
        else:
            slot.size = size

    def write_queue_address(
        self, index: int, area: Area, value: int, *, half: Literal["low", "high"] | None = None
    ) -> None:
        """The driver gives an address, whole or one half of 32 bits of it."""
        slot = self._writable(index, area)
        if slot is None:
            return
        if half == "low":
            value = getattr(slot, area) & ~_WORD | value & _WORD
        elif half == "high":
            value = getattr(slot, area) & _WORD | (value & _WORD) << 32
        setattr(slot, area, value)

    def place_legacy_queue(self, index: int, address: int, *, align: int = 4096) -> None:
        """A legacy driver places its queue at `address` and so enables it; 0 takes it away (4.1.5.1.3.1, 4.2.4)."""
        slot = self.slot(index)
        if slot is None:
            self._note_queue("NoSuchQueue", "4.1.5.1.3.1", f"placed, but there are {len(self._slots)} queues", index)
        elif address == 0:
            self.disable_queue(index)
        elif slot.enabled:
            self._note_queue("EnabledQueueWritten", "2.6", "placed again while it is in use", index)
        else:
            try:
                layout = RingLayout.legacy(slot.size, address, align=align)
            except InvalidArgument as error:
                self._note_queue("BadQueueAddress", "2.7.2", str(error), index)
                return
            slot.desc, slot.driver, slot.device = layout.desc, layout.driver, layout.device
            self.enable_queue(index)

    def _writable(self, index: int, what: str) -> QueueSlot | None:
        slot = self.slot(index)
        if slot is None:
            self._note_queue("NoSuchQueue", "2.6", f"{what} written, but there are {len(self._slots)} queues", index)
        elif slot.enabled:
            self._note_queue("EnabledQueueWritten", "2.6", f"{what} written while the queue is enabled", index)
        else:
            return slot
        return None

    def _note_queue(self, rule: str, clause: str, message: str, index: int) -> None:
        self.note(QueueViolation(rule, clause, message, queue=index))

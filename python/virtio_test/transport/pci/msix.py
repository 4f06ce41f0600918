"""The MSI-X table and its pending bits (PCI Local Bus 3.0, 6.8.2).

Theory
------
A vector that is to be sent while it cannot be, sets its pending bit; any number of times is once. The bit goes out
as one message as soon as the vector can be sent: unmasked by its own bit and by the function's, MSI-X enabled, and
the function allowed to write to memory, which is what a message is. With MSI-X disabled nothing is kept: the
function then speaks by its line.

Table and bits are accessed with 4 or 8 bytes, aligned; PCI leaves everything else undefined: it reads as ones and
writes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from virtio_test.errors import InvalidArgument, StatusViolation
from virtio_test.spec.pci import MSIX_MAX_VECTORS

__all__ = ["MsixTable", "PendingBits"]

_ENTRY: Final = 16
_CONTROL: Final = 12
_MASKED: Final = 1


class MsixTable:
    """The table, as registers, and the sending of its vectors.

    Args:
        vectors: entries, 1 to 2048.
        can_send: whether the function may write to memory now.
        send: takes vector, address and data of a message.

    Attributes:
        enabled: the enable bit of message control.
        masked: the function mask of message control.
        external: someone else keeps table and masks: no vector is masked here.

    Raises:
        InvalidArgument: a number of entries that MSI-X cannot have.
    """

    def __init__(self, vectors: int, *, can_send: Callable[[], bool], send: Callable[[int, int, int], object]) -> None:
        if not 1 <= vectors <= MSIX_MAX_VECTORS:
            raise InvalidArgument(f"an MSI-X table has 1 to {MSIX_MAX_VECTORS} vectors, not {vectors}")
        self.vectors = vectors
        self.enabled = False
        self.masked = False
        self.external = False
        self._can_send = can_send
        self._send = send
        self._table = bytearray(_ENTRY * vectors)
        self._pending: set[int] = set()
        self.power_on()

    def power_on(self) -> None:
        """Every vector masked, without address and data; nothing pending, MSI-X disabled."""
        self._table[:] = (b"\0" * _CONTROL + b"\1\0\0\0") * self.vectors
        self.enabled = self.masked = False
        self.forget()

    def forget(self) -> None:
        """Nothing is pending any more."""
        self._pending.clear()

    @property
    def entries(self) -> bytes:
        """The table as bytes."""
        return bytes(self._table)

    def possible(self, entries: bytes) -> bool:
        """Whether a table of these bytes can be: only the mask bit of each vector control is there."""
        controls = (entries[at : at + 4] for at in range(_CONTROL, len(entries), _ENTRY))
        return all(each in (b"\0\0\0\0", b"\1\0\0\0") for each in controls)

    def take_over(self, entries: bytes, pending: set[int]) -> None:
        """The table of a saved state, as long as this one, and its pending bits; nothing is sent yet."""
        self._table[:] = entries
        self._pending = set(pending)

    @property
    def pending(self) -> list[int]:
        """The vectors with their pending bit set."""
        return sorted(self._pending)

    def control(self, *, enabled: bool, masked: bool) -> None:
        """Message control has changed."""
        self.enabled, self.masked = enabled, masked
        if not enabled:
            self.forget()
        self.flush()

    def entry(self, vector: int) -> tuple[int, int, bool]:
        """Address, data and mask bit of a vector."""
        low, data, control = struct.unpack_from("<QII", self._table, _ENTRY * vector)
        return low, data, bool(control & _MASKED)

    def notify(self, vector: int) -> None:
        """Send `vector`, or set its pending bit; without effect for one that is not there, or with MSI-X disabled."""
        if not self.enabled or not 0 <= vector < self.vectors:
            return
        address, data, masked = self.entry(vector)
        if self._can_send() and (self.external or not (masked or self.masked)):
            self._pending.discard(vector)
            self._send(vector, address, data)
        else:
            self._pending.add(vector)

    def flush(self) -> None:
        """Something has changed: send what is pending and can be sent."""
        for vector in self.pending:
            self.notify(vector)

    def read(self, offset: int, length: int) -> bytes | None:
        """A read of the table; None when it is not defined."""
        return bytes(self._table[offset : offset + length]) if _defined(offset, length) else None

    def write(self, offset: int, data: bytes) -> StatusViolation | None:
        """A write to the table; the broken rule, when it is not defined."""
        if not _defined(offset, len(data)):
            message = f"MSI-X table written with {len(data)} bytes at {offset:#x}"
            return StatusViolation("AccessWidth", "4.1.1", message)
        self._table[offset : offset + len(data)] = data
        # Only the mask bit of vector control is there.
        control = offset // _ENTRY * _ENTRY + _CONTROL
        self._table[control : control + 4] = (self._table[control] & _MASKED).to_bytes(4, "little")
        self.flush()
        return None


class PendingBits:
    """The pending bit array of a table, as registers that software only reads."""

    def __init__(self, table: MsixTable) -> None:
        self._of = table

    def read(self, offset: int, length: int) -> bytes | None:
        """A read of the bits; None when it is not defined."""
        if not _defined(offset, length):
            return None
        bits = sum(1 << vector for vector in self._of.pending)
        return (bits >> 8 * offset & (1 << 8 * length) - 1).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> StatusViolation | None:
        """Software writes nothing here; the broken rule."""
        message = f"MSI-X pending bits written with {len(data)} bytes at {offset:#x}"
        return StatusViolation("ReadOnlyRegister", "4.1.1", message)


def _defined(offset: int, length: int) -> bool:
    return length in (4, 8) and not offset % length

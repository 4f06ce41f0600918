"""The client's half of interrupts: eventfds, and the MSI-X table that is the client's own.

Theory
------
A vfio device does not look at its MSI-X table: the client keeps it, and a masked vector's message waits here until
the vector is unmasked. As real clients do, this one listens to INTx while MSI-X is off and to the vectors while it is
on, and switches when the driver writes the enable bit.

An eventfd of INTx stands for a line that has masked itself. After the handler has run the client unmasks it, and a
line that is still asserted fires again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from virtio_test._core import Notifier
from virtio_test.loop import OwnerLoop
from virtio_test.spec import pcibus

from .messages import IrqIndex, IrqSet

__all__ = ["MAX_VECTORS", "ClientInterrupts", "MsixPlace"]

MAX_VECTORS: Final = 256
"""MSI-X vectors that are listened to; a driver shares them where the device has more."""

_MAX_CAPABILITIES: Final = 48


class MsixPlace:
    """Where a function says that its MSI-X capability and table are.

    Attributes:
        position: of the capability in configuration space.
        size: entries of the table.
        bar: which BAR the table is in.
        offset: where in it.
    """

    def __init__(self, position: int, size: int, bar: int, offset: int) -> None:
        self.position = position
        self.size = size
        self.bar = bar
        self.offset = offset

    def __repr__(self) -> str:
        return f"MsixPlace({self.position:#x}, {self.size}, {self.bar}, {self.offset:#x})"

    @classmethod
    def find(cls, read: Callable[[int, int], int]) -> MsixPlace | None:
        """Walk the capability list of untrusted configuration space."""
        if not read(0x06, 2) & pcibus.STATUS_CAPABILITIES:
            return None
        position = read(0x34, 1) & ~3
        for _ in range(_MAX_CAPABILITIES):
            if not pcibus.HEADER_SIZE <= position <= pcibus.CONFIG_SIZE - pcibus.MSIX_CAP_SIZE:
                return None
            if read(position, 1) == pcibus.CAP_ID_MSIX:
                table = read(position + pcibus.MSIX_TABLE, 4)
                size = (read(position + pcibus.MSIX_CONTROL, 2) & pcibus.MSIX_SIZE_MASK) + 1
                return cls(position, size, table & 7, table & ~7)
            position = read(position + 1, 1) & ~3
        return None


class ClientInterrupts:
    """The interrupts of one device, as its client hears them.

    Args:
        loop: where they arrive.
        place: the MSI-X table, if there is one.
        set_irqs: sends DEVICE_SET_IRQS: index, flags, start, count, fds.
        counts: how many interrupts of each type the device has.
    """

    def __init__(
        self,
        loop: OwnerLoop,
        place: MsixPlace | None,
        *,
        set_irqs: Callable[[int, IrqSet, int, int, list[int]], object],
        counts: dict[int, int],
    ) -> None:
        self._loop = loop
        self._place = place
        self._set_irqs = set_irqs
        # A function has one line, and each vector is an fd of this process: what the device says is no reason for more.
        self._lines = min(1, counts.get(IrqIndex.INTX, 0))
        self._vectors = 0 if place is None else min(place.size, counts.get(IrqIndex.MSIX, 0), MAX_VECTORS)
        self._message: Callable[[int], object] | None = None
        self._line: Callable[[], object] | None = None
        self._fds: list[Notifier] = []
        self._shadow = bytearray()
        self._masked_all = False
        self._pending: set[int] = set()
        self._on = False
        self.forget()

    def __repr__(self) -> str:
        return f"<ClientInterrupts: {'MSI-X' if self._on else 'INTx'}, {len(self._fds)} eventfds>"

    @property
    def vectors(self) -> int:
        """MSI-X vectors that can be used."""
        return self._vectors

    def forget(self) -> None:
        """The function was reset: every vector is masked, MSI-X is off."""
        size = 0 if self._place is None else self._place.size
        self._shadow = bytearray((b"\0" * 12 + b"\1\0\0\0") * size)
        self._masked_all = False
        self._pending.clear()

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        """See `PciAccess.listen`."""
        self._message = message
        self._line = line
        self.close()
        self._open()

    def control(self, value: int) -> None:
        """The MSI-X message control word reads so after a write to it, or a reset."""
        self._masked_all = bool(value & pcibus.MSIX_MASK_ALL)
        if bool(value & pcibus.MSIX_ENABLE) != self._on:
            if self._message is not None:
                self._set_irqs(self._index, IrqSet.DATA_NONE | IrqSet.TRIGGER, 0, 0, [])
            self.close()
            self._on = not self._on
            if self._message is not None:
                self._open()
        self._deliver()

    @property
    def _index(self) -> int:
        return IrqIndex.MSIX if self._on else IrqIndex.INTX

    def written(self, bar: int, offset: int, data: bytes) -> None:
        """A BAR was written; the table may lie there."""
        if self._place is None or bar != self._place.bar:
            return
        at = offset - self._place.offset
        if 0 <= at <= len(self._shadow) - len(data):
            self._shadow[at : at + len(data)] = data
            self._deliver()

    def _open(self) -> None:
        count = self._vectors if self._on else self._lines
        self._fds = [Notifier.eventfd() for _ in range(count)]
        for at, each in enumerate(self._fds):
            self._loop.add_reader(each.fileno(), partial(self._fired, at, each))
        if self._fds:
            fds = [each.fileno() for each in self._fds]
            self._set_irqs(self._index, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 0, count, fds)

    def _fired(self, at: int, notifier: Notifier) -> None:
        if not notifier.drain():
            return
        if self._on:
            self._pending.add(at)
            self._deliver_one(at)
        elif self._line is not None:
            self._line()
            # The handler may have switched MSI-X on, or the device may have gone.
            if not self._on and self._fds:
                self._set_irqs(IrqIndex.INTX, IrqSet.DATA_NONE | IrqSet.UNMASK, 0, 1, [])

    def _deliver(self) -> None:
        """What was pending and is unmasked now comes in a turn of its own."""
        for vector in sorted(self._pending):
            if not self._masked(vector):
                self._loop.pend((self, vector), partial(self._deliver_one, vector))

    def _deliver_one(self, vector: int) -> None:
        if self._message is not None and vector in self._pending and not self._masked(vector):
            self._pending.discard(vector)
            self._message(vector)

    def _masked(self, vector: int) -> bool:
        return self._masked_all or bool(self._shadow[16 * vector + 12] & pcibus.MSIX_ENTRY_MASKED)

    def close(self) -> None:
        """Close the eventfds."""
        for each in self._fds:
            self._loop.remove_reader(each.fileno())
        self._fds.clear()

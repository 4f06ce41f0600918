"""`Interrupts`: which interrupt stands for which event, and the way back from the interrupt to the event.

Theory
------
With MSI-X the configuration change has vector 0 and the queues share the others, one each where there are enough.
With one vector all events share it (4.1.5.1.2.2). The device may refuse a mapping, and says so by reading
back NO_VECTOR: the queue then goes to vector 0 as well (4.1.5.1.2.2 allows fewer vectors); if that is refused
too, the device is unusable. With the line the ISR status tells the events apart, and reading it lowers the line.

An interrupt says only that something may have happened, so a spurious one costs a look and nothing else. A line that
is never lowered would keep a loop busy at one instant of a virtual clock for ever: there the looks are counted. (Real
time goes on, and whoever waits has a bound.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test.errors import StatusViolation
from virtio_test.spec.pci import ISR_CONFIG, ISR_QUEUE, NO_VECTOR

from .msix import MsixTable
from .probe import PciFunction

__all__ = ["MAX_SPURIOUS", "Interrupts"]

MAX_SPURIOUS: Final = 1000
"""Interrupts by the line at one instant of the clock that have no cause, or whose cause cannot be cleared."""

_CLAUSE: Final = "4.1.5.1.2.1"
_LOOKS: Final = 16


class Interrupts:
    """The interrupts of one device.

    Args:
        function: whose they are.
        table: the MSI-X table; None for the line.
        read_isr: reads the ISR status, which clears it.
    """

    def __init__(self, function: PciFunction, table: MsixTable | None, read_isr: Callable[[], int]) -> None:
        self._function = function
        self._table = table
        self._read_isr = read_isr
        self._config: int | None = None
        self._queues: dict[int, int] = {}
        self._instant = -1
        self._streak = 0

    def __repr__(self) -> str:
        return f"<Interrupts {self.kind}, queues {self._queues}>"

    @property
    def kind(self) -> str:
        """``msix`` or ``intx``."""
        return "intx" if self._table is None else "msix"

    @property
    def vectors(self) -> dict[int, int]:
        """The vector of each queue that has one."""
        return dict(self._queues)

    def forget(self) -> None:
        """The device was reset: nothing is mapped any more (4.1.5.1.2.1)."""
        self._config = None
        self._queues.clear()

    def forget_queue(self, index: int) -> None:
        """The same for one queue."""
        self._queues.pop(index, None)

    def map_config(self, write: Callable[[int], None], read: Callable[[], int]) -> None:
        """Map the configuration change, once after each reset.

        Args:
            write: writes ``config_msix_vector``.
            read: reads it.

        Raises:
            StatusViolation: `VectorRefused`, `VectorMismatch` (4.1.5.1.2.1).
        """
        if self._table is not None and self._config is None:
            self._config = self._map([0], write, read, "the configuration change", None)

    def map_queue(self, index: int, write: Callable[[int], None], read: Callable[[], int]) -> None:
        """Map the selected queue; as `map_config`, for ``queue_msix_vector``."""
        if self._table is None:
            self._queues[index] = 0
            return
        size = wanted = 0
        # Where the bus has fewer messages than the table has entries, the table is as small as the bus.
        while size != self._table.size:
            size = self._table.size
            wanted = 1 + index % (size - 1) if size > 1 else 0
            self._table.program(wanted)
        choices = [wanted] if wanted == 0 else [wanted, 0]
        self._queues[index] = self._map(choices, write, read, f"queue {index}", index)

    def _map(
        self, choices: list[int], write: Callable[[int], None], read: Callable[[], int], what: str, queue: int | None
    ) -> int:
        assert self._table is not None
        for vector in choices:
            if not self._table.program(vector):
                continue
            write(vector)
            back = read()
            if back == vector:
                return vector
            if back != NO_VECTOR:
                text = f"vector {vector} was written for {what} and {back:#x} reads back"
                raise StatusViolation("VectorMismatch", _CLAUSE, text, queue=queue)
        raise StatusViolation(
            "VectorRefused", _CLAUSE, f"{what} cannot be mapped to any of the vectors {choices}", queue=queue
        )

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """Take the function's interrupts from now on, and tell what they stand for."""

        def message(vector: int) -> None:
            if vector == self._config:
                config_changed()
            for index in [index for index, mapped in self._queues.items() if mapped == vector]:
                call(index)

        def line() -> None:
            if self._table is not None:
                return
            isr = self._take_isr()
            if isr & ISR_CONFIG:
                config_changed()
            if isr & ISR_QUEUE:
                for index in list(self._queues):
                    call(index)

        self._function.access.listen(message=message, line=line)

    def _take_isr(self) -> int:
        """Read the ISR status, and find out whether the line can ever be lowered when it was not for long.

        Raises:
            StatusViolation: `LineNeverLowered` (4.1.4.5.1).
        """
        now = self._function.access.loop.clock.now_ns()
        self._streak = self._streak + 1 if now == self._instant else 1
        self._instant = now
        isr = self._read_isr()
        if self._streak % MAX_SPURIOUS == 0:
            again = [self._read_isr() for _ in range(_LOOKS)]
            if isr == 0 or all(again):
                text = f"the line stays asserted, with ISR status {isr:#x} after {self._streak} reads"
                raise StatusViolation("LineNeverLowered", "4.1.4.5.1", text)
            for each in again:
                isr |= each
        return isr

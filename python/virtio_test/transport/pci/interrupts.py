"""How the function interrupts its driver: MSI-X vectors, or the ISR status and INTA# (VIRTIO 1.4, 4.1.5.3 and 4.1.5.4).

Theory
------
With MSI-X enabled an event goes to the vector that the driver has mapped it to, and nowhere without one. Without
MSI-X it sets a bit of the ISR status, and the interrupt is the level of a line: asserted while any bit is set,
released when the driver reads the byte, which clears it (4.1.4.5). The bit comes first, then the line.

A configuration change sets its ISR bit in both cases: 4.1.4.5.1 asks for that without a condition.
Vectors may be changed at any time, of an enabled queue too: the next interrupt goes to the new one. A vector that
does not exist is no vector (4.1.5.1.2.1).
"""

from __future__ import annotations

from collections.abc import Callable

from virtio_test.spec.pci import ISR_CONFIG, ISR_QUEUE, NO_VECTOR

from .configspace import INTX_DISABLE, ConfigBytes
from .interface import InterruptSink
from .msix import MsixTable

__all__ = ["Interrupts"]


class Interrupts:
    """The interrupts of one function.

    Args:
        config: its configuration space, for command and status.
        queues: how many virtqueues it has.
        pin: whether it has a line.
        awake: whether it is in D0.
        bus_master: whether it may write to memory.
        vectors: entries of the MSI-X table; 0 without MSI-X.

    Attributes:
        isr: the ISR status.
        config_vector: vector of the configuration change notifications.
        queue_vectors: vector of each virtqueue.
        table: the MSI-X table, or None.
        sink: where interrupts go, or None.
    """

    def __init__(
        self,
        config: ConfigBytes,
        *,
        queues: int,
        pin: bool,
        awake: Callable[[], bool],
        bus_master: Callable[[], bool],
        vectors: int,
    ) -> None:
        self.isr = 0
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * queues
        self.sink: InterruptSink | None = None
        self.table = MsixTable(vectors, can_send=bus_master, send=self._send) if vectors else None
        self._config = config
        self._pin = pin
        self._awake = awake
        self._asserted = False

    @property
    def msix_enabled(self) -> bool:
        """Whether MSI-X is there and enabled."""
        return self.table is not None and self.table.enabled

    @property
    def asserted(self) -> bool:
        """The level of the line."""
        return self._asserted

    def call(self, queue_index: int) -> None:
        """A used buffer notification."""
        if self.table is not None and self.table.enabled:
            self.table.notify(self.queue_vectors[queue_index])
        else:
            self.isr |= ISR_QUEUE
            self.update()

    def config_changed(self) -> None:
        """A configuration change notification."""
        self.isr |= ISR_CONFIG
        if self.table is not None and self.table.enabled:
            self.table.notify(self.config_vector)
        else:
            self.update()

    def read_isr(self) -> int:
        """The driver reads the ISR status: it is 0 afterwards, and the line is released."""
        value, self.isr = self.isr, 0
        self.update()
        return value

    def valid(self, vector: int) -> int:
        """`vector`, or NO_VECTOR when it is not there."""
        return vector if self.table is not None and vector < self.table.vectors else NO_VECTOR

    def reset(self) -> None:
        """The device was reset: no event has a vector, nothing is to be said any more."""
        self.isr = 0
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.queue_vectors)
        if self.table is not None:
            self.table.forget()
        self.update()

    def update(self) -> None:
        """Bring interrupt status and line to what ISR status, MSI-X, command register and power state say."""
        pending = self.isr != 0 and not self.msix_enabled
        self._config.set_interrupt_status(pending=pending)
        level = pending and self._pin and self._awake() and not self._config.command & INTX_DISABLE
        if level != self._asserted:
            self._asserted = level
            if self.sink is not None:
                self.sink.line(level)

    def _send(self, vector: int, address: int, data: int) -> None:
        if self.sink is not None:
            self.sink.message(vector, address, data)

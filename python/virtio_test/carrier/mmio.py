"""`MmioLoopback`: the page of a `VirtioMmio` and its driver in one process, over one guest memory.

Theory
------
Accesses are function calls; the interrupt is a turn of the owner loop. Its level is sampled when that turn comes: an
interrupt that was taken back before is none. While the line stays asserted the driver is called again, each time after
a pause twice as long as the last (up to a millisecond), so a line that nobody can silence stops neither the other
turns nor the time of a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory
from virtio_test.clock import Timer
from virtio_test.errors import InvalidArgument
from virtio_test.loop import OwnerLoop
from virtio_test.transport.mmio import VirtioMmio

__all__ = ["MmioLoopback"]

_FIRST_PAUSE: Final = 10e-6
_LONGEST_PAUSE: Final = 1e-3


class MmioLoopback:
    """`MmioAccess` to a device in this process.

    Args:
        mmio: the device; its `interrupt` is taken.
    """

    def __init__(self, mmio: VirtioMmio) -> None:
        self.mmio = mmio
        self._line: Callable[[], object] = lambda: None
        self._again: Timer | None = None
        self._pause = _FIRST_PAUSE
        mmio.interrupt = self._level
        if mmio.asserted:
            self._level(True)  # noqa: FBT003 - the level that it has

    def __repr__(self) -> str:
        return f"MmioLoopback({self.mmio!r})"

    @property
    def loop(self) -> OwnerLoop:
        """See `MmioAccess.loop`."""
        return self.mmio.loop

    @property
    def memory(self) -> GuestMemory:
        """See `MmioAccess.memory`."""
        return self.mmio.memory

    def read(self, offset: int, size: int) -> int:
        """See `MmioAccess.read`."""
        _check(size)
        return int.from_bytes(self.mmio.read(offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """See `MmioAccess.write`."""
        _check(size)
        if not 0 <= value < 1 << 8 * size:
            raise InvalidArgument(f"{value:#x} does not fit {size} bytes")
        self.mmio.write(offset, value.to_bytes(size, "little"))

    def listen(self, *, line: Callable[[], object]) -> None:
        """See `MmioAccess.listen`."""
        self._line = line

    def _level(self, asserted: bool) -> None:  # noqa: FBT001 - a level has no better name
        if self._again is not None:
            self._again.stop()
            self._again = None
        if asserted:
            self._pause = _FIRST_PAUSE
            self.loop.pend((self, "line"), self._interrupt)

    def _interrupt(self) -> None:
        self._again = None
        if not self.mmio.asserted:
            return
        try:
            self._line()
        finally:
            if self.mmio.asserted and self._again is None:
                self._again = Timer(self.loop.clock, self._interrupt, first_after=self._pause)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def _check(size: int) -> None:
    if size not in (1, 2, 4, 8):
        raise InvalidArgument(f"an access has 1, 2, 4 or 8 bytes, not {size}")

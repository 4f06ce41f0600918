"""`QtestMmio`: a virtio-mmio transport of QEMU's microvm (`MmioAccess`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument
from virtio_test.loop import OwnerLoop

if TYPE_CHECKING:
    from .machine import QtestMachine

__all__ = ["QtestMmio"]

_BASE: Final = 0xFEB0_0000
_SIZE: Final = 512
_COUNT: Final = 8
_FIRST_LINE: Final = 16
_WORD: Final = 0xFFFF_FFFF


class QtestMmio:
    """One transport; `QtestMachine.mmio` makes it.

    Args:
        machine: the machine.
        index: the number of its bus, 0 to 7.

    Raises:
        InvalidArgument: there is no such transport.
    """

    def __init__(self, machine: QtestMachine, index: int) -> None:
        if not 0 <= index < _COUNT:
            raise InvalidArgument(f"transport {index}; microvm has 0 to {_COUNT - 1}")
        self._machine = machine
        self._index = index
        self._base = _BASE + index * _SIZE

    def __repr__(self) -> str:
        return f"<QtestMmio {self._index} at {self._base:#x}>"

    @property
    def loop(self) -> OwnerLoop:
        """See `MmioAccess.loop`."""
        return self._machine.loop

    @property
    def memory(self) -> GuestMemory:
        """See `MmioAccess.memory`."""
        return self._machine.memory

    def read(self, offset: int, size: int) -> int:
        """See `MmioAccess.read`."""
        return self._machine.qtest.read_memory(self._at(offset, size), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """See `MmioAccess.write`."""
        self._machine.qtest.write_memory(self._at(offset, size), size, value)

    def _at(self, offset: int, size: int) -> int:
        if offset < 0 or offset + size > _SIZE:
            raise InvalidArgument(f"{size} bytes at {offset:#x} of a transport of {_SIZE} bytes")
        return self._base + offset

    def listen(self, *, line: Callable[[], object]) -> None:
        """See `MmioAccess.listen`."""
        self._machine.watch_line(self, lambda: self._machine.raised(_FIRST_LINE + self._index), line)

    def close(self) -> None:
        """Nobody listens any more."""
        self._machine.leave_line(self)

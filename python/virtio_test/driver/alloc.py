"""`Arena`: a small allocator for a driver's rings and buffers in guest memory.

First fit over a sorted list of holes that are merged when a piece comes back. It keeps its books outside guest
memory, where the device cannot reach them.
"""

from __future__ import annotations

from bisect import bisect_left

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument, StateError

__all__ = ["Arena"]


class Arena:
    """The bytes from `address` to `address + size` of guest memory, given out piece by piece.

    Args:
        memory: the guest memory.
        address: first byte; the start of the largest writable region when None.
        size: bytes; up to the end of that region when None.

    Raises:
        InvalidArgument: the range is empty or not mapped.
    """

    def __init__(self, memory: GuestMemory, *, address: int | None = None, size: int | None = None) -> None:
        regions = sorted((each for each in memory.regions if each.writable), key=lambda each: each.size)
        if address is None:
            if not regions:
                raise InvalidArgument("the guest memory has no writable region for a driver's rings and buffers")
            address = regions[-1].address
        if size is None:
            ends = [each.address + each.size for each in regions if each.address <= address < each.address + each.size]
            size = ends[0] - address if ends else 0
        if size <= 0 or not memory.is_mapped(address, size):
            raise InvalidArgument(f"{size} bytes at {address:#x} are not all mapped guest memory")
        self.memory = memory
        self.address = address
        self.size = size
        self._holes: list[tuple[int, int]] = [(address, size)]
        self._taken: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Arena of {self.size} bytes at {self.address:#x}, {self.used} used in {len(self._taken)} pieces>"

    @property
    def used(self) -> int:
        """Bytes that are given out."""
        return sum(self._taken.values())

    def allocate(self, size: int, *, align: int = 16) -> int:
        """Address of `size` bytes, a multiple of `align`; their content is whatever was there.

        Raises:
            InvalidArgument: a size below 1, or an alignment that is no power of two.
            StateError: no hole is large enough.
        """
        if size < 1 or align < 1 or align & (align - 1):
            raise InvalidArgument(f"{size} bytes aligned to {align}: a size from 1 and a power of two are wanted")
        for place, (start, length) in enumerate(self._holes):
            begin = (start + align - 1) & -align
            if begin + size <= start + length:
                rest = [(start, begin - start), (begin + size, start + length - begin - size)]
                self._holes[place : place + 1] = [hole for hole in rest if hole[1]]
                self._taken[begin] = size
                return begin
        raise StateError(f"no {size} bytes are left in {self!r}")

    def free(self, address: int) -> None:
        """Take a piece back.

        Raises:
            InvalidArgument: nothing was given out at `address`.
        """
        size = self._taken.pop(address, None)
        if size is None:
            raise InvalidArgument(f"nothing was allocated at {address:#x}")
        place = bisect_left(self._holes, (address, 0))
        start, end = address, address + size
        if place < len(self._holes) and self._holes[place][0] == end:
            end += self._holes.pop(place)[1]
        if place and sum(self._holes[place - 1]) == start:
            place -= 1
            start = self._holes.pop(place)[0]
        self._holes.insert(place, (start, end - start))

"""The memory that a front-end shares: its table of regions, checked before anything is mapped.

Theory
------
Every region has two addresses: the guest's, in which descriptors speak, and the front-end's own ("user
address"), in which SET_VRING_ADDR speaks. The core maps by guest address; this table holds the other view and
translates it. A new table is judged whole first: what is refused has changed nothing.

What queues see is the same memory, or, with ACCESS_PLATFORM, the parts of it that the device IOTLB shows (`iotlb`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument

from .codec import OwnedFd
from .iotlb import Cache
from .payloads import MemoryRegion
from .rules import violation

__all__ = ["MAX_SLOTS", "SharedMemory"]

MAX_SLOTS: Final = 509
"""Regions that the core maps at once, and what GET_MAX_MEM_SLOTS answers."""

_END: Final = 1 << 64


class SharedMemory:
    """The memory table of one connection, over the guest memory that lives as long as the server.

    Args:
        memory: what queues see.

    Attributes:
        shared: the regions, by guest address.
        regions: as the messages had them.
        cache: the device IOTLB; None where queues see all that is shared.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.shared = GuestMemory()
        self.regions: tuple[MemoryRegion, ...] = ()
        self.cache: Cache | None = None

    def __repr__(self) -> str:
        return f"<SharedMemory of {len(self.regions)} regions>"

    def check_table(self, regions: Sequence[MemoryRegion], fds: Sequence[OwnedFd]) -> None:
        """Judge a whole new table.

        Raises:
            MessageError: RegionCount, or what is wrong with a region; nothing was changed.
        """
        if not regions:
            raise violation("RegionCount", "a memory table without regions")
        for at, (region, fd) in enumerate(zip(regions, fds, strict=True)):
            _check_region(region, fd)
            _check_overlap(region, regions[:at])

    def check_added(self, region: MemoryRegion, fd: OwnedFd) -> None:
        """Judge one more region.

        Raises:
            MessageError: RegionSlots, or what is wrong with the region.
        """
        if len(self.regions) >= MAX_SLOTS:
            raise violation("RegionSlots", f"there are {MAX_SLOTS} regions already")
        _check_region(region, fd)
        _check_overlap(region, self.regions)

    def find(self, region: MemoryRegion) -> MemoryRegion:
        """The region of the table that REM_MEM_REG means: the offset does not count.

        Raises:
            MessageError: RegionUnknown.
        """
        for mine in self.regions:
            if (mine.guest, mine.user, mine.size) == (region.guest, region.user, region.size):
                return mine
        raise violation("RegionUnknown", f"no region like {_text(region)} is in the table")

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[OwnedFd]) -> None:
        """Put a checked table in place.

        Raises:
            MessageError: RegionRefused, it cannot be mapped; nothing was changed.
        """
        try:
            self.shared.replace(
                [
                    (region.guest, region.size, fd.fileno(), region.offset)
                    for region, fd in zip(regions, fds, strict=True)
                ]
            )
        except (InvalidArgument, OSError) as error:
            raise violation("RegionRefused", str(error)) from error
        self.regions = tuple(regions)
        self._show()

    def add(self, region: MemoryRegion, fd: OwnedFd) -> None:
        """Map one more, checked region.

        Raises:
            MessageError: RegionRefused, it cannot be mapped; nothing was changed.
        """
        try:
            self.shared.add_region(region.guest, region.size, fd=fd.fileno(), offset=region.offset)
        except (InvalidArgument, OSError) as error:
            raise violation("RegionRefused", str(error)) from error
        self.regions = (*self.regions, region)
        self._show()

    def remove(self, region: MemoryRegion) -> None:
        """Unmap a region of the table; returns when nothing uses it any more."""
        self.shared.remove_region(region.guest, region.size)
        self.regions = tuple(mine for mine in self.regions if mine is not region)
        self._show()

    def clear(self) -> None:
        """Unmap everything; queues see what is shared, when something is."""
        self.shared.replace([])
        self.regions = ()
        self.cache = None
        self._show()

    def _show(self) -> None:
        if self.cache is None:
            self.memory.follow(self.shared)
        else:
            self.cache.renew()

    def set_translated(self, keep: Callable[[], Iterable[tuple[int, int]]] | None) -> None:
        """Show what IOTLB entries show, none at first, and those of the ranges `keep` go last; with None, all."""
        self.cache = None
        if keep is not None:
            self.cache = Cache(self.memory, self.shared, find=self.pieces, keep=keep)
        self._show()

    @property
    def end(self) -> int:
        """First guest address behind all regions."""
        return max((region.guest + region.size for region in self.regions), default=0)

    def guest_address(self, user: int, length: int, regions: Sequence[MemoryRegion] | None = None) -> int | None:
        """The guest address of `length` bytes at front-end address `user`; None unless all of them are shared.

        The range may go on in the next region, if it does so in both address spaces.
        """
        found = self.pieces(user, length, regions)
        if not found:
            return None
        first, at = found[0][0], found[0][0]
        for guest, size in found:
            if guest != at:
                return None
            at += size
        return first

    def pieces(
        self, user: int, length: int, regions: Sequence[MemoryRegion] | None = None
    ) -> list[tuple[int, int]] | None:
        """Guest addresses and sizes of `length` bytes at `user`, one for each region; None unless all are shared."""
        table = self.regions if regions is None else regions
        found: list[tuple[int, int]] = []
        at, left = user, length
        while left > 0:
            region = next((each for each in table if each.user <= at < each.user + each.size), None)
            if region is None:
                return None
            step = min(left, region.user + region.size - at)
            found.append((region.guest + (at - region.user), step))
            at, left = at + step, left - step
        return found


def _text(region: MemoryRegion) -> str:
    return f"{region.size:#x} bytes at guest {region.guest:#x}, user {region.user:#x}"


def _check_region(region: MemoryRegion, fd: OwnedFd) -> None:
    text = _text(region)
    if region.size == 0:
        raise violation("RegionSize", f"{text}: it is empty")
    for name, start in (("guest address", region.guest), ("user address", region.user), ("offset", region.offset)):
        if start + region.size > _END:
            raise violation("RegionWrap", f"{text}, file offset {region.offset:#x}: its {name} wraps")
    status = os.fstat(fd.fileno())
    # Only of a regular file (memfd, tmpfs, hugetlbfs) is the size known, and so that nothing lies beyond its end.
    if not stat.S_ISREG(status.st_mode):
        raise violation("RegionFile", f"{text}: its fd is no regular file")
    if region.offset + region.size > status.st_size:
        raise violation(
            "RegionBeyondFile", f"{text} from offset {region.offset:#x}, and its file has {status.st_size:#x} bytes"
        )


def _check_overlap(region: MemoryRegion, others: Sequence[MemoryRegion]) -> None:
    for other in others:
        for name, mine, its in (("guest", region.guest, other.guest), ("user", region.user, other.user)):
            if mine < its + other.size and its < mine + region.size:
                raise violation("RegionOverlap", f"{_text(region)} overlaps {_text(other)} in {name} addresses")

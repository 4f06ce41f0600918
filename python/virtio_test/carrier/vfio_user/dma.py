"""The client's memory, as DMA_MAP and DMA_UNMAP describe it, in the device's guest memory.

Theory
------
A region comes with a file, which is mapped, or without, and is then reached by messages: the core calls back for
each access, and the `Port` carries it to the client in pieces that the client takes.

DMA_UNMAP names a range. What lies in it is unmapped, be it one region, several (QEMU behind an IOMMU names big
ranges) or none (QEMU's firmware unmaps what was never mapped): all of that succeeds. A range that would cut a
region in two changes nothing and is refused.

A client may move its memory while an access of ours to it is under way, and answer that access only when we have
answered all its commands (QEMU does both under one lock). Then the table changes at once, so that the answer is
true for the commands that follow, and guest memory when the access is over: `later` and `settle`. Until then the
access, and what the same operation of the device does after it, goes to memory as it was: messages, which the
client answers or refuses, and files, which it may have unmapped but which are still there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument

from .codec import OwnedFd
from .payloads import DmaMap, DmaUnmap
from .rules import Refused

__all__ = ["MAX_MAPS", "DmaTable", "Port"]

MAX_MAPS: Final = 509
"""Regions that the core holds at once, and what is answered as max_dma_maps."""

_READABLE: Final = 1
_WRITEABLE: Final = 2
_GET_DIRTY_BITMAP: Final = 1
_ALL: Final = 2
_END: Final = 1 << 64


class Port(Protocol):
    """The way to the client's memory where there is no file. Any exception means that the access failed."""

    def dma_read(self, address: int, count: int) -> bytes:
        """Exactly `count` bytes at `address`."""
        ...

    def dma_write(self, address: int, data: bytes) -> None:
        """Write all of `data` to `address`."""
        ...


@dataclass(frozen=True, slots=True)
class _Region:
    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.address:#x}"


class DmaTable:
    """The regions of one client.

    Args:
        memory: where they are mapped.
        port: reaches those without a file.
    """

    def __init__(self, memory: GuestMemory, port: Port) -> None:
        self._memory = memory
        self._port = port
        self._regions: dict[int, _Region] = {}
        self._mapped: dict[int, _Region] = {}
        self._changes: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        return f"<DmaTable of {len(self._regions)} regions>"

    def __len__(self) -> int:
        return len(self._regions)

    def map(self, asked: DmaMap, fd: OwnedFd | None, *, later: bool = False) -> None:
        """Add a region; to guest memory only with `settle`, if `later`.

        Raises:
            Refused: nothing was changed.
        """
        region = _Region(asked.address, asked.size)
        if not asked.flags or asked.flags & ~(_READABLE | _WRITEABLE):
            raise Refused(errno.EINVAL, "DmaFlags", f"{region} with flags {asked.flags:#x}")
        # Guest memory has no region that holds the last address of all.
        if not region.size or region.end >= _END or asked.offset + region.size > _END:
            raise Refused(errno.EINVAL, "DmaRange", f"{region}, file offset {asked.offset:#x}")
        for other in self._regions.values():
            if region.address < other.end and other.address < region.end:
                raise Refused(errno.EEXIST, "DmaExists", f"{region} overlaps {other}")
        if len(self._regions) >= MAX_MAPS:
            raise Refused(errno.ENOSPC, "DmaSlots", f"{MAX_MAPS} regions are mapped already")
        writable = bool(asked.flags & _WRITEABLE)
        try:
            if fd is not None:
                _check_file(region, asked.offset, fd)
                if later:
                    fd = OwnedFd(os.dup(fd.fileno()))
        except OSError as error:
            raise Refused(errno.EINVAL, "DmaFile", f"{region}: {error.strerror}") from error
        self._regions[region.address] = region
        try:
            self._change(partial(self._add, region, asked.offset, fd, writable=writable), later=later)
        except Refused:
            del self._regions[region.address]
            raise

    def _change(self, change: Callable[[], None], *, later: bool) -> None:
        if later:
            self._changes.append(change)
        else:
            self.settle()
            change()

    def settle(self) -> None:
        """Bring guest memory to what the table says.

        Raises:
            Refused: a region that was added `later` cannot be mapped.
        """
        while self._changes:
            self._changes.popleft()()

    def _add(self, region: _Region, offset: int, fd: OwnedFd | None, *, writable: bool) -> None:
        try:
            if fd is None:
                self._add_remote(region, writable=writable)
            else:
                self._memory.add_region(region.address, region.size, fd=fd.fileno(), offset=offset, writable=writable)
        except InvalidArgument as error:
            raise Refused(errno.EINVAL, "DmaRange", str(error)) from error
        except OSError as error:
            raise Refused(errno.EINVAL, "DmaFile", f"{region}: {error.strerror}") from error
        self._mapped[region.address] = region

    def _add_remote(self, region: _Region, *, writable: bool) -> None:
        self._memory.add_remote(
            region.address,
            region.size,
            read=self._port.dma_read,
            write=self._port.dma_write if writable else None,
        )

    def unmap(self, asked: DmaUnmap, *, later: bool = False) -> None:
        """Take away what lies in a range; when this returns, or with `settle` if `later`, nothing uses it any more.

        Raises:
            Refused: nothing was changed.
        """
        if asked.flags & _GET_DIRTY_BITMAP:
            raise Refused(errno.ENOTSUP, "UnmapFlags", "a dirty bitmap is asked for, and none is kept")
        if asked.flags & ~_ALL or asked.data:
            raise Refused(errno.EINVAL, "UnmapFlags", f"flags {asked.flags:#x}, {len(asked.data)} bytes behind them")
        if asked.flags & _ALL:
            if asked.address or asked.size:
                raise Refused(errno.EINVAL, "UnmapFlags", "all is to be unmapped, and a range is named")
            self._remove(list(self._regions.values()), later=later)
            return
        found = _Region(asked.address, asked.size)
        if not found.size or found.end > _END:
            raise Refused(errno.EINVAL, "DmaRange", f"{found} cannot be unmapped")
        inside: list[_Region] = []
        for region in self._regions.values():
            if found.address <= region.address and region.end <= found.end:
                inside.append(region)
            elif found.address < region.end and region.address < found.end:
                raise Refused(errno.EINVAL, "UnmapSplit", f"{found} would cut {region} in two")
        self._remove(inside, later=later)

    def _remove(self, regions: list[_Region], *, later: bool) -> None:
        for region in regions:
            self._change(partial(self._drop, region), later=later)
            del self._regions[region.address]

    def _drop(self, region: _Region) -> None:
        self._memory.remove_region(region.address, region.size)
        del self._mapped[region.address]

    def clear(self) -> None:
        """Take everything away."""
        self._changes.clear()
        self._regions.clear()
        for region in list(self._mapped.values()):
            self._drop(region)


def _check_file(region: _Region, offset: int, fd: OwnedFd) -> None:
    status = os.fstat(fd.fileno())
    # Only of a regular file (memfd, tmpfs, hugetlbfs) is the size known, and so that nothing lies beyond its end.
    if not stat.S_ISREG(status.st_mode):
        raise Refused(errno.EINVAL, "DmaFile", f"{region}: its fd is no regular file")
    if offset + region.size > status.st_size:
        raise Refused(
            errno.EINVAL, "DmaFile", f"{region} from offset {offset:#x}, and its file has {status.st_size:#x} bytes"
        )

"""Where this back-end records what its rings have in flight: the region that the front-end keeps for it.

Theory
------
The back-end makes the region when it is asked (GET_INFLIGHT_FD), a sealed memfd of zeros, and forgets it. What counts
is the one that comes with SET_INFLIGHT_FD, which is that one, or another one, with the record of a back-end that died.
It belongs to the front-end: it is judged before it takes the place of another, and each record of it when its ring
starts.

The document does not say how far apart the records lie; those who make regions cut them into equal ones, and so do we.

Source: vhost-user.rst, "Inflight I/O tracking", VHOST_USER_GET_INFLIGHT_FD, VHOST_USER_SET_INFLIGHT_FD.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final, Self

from virtio_test._core import InflightArea, InflightPart
from virtio_test.errors import InvalidArgument

from .codec import OwnedFd
from .payloads import Inflight
from .rings import MAX_SIZE
from .rules import violation

__all__ = ["Records", "new_region"]

_ALIGN: Final = 64
"""What others round the size of a record up to."""
_HEADER: Final = struct.Struct("=QHH")
_VERSION: Final = 1
_WORD: Final = 8
"""Everything in a record is aligned to this at the most."""


def _check_size(asked: Inflight, queues: int) -> None:
    """Raises InflightRegion unless the device has so many queues, and one can be so large."""
    if not 1 <= asked.queues <= queues:
        raise violation("InflightRegion", f"{asked.queues} queues, and the device has {queues}")
    if not 1 <= asked.queue_size <= MAX_SIZE:
        raise violation("InflightRegion", f"queues of {asked.queue_size} descriptors; 1 to {MAX_SIZE} are possible")


def new_region(asked: Inflight, *, queues: int, packed: bool) -> tuple[Inflight, OwnedFd]:
    """What answers GET_INFLIGHT_FD.

    Args:
        asked: its payload, in which only the number of queues and their size count.
        queues: queues of the device.
        packed: whether records of packed rings must fit.

    Raises:
        MessageError: InflightRegion, for such queues there is none.
    """
    _check_size(asked, queues)
    part = -(-InflightPart.bytes(asked.queue_size, packed) // _ALIGN) * _ALIGN
    fd = OwnedFd(os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), part * asked.queues)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return Inflight(part * asked.queues, 0, asked.queues, asked.queue_size), fd


class Records:
    """The records of one region.

    Args:
        area: the region, mapped.
        queues: how many records there are.
        queue_size: descriptors that each has room for.
    """

    def __init__(self, area: InflightArea, *, queues: int, queue_size: int) -> None:
        self.area = area
        self.queues = queues
        self.queue_size = queue_size

    def __repr__(self) -> str:
        return f"<Records of {self.queues} queues of {self.queue_size}>"

    @classmethod
    def given(cls, region: Inflight, fd: OwnedFd, *, queues: int, packed: bool) -> Self:
        """Take the region of SET_INFLIGHT_FD.

        Args:
            region: the payload.
            fd: what came with it; duplicated.
            queues: queues of the device.
            packed: whether its rings are packed.

        Raises:
            MessageError: InflightRegion, it has no room for such queues, or cannot be mapped; InflightState, there are
                records in it that cannot be. Nothing of it was changed.
        """
        _check_size(region, queues)
        stride = region.size // region.queues
        needed = InflightPart.bytes(region.queue_size, packed)
        if stride < needed:
            wanted = f"{region.queues} queues of {region.queue_size} need {region.queues * needed:#x}"
            raise violation("InflightRegion", f"{region.size:#x} bytes, where {wanted}")
        if stride % _WORD or region.offset % _WORD:
            raise violation(
                "InflightRegion", f"records of {stride:#x} bytes from offset {region.offset:#x}: not {_WORD}-aligned"
            )
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise violation("InflightRegion", "its fd is no regular file")
        if region.offset + region.size > status.st_size:
            text = f"{region.size:#x} bytes from offset {region.offset:#x} of a file of {status.st_size:#x}"
            raise violation("InflightRegion", text)
        for index in range(region.queues):
            _check_header(fd, region.offset + index * stride, region.queue_size, index)
        try:
            area = InflightArea(region.queues * stride, fd=fd.fileno(), offset=region.offset)
        except (InvalidArgument, OSError) as error:
            raise violation("InflightRegion", str(error)) from error
        return cls(area, queues=region.queues, queue_size=region.queue_size)

    def part(self, index: int, *, packed: bool) -> InflightPart:
        """The record of queue `index`.

        Raises:
            MessageError: InflightRegion, it has none; or it would reach into that of the next queue, because the region
                came before the rings were `packed`.
        """
        if index >= self.queues:
            raise violation("InflightRegion", f"there are records of {self.queues} queues", queue=index)
        stride, needed = self.area.size // self.queues, InflightPart.bytes(self.queue_size, packed)
        if stride < needed:
            raise violation("InflightRegion", f"a record has {stride:#x} bytes, and now needs {needed:#x}", queue=index)
        return self._part(index)

    def _part(self, index: int) -> InflightPart:
        return self.area.part(index * (self.area.size // self.queues), self.queue_size)

    def clear(self, index: int) -> None:
        """Queue `index` begins anew: what its record says holds no longer."""
        if index < self.queues:
            self._part(index).clear()


def _check_header(fd: OwnedFd, offset: int, queue_size: int, queue: int) -> None:
    """Judge what can be judged before anything is known of the ring; read, so that a file cut short is no fault."""
    try:
        data = os.pread(fd.fileno(), _HEADER.size, offset)
    except OSError as error:
        # Such as one that is open for writing only.
        raise violation("InflightRegion", f"its file cannot be read: {error.strerror}", queue=queue) from None
    if len(data) < _HEADER.size:
        raise violation("InflightRegion", "its file has become shorter", queue=queue)
    header: tuple[int, ...] = _HEADER.unpack(data)
    features, version, count = header
    if version == 0:
        return
    if version != _VERSION or features:
        text = f"version {version} with features {features:#x}, where {_VERSION} without any is the only one"
        raise violation("InflightState", text, queue=queue)
    if count != queue_size:
        raise violation("InflightState", f"states of {count} descriptors, not {queue_size}", queue=queue)

"""The region in which a back-end records what it has in flight, for the back-end after it.

Theory
------
A back-end that uses buffers out of order is the only one that knows which of them it has taken and not given back.
It writes that into a region which the front-end keeps across connections and hands to the next back-end: one part
for each queue, a header and a state for each descriptor. The document does not say how far apart the parts lie;
those who make regions (libvhost-user, DPDK) cut them into equal ones, and so do we.

The front-end mostly carries the region. It looks inside for two things: what a back-end left behind (for whoever
asks), and where a packed ring goes on, which no place in guest memory tells. The region belongs to the back-end, so
it is read and never mapped: a file that shrinks gives short reads and no signal.

Source: vhost-user.rst, "Inflight I/O tracking".
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtio_test._core import QueueState

from .codec import OwnedFd
from .rules import violation

__all__ = ["InflightQueue", "InflightRegion"]

_VERSION: Final = 1
_SPLIT: Final = struct.Struct("=QHHHH")
_SPLIT_STATE: Final = struct.Struct("=B5xHQ")
_PACKED: Final = struct.Struct("=QHHHHHHBB10x")
_PACKED_STATE: Final = struct.Struct("=BxHHHQHHIQ")
_AVAIL: Final = 1 << 7
_USED: Final = 1 << 15


@dataclass(frozen=True)
class InflightQueue:
    """What the record of one queue says once its last, half-done update is settled.

    Attributes:
        heads: what is in flight, in the order in which it was taken: head descriptors of a split ring, indices of
            the record's own entries for a packed one.
        descriptors: ring descriptors that these occupy; of a split ring, how many heads there are.
        used: where the next used buffer goes: an index, and in bit 15 the wrap counter of a packed ring.
    """

    heads: tuple[int, ...]
    descriptors: int
    used: int


class InflightRegion:
    """One region, judged.

    Args:
        fd: its file.
        size: bytes.
        offset: of the file.
        queues: how many queues it was made for.
        queue_size: descriptors of each.
        packed: for packed rings.

    Raises:
        MessageError: InflightRegion, it is too small, or not all in its file.
    """

    def __init__(self, fd: OwnedFd, size: int, offset: int, *, queues: int, queue_size: int, packed: bool) -> None:
        self._fd = fd
        self.size = size
        self.offset = offset
        self.queues = queues
        self.queue_size = queue_size
        self.packed = packed
        header, state = (_PACKED, _PACKED_STATE) if packed else (_SPLIT, _SPLIT_STATE)
        self._part_bytes = header.size + queue_size * state.size
        if size // queues < self._part_bytes:
            wanted = f"{queues} queues of {queue_size} need {queues * self._part_bytes}"
            raise violation("InflightRegion", f"{size:#x} bytes, where {wanted:}")
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise violation("InflightRegion", "its fd is no regular file")
        if offset + size > status.st_size:
            raise violation(
                "InflightRegion", f"{size:#x} bytes from offset {offset:#x} of a file of {status.st_size:#x}"
            )

    def __repr__(self) -> str:
        kind = "packed" if self.packed else "split"
        return f"<InflightRegion of {self.size} bytes, {self.queues} {kind} queues of {self.queue_size}>"

    def fileno(self) -> int:
        """The file, still owned by this object."""
        return self._fd.fileno()

    def close(self) -> None:
        """Close the file."""
        self._fd.close()

    def fits(self, queues: int, queue_size: int, *, packed: bool) -> bool:
        """Whether it was made for such queues."""
        return (queues, queue_size, packed) == (self.queues, self.queue_size, self.packed)

    def _part(self, index: int) -> bytes:
        try:
            data = os.pread(self.fileno(), self._part_bytes, self.offset + index * (self.size // self.queues))
        except OSError as error:
            # Such as one that is open for writing only.
            reason = error.strerror or str(error)
            raise violation("InflightRegion", f"its file cannot be read: {reason}", queue=index) from None
        if len(data) < self._part_bytes:
            raise violation("InflightRegion", "its file has become shorter", queue=index)
        return data

    def split(self, index: int, used_idx: int) -> InflightQueue:
        """The record of a split queue.

        Args:
            index: the queue.
            used_idx: the index of its used ring, which tells how far the last update came.

        Raises:
            MessageError: InflightState, it cannot be a record of this queue.
        """
        data = self._part(index)
        header: tuple[int, ...] = _SPLIT.unpack_from(data)
        _, version, count, last, recorded = header
        states = _states(_SPLIT_STATE, data, _SPLIT.size)
        if not self._written(index, version, count):
            return InflightQueue((), 0, used_idx)
        flying = {head: counter for head, (inflight, _, counter) in enumerate(states) if inflight}
        batch = (used_idx - recorded) & 0xFFFF
        if batch > self.queue_size:
            raise violation("InflightState", f"{batch} buffers used since the last record of {recorded}", queue=index)
        for _ in range(batch):
            if last >= self.queue_size:
                raise violation("InflightState", f"descriptor {last} of {self.queue_size} was used last", queue=index)
            flying.pop(last, None)
            last = states[last][1]
        return InflightQueue(tuple(sorted(flying, key=flying.__getitem__)), len(flying), used_idx)

    def packed_queue(self, index: int, flags_at: Callable[[int], int]) -> InflightQueue:
        """The record of a packed queue.

        Args:
            index: the queue.
            flags_at: the flags of the descriptor at a place of the ring, which tell how far the last update came.

        Raises:
            MessageError: InflightState, it cannot be a record of this queue.
        """
        data = self._part(index)
        header: tuple[int, ...] = _PACKED.unpack_from(data)
        _, version, count, free, old_free, used, old_used, wrap, old_wrap = header
        if not self._written(index, version, count):
            return InflightQueue((), 0, 0x8000)
        size = self.queue_size
        if max(used, old_used) >= size or max(wrap, old_wrap) > 1:
            places = f"{used} and {old_used}, wrap counters {wrap} and {old_wrap}"
            raise violation("InflightState", f"used indices {places} of a ring of {size}", queue=index)
        if used != old_used or wrap != old_wrap:
            # Available still: the update had not reached the ring, and it is taken back.
            if flags_at(old_used) & (_AVAIL | _USED) == (_AVAIL if old_wrap else _USED):
                free, used, wrap = old_free, old_used, old_wrap
        else:
            free = old_free
        states = _states(_PACKED_STATE, data, _PACKED.size)
        idle: set[int] = set()
        while free < size and free not in idle:
            idle.add(free)
            free = states[free][1]
        flying = {head: state for head, state in enumerate(states) if state[0] and head not in idle}
        taken = sum(state[3] for state in flying.values())
        if taken > size or any(state[3] == 0 for state in flying.values()):
            raise violation("InflightState", f"{taken} descriptors of a ring of {size} are in flight", queue=index)
        heads = tuple(sorted(flying, key=lambda head: flying[head][4]))
        return InflightQueue(heads, taken, used | wrap << 15)

    def packed_state(self, index: int, flags_at: Callable[[int], int]) -> QueueState:
        """Where the back-end of a packed queue goes on: it has taken all that is in flight; see `packed_queue`."""
        record = self.packed_queue(index, flags_at)
        avail, wrap = (record.used & 0x7FFF) + record.descriptors, record.used >> 15
        if avail >= self.queue_size:
            avail, wrap = avail - self.queue_size, wrap ^ 1
        return QueueState(avail | wrap << 15, record.used)

    def _written(self, index: int, version: int, count: int) -> bool:
        """Whether a back-end has written a record at all; raises InflightState for one that it cannot have written."""
        if version == 0:
            return False
        if version != _VERSION:
            raise violation("InflightState", f"version {version}, where {_VERSION} is the only one", queue=index)
        if count != self.queue_size:
            raise violation("InflightState", f"states of {count} descriptors, not {self.queue_size}", queue=index)
        return True


def _states(kind: struct.Struct, data: bytes, start: int) -> list[tuple[int, ...]]:
    return [kind.unpack_from(data, at) for at in range(start, len(data), kind.size)]

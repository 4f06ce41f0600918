"""A device end in plain Python: a split ring read with `struct` out of a mapped file, request by request.

This is what people write who have a file of guest memory, the standard library and an afternoon: descriptors are
unpacked, the chain is walked with the checks that keep the process alive (indices in the table, buffers in the memory,
no loops, reads before writes), the handler is called, the used ring is written, and its index once per burst. It knows
no indirect tables, no event index and no packed ring. It is written to be read, and not to be slow: unpackers are
compiled once, slices are copied once, nothing is allocated that the values themselves do not need.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

NEXT, WRITE = 1, 2
"""Flags of a descriptor (2.7.5)."""

DESC = struct.Struct("<QIHH")
USED = struct.Struct("<II")
U16 = struct.Struct("<H")


class BrokenRing(Exception):
    """The driver wrote what no ring can be."""


class PlainQueue:
    """The device end of one split ring in a mapped file.

    Args:
        fd: the memory, mapped whole; guest address 0 is its first byte.
        length: its size in bytes.
        size: the number of descriptors.
        desc: where the descriptor table is.
        avail: where the avail ring is.
        used: where the used ring is.
    """

    def __init__(self, fd: int, length: int, *, size: int, desc: int, avail: int, used: int) -> None:
        self.memory = mmap.mmap(fd, length)
        self.length = length
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.last_avail = 0
        self.used_idx = 0

    def close(self) -> None:
        """Unmap the memory."""
        self.memory.close()

    def has_work(self) -> bool:
        """Whether a chain is available."""
        return U16.unpack_from(self.memory, self.avail + 2)[0] != self.last_avail

    def pop(self) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]] | None:
        """(head, readable buffers, writable buffers) of the next chain, buffers as (address, length); None if none."""
        (idx,) = U16.unpack_from(self.memory, self.avail + 2)
        if idx == self.last_avail:
            return None
        if (idx - self.last_avail) & 0xFFFF > self.size:
            raise BrokenRing(f"avail.idx went from {self.last_avail} to {idx}")
        (head,) = U16.unpack_from(self.memory, self.avail + 4 + 2 * (self.last_avail % self.size))
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        index = head
        for _ in range(self.size):
            if index >= self.size:
                raise BrokenRing(f"descriptor {index} of {self.size}")
            address, length, flags, following = DESC.unpack_from(self.memory, self.desc + 16 * index)
            if address + length > self.length:
                raise BrokenRing(f"descriptor {index} leads out of the memory")
            if flags & WRITE:
                writable.append((address, length))
            elif writable:
                raise BrokenRing(f"descriptor {index} is readable after a writable one")
            else:
                readable.append((address, length))
            if not flags & NEXT:
                break
            index = following
        else:
            raise BrokenRing(f"the chain at {head} has no end")
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        return head, readable, writable

    def read(self, buffers: list[tuple[int, int]]) -> bytes:
        """The bytes of readable buffers."""
        if len(buffers) == 1:
            address, length = buffers[0]
            return self.memory[address : address + length]
        return b"".join(self.memory[address : address + length] for address, length in buffers)

    def write(self, buffers: list[tuple[int, int]], data: bytes) -> int:
        """Spread `data` over writable buffers; the number of bytes written."""
        done = 0
        for address, length in buffers:
            part = data[done : done + length]
            self.memory[address : address + len(part)] = part
            done += len(part)
            if done == len(data):
                break
        return done

    def push(self, head: int, written: int) -> None:
        """Enter a chain into the used ring; the driver sees it with the next `publish`."""
        USED.pack_into(self.memory, self.used + 4 + 8 * (self.used_idx % self.size), head, written)
        self.used_idx = (self.used_idx + 1) & 0xFFFF

    def publish(self) -> None:
        """Show the driver all that was pushed."""
        U16.pack_into(self.memory, self.used + 2, self.used_idx)

    def wants_call(self) -> bool:
        """Whether the driver wants an interrupt (2.7.7.2)."""
        return not U16.unpack_from(self.memory, self.avail)[0] & 1

    def process(self, handler: Callable[[bytes], bytes]) -> int:
        """Answer everything that is available; the number of chains."""
        count = 0
        while (chain := self.pop()) is not None:
            head, readable, writable = chain
            self.push(head, self.write(writable, handler(self.read(readable))))
            count += 1
        self.publish()
        return count

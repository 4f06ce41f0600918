"""A device end in plain Python: a split ring read with `struct` out of mapped files, request by request.

This is what people write who have the fds of a guest's memory, the standard library and an afternoon: a table of
regions, in which each guest address is looked up; a chain walked with the checks that keep the
process alive (indices in the table, buffers in the memory, no loops, reads before writes), indirect tables included; a
handler from bytes to bytes; the used ring, whose index is written once per burst. It knows no packed ring and no event
index. It is written to be read: nothing in it is there to be slow, and nothing to win a race.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4
"""Flags of a descriptor (2.7.5)."""

DESC = struct.Struct("<QIHH")
USED = struct.Struct("<II")
U16 = struct.Struct("<H")


class BrokenRing(Exception):
    """The driver wrote what no ring can be."""


class Memory:
    """Guest memory: a table of (guest address, size in bytes, fd), as a vhost-user front-end sends it."""

    def __init__(self, regions: Iterable[tuple[int, int, int]]) -> None:
        self.regions = [(start, start + size, mmap.mmap(fd, size)) for start, size, fd in regions]

    def close(self) -> None:
        """Unmap it."""
        for _, _, mapped in self.regions:
            mapped.close()

    def find(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        """Where `length` bytes at a guest address lie: the mapping, and the offset in it."""
        for start, end, mapped in self.regions:
            if start <= address and address + length <= end:
                return mapped, address - start
        raise BrokenRing(f"{length} bytes at {address:#x} are not in the memory")

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes at `address`."""
        mapped, offset = self.find(address, length)
        return mapped[offset : offset + length]

    def write(self, address: int, data: bytes) -> None:
        """Put `data` at `address`."""
        mapped, offset = self.find(address, len(data))
        mapped[offset : offset + len(data)] = data

    def u16(self, address: int) -> int:
        """The 16-bit number at `address`."""
        mapped, offset = self.find(address, 2)
        return U16.unpack_from(mapped, offset)[0]


Chain = tuple[int, list[tuple[int, int]], list[tuple[int, int]]]
"""A request of the driver: its head, and (address, length) of what to read and where to write the response."""


@dataclass
class PlainQueue:
    """The device end of one split ring.

    Args:
        memory: where it lies.
        size: the number of descriptors.
        desc: address of the descriptor table.
        avail: address of the avail ring.
        used: address of the used ring.
    """

    memory: Memory
    size: int
    desc: int
    avail: int
    used: int
    last_avail: int = 0
    used_idx: int = 0

    def pop(self) -> Chain | None:
        """The next chain that the driver has made available; None when there is none."""
        idx = self.memory.u16(self.avail + 2)
        if idx == self.last_avail:
            return None
        if (idx - self.last_avail) % 65536 > self.size:
            raise BrokenRing(f"avail.idx went from {self.last_avail} to {idx}")
        head = self.memory.u16(self.avail + 4 + 2 * (self.last_avail % self.size))
        chain: Chain = head, [], []
        self.walk(chain, self.desc, self.size, head)
        self.last_avail = (self.last_avail + 1) % 65536
        return chain

    def walk(self, chain: Chain, table: int, size: int, index: int) -> None:
        """Collect the descriptors of a chain from a table."""
        head, readable, writable = chain
        mapped, start = self.memory.find(table, 16 * size)
        for _ in range(size):
            if index >= size:
                raise BrokenRing(f"descriptor {index} of {size}")
            address, length, flags, following = DESC.unpack_from(mapped, start + 16 * index)
            if flags & INDIRECT:
                if table != self.desc or flags & NEXT:
                    raise BrokenRing(f"descriptor {index} must not be indirect")
                self.walk(chain, address, length // 16, 0)
                return
            if flags & WRITE:
                writable.append((address, length))
            elif writable:
                raise BrokenRing(f"descriptor {index} is readable after a writable one")
            else:
                readable.append((address, length))
            if not flags & NEXT:
                return
            index = following
        raise BrokenRing(f"the chain at {head} has no end")

    def request(self, readable: list[tuple[int, int]]) -> bytes:
        """All that the driver has written for us."""
        return b"".join([self.memory.read(address, length) for address, length in readable])

    def respond(self, writable: list[tuple[int, int]], response: bytes) -> int:
        """Spread the response over the chain's buffers; the number of bytes written."""
        done = 0
        for address, length in writable:
            part = response[done : done + length]
            self.memory.write(address, part)
            done += len(part)
        return done

    def push(self, head: int, written: int) -> None:
        """Put a chain into the used ring; the driver sees it with the next `publish`."""
        self.memory.write(self.used + 4 + 8 * (self.used_idx % self.size), USED.pack(head, written))
        self.used_idx = (self.used_idx + 1) % 65536

    def publish(self) -> bool:
        """Show the driver what was pushed; whether it wants to be told (2.7.7.2)."""
        self.memory.write(self.used + 2, U16.pack(self.used_idx))
        return not self.memory.u16(self.avail) & 1

    def process(self, handler: Callable[[bytes], bytes], limit: int) -> int:
        """Answer what is available, up to `limit` chains; their number."""
        count = 0
        while count < limit and (chain := self.pop()):
            head, readable, writable = chain
            self.push(head, self.respond(writable, handler(self.request(readable))))
            count += 1
        self.publish()
        return count

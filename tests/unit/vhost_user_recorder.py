"""A test device behind vhost-user that records what it has in flight, as the protocol's document says, step by step.

The test is its main loop: it takes what is available, uses what it likes in any order, and can stop between any two
steps of using a buffer, as a process that is killed does. It shares no code with the front-end's view of the record.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from virtio_test._core import GuestMemory, RingLayout
from virtio_test.transport.vhost_user.codec import Message
from virtio_test.transport.vhost_user.frontend import USER_OFFSET
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import Inflight, SingleRegion, VringAddress, VringState

from .vhost_user_peer import FEATURES, PROTOCOL, Peer

REQUEST = struct.Struct("<4I32s")
RESPONSE = struct.Struct("<3I")
NEXT, WRITE, AVAIL, USED = 1, 2, 1 << 7, 1 << 15
PACKED = 1 << 34


# Fields of a queue's header and of one descriptor's state, for a split and a packed ring: offset and type.
HEADER: Final = {
    False: {"version": (8, "H"), "desc_num": (10, "H"), "last_batch_head": (12, "H"), "used_idx": (14, "H")},
    True: {
        "version": (8, "H"),
        "desc_num": (10, "H"),
        "free_head": (12, "H"),
        "old_free_head": (14, "H"),
        "used_idx": (16, "H"),
        "old_used_idx": (18, "H"),
        "used_wrap": (20, "B"),
        "old_used_wrap": (21, "B"),
    },
}
STATE: Final = {
    False: {"inflight": (0, "B"), "next": (6, "H"), "counter": (8, "Q")},
    True: {
        "inflight": (0, "B"),
        "next": (2, "H"),
        "last": (4, "H"),
        "num": (6, "H"),
        "counter": (8, "Q"),
        "id": (16, "H"),
        "flags": (18, "H"),
        "len": (20, "I"),
        "addr": (24, "Q"),
    },
}


class Killed(Exception):
    """The back-end stopped here."""


class Buffer(NamedTuple):
    address: int
    length: int
    writable: bool


class Recorder(Peer):
    """One back-end process, with one queue."""

    def __init__(self, path: Path, *, packed: bool, protocol: ProtocolFeature = PROTOCOL) -> None:
        self.packed = packed
        self.memory = GuestMemory([])
        self.size = 0
        self.base = 0
        self.layout: RingLayout | None = None
        self.record: mmap.mmap | None = None
        self.running = False
        self.resubmitted: list[int] = []
        self.counter = 0
        super().__init__(path, features=FEATURES | (PACKED if packed else 0), protocol=protocol)

    def _forget(self) -> None:
        super()._forget()
        self.running = False
        if self.record is not None:
            self.record.close()
            self.record = None

    def _answer(self, message: Message) -> tuple[bytes, list[int]]:
        payload = message.payload
        match message.request, payload:
            case Request.ADD_MEM_REG, SingleRegion():
                self.memory.add_region(payload.guest, payload.size, fd=message.fds[0].fileno(), offset=payload.offset)
            case Request.SET_INFLIGHT_FD, Inflight():
                self.record = mmap.mmap(message.fds[0].fileno(), payload.size, offset=payload.offset)
            case Request.SET_VRING_NUM, VringState():
                self.size = payload.num
            case Request.SET_VRING_BASE, VringState():
                self.base = payload.num
            case Request.SET_VRING_ADDR, VringAddress():
                places = (payload.descriptor, payload.available, payload.used)
                desc, driver, device = (place - USER_OFFSET for place in places)
                self.layout = RingLayout(self.size, packed=self.packed, desc=desc, driver=driver, device=device)
            case Request.SET_VRING_ENABLE, VringState() if payload.num:
                self._start()
            case Request.GET_VRING_BASE, _:
                self.running = False
                self.answers[Request.GET_VRING_BASE] = VringState(0, 0)
            case _:
                pass
        return super()._answer(message)

    # --- memory, ring and record --------------------------------------------------------------------------------

    def field(self, name: str, index: int = 0) -> int:
        assert self.layout is not None
        return int.from_bytes(self.memory.read(self.layout.at(name, index), self.layout.fields()[name][1]), "little")

    def put(self, name: str, value: int, index: int = 0) -> None:
        assert self.layout is not None
        width = self.layout.fields()[name][1]
        self.memory.write(self.layout.at(name, index), value.to_bytes(width, "little"))

    def _at(self, name: str, entry: int | None) -> tuple[str, int]:
        if entry is None:
            offset, code = HEADER[self.packed][name]
            return code, offset
        offset, code = STATE[self.packed][name]
        return code, (32 + 32 * entry if self.packed else 16 + 16 * entry) + offset

    def get(self, name: str, entry: int | None = None) -> int:
        assert self.record is not None
        code, offset = self._at(name, entry)
        return int(struct.unpack_from(f"={code}", self.record, offset)[0])

    def set(self, name: str, value: int, entry: int | None = None) -> None:
        assert self.record is not None
        code, offset = self._at(name, entry)
        struct.pack_into(f"={code}", self.record, offset, value)

    # --- starting, with what is recorded ------------------------------------------------------------------------

    def _start(self) -> None:
        self.running = True
        if self.record is None:
            return
        if self.get("version") == 0:
            self.set("version", 1)
            self.set("desc_num", self.size)
            if self.packed:
                for entry in range(self.size):
                    self.set("next", entry + 1, entry)
                self.set("used_wrap", 1)
                self.set("old_used_wrap", 1)
            self.avail, self.wrap = 0, 1
            return
        if self.packed:
            self._settle_packed()
        else:
            self._settle_split()
        flying = [entry for entry in range(self.size) if self.get("inflight", entry)]
        self.resubmitted = sorted(flying, key=lambda entry: self.get("counter", entry))
        self.counter = max((self.get("counter", entry) + 1 for entry in flying), default=0)
        if self.packed:
            # Taken, and so behind what is used: as the front-end has it in the base that it sent.
            self.avail, self.wrap = self.base & 0x7FFF, self.base >> 15 & 1
        else:
            self.avail = (self.field("used.idx") + len(flying)) & 0xFFFF

    def _settle_split(self) -> None:
        used = self.field("used.idx")
        head = self.get("last_batch_head")
        for _ in range((used - self.get("used_idx")) & 0xFFFF):
            self.set("inflight", 0, head)
            head = self.get("next", head)
        self.set("used_idx", used)

    def _settle_packed(self) -> None:
        if self.get("used_idx") != self.get("old_used_idx"):
            wrap = self.get("old_used_wrap")
            available = AVAIL if wrap else USED
            if self.field("desc.flags", self.get("old_used_idx")) & (AVAIL | USED) != available:
                for name in ("free_head", "used_idx", "used_wrap"):
                    self.set(f"old_{name}", self.get(name))
        for name in ("free_head", "used_idx", "used_wrap"):
            self.set(name, self.get(f"old_{name}"))
        entry = self.get("free_head")
        while entry < self.size:
            self.set("inflight", 0, entry)
            entry = self.get("next", entry)

    # --- taking and using ---------------------------------------------------------------------------------------

    def take(self) -> list[int]:
        """Take everything that is available; the record's entries, in the order of the ring."""
        taken: list[int] = []
        while (entry := self._take_packed() if self.packed else self._take_split()) is not None:
            taken.append(entry)
        return taken

    def _take_split(self) -> int | None:
        if self.field("avail.idx") == self.avail:
            return None
        head = self.field("avail.ring", self.avail % self.size)
        self.avail = (self.avail + 1) & 0xFFFF
        self._note(head)
        return head

    def _note(self, entry: int) -> None:
        self.set("counter", self.counter, entry)
        self.counter += 1
        self.set("inflight", 1, entry)

    def _take_packed(self) -> int | None:
        flags = self.field("desc.flags", self.avail)
        if flags & (AVAIL | USED) != (AVAIL if self.wrap else USED):
            return None
        head = self.get("old_free_head")
        self.set("num", 0, head)
        self._note(head)
        while True:
            flags = self.field("desc.flags", self.avail)
            entry = self.get("free_head")
            if not flags & NEXT:
                self.set("last", entry, head)
            self.set("num", self.get("num", head) + 1, head)
            for name in ("addr", "len", "id"):
                self.set(name, self.field(f"desc.{name}", self.avail), entry)
            self.set("flags", flags, entry)
            self.set("free_head", self.get("next", entry))
            self.avail += 1
            if self.avail == self.size:
                self.avail, self.wrap = 0, self.wrap ^ 1
            if not flags & NEXT:
                self.set("old_free_head", self.get("free_head"))
                return head

    def _buffers(self, entry: int) -> list[Buffer]:
        found: list[Buffer] = []
        while True:
            if self.packed:
                flags = self.get("flags", entry)
                found.append(Buffer(self.get("addr", entry), self.get("len", entry), bool(flags & WRITE)))
                following = self.get("next", entry)
            else:
                flags = self.field("desc.flags", entry)
                where = self.field("desc.addr", entry), self.field("desc.len", entry)
                found.append(Buffer(*where, bool(flags & WRITE)))
                following = self.field("desc.next", entry)
            if not flags & NEXT:
                return found
            entry = following

    def use(self, entry: int, *, killed_at: int | None = None) -> None:
        """Answer one request; `killed_at` is the step behind which the process dies, from 1.

        Raises:
            Killed: there.
        """
        buffers = self._buffers(entry)
        request = b"".join(self.memory.read(each.address, each.length) for each in buffers if not each.writable)
        answer = RESPONSE.pack(*(number + 100 for number in REQUEST.unpack(request)[1:4]))
        (room,) = [each for each in buffers if each.writable]
        self.memory.write(room.address, answer)
        steps = self._packed_steps(entry, len(answer)) if self.packed else self._split_steps(entry, len(answer))
        for number, _ in enumerate(steps, start=1):
            if number == killed_at:
                raise Killed
        os.eventfd_write(self.fds[Request.SET_VRING_CALL, 0], 1)

    def _split_steps(self, head: int, written: int) -> Generator[None]:
        self.set("next", self.get("last_batch_head"), head)
        yield
        self.set("last_batch_head", head)
        yield
        used = self.field("used.idx")
        self.put("used.ring.id", head, used % self.size)
        self.put("used.ring.len", written, used % self.size)
        self.put("used.idx", (used + 1) & 0xFFFF)
        yield
        self.set("inflight", 0, head)
        yield
        self.set("used_idx", (used + 1) & 0xFFFF)
        yield

    def _packed_steps(self, head: int, written: int) -> Generator[None]:
        last = self.get("last", head)
        self.set("next", self.get("free_head"), last)
        yield
        self.set("free_head", head)
        yield
        slot, wrap = self.get("used_idx"), self.get("used_wrap")
        following = slot + self.get("num", head)
        # The wrap counter first: with the index alone a place in the other round would be named.
        if following >= self.size:
            self.set("used_wrap", wrap ^ 1)
            following -= self.size
        self.set("used_idx", following)
        yield
        self.put("desc.id", self.get("id", last), slot)
        self.put("desc.len", written, slot)
        self.put("desc.flags", WRITE | (AVAIL | USED if wrap else 0), slot)
        yield
        self.set("inflight", 0, head)
        yield
        for name in ("free_head", "used_idx", "used_wrap"):
            self.set(f"old_{name}", self.get(name))
        yield


SPLIT_STEPS, PACKED_STEPS = 5, 6


@contextmanager
def recorder(path: Path, *, packed: bool, protocol: ProtocolFeature = PROTOCOL) -> Generator[Recorder]:
    """A back-end at `path`, gone at the end with its socket."""
    made = Recorder(path, packed=packed, protocol=protocol)
    try:
        yield made
    finally:
        made.close()
        path.unlink()

"""A PCI function made of byte arrays, which a test can make lie in any place: the hostile device itself.

It is right as it comes: an entropy device with one queue, all structures in BAR 0, MSI-X in BAR 1, shared memory in
BAR 2. Reading and writing are array accesses; beyond that it only knows what sizing a BAR and a reset are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from virtio_test import GuestMemory, OwnerLoop, VirtualClock
from virtio_test.errors import StateError
from virtio_test.spec.pci import COMMON, CapType
from virtio_test.status import Status

MESSAGES: Final = 64
ENDLESS: Final = 10_000
"""Looks at one thing that nobody makes who gives up in time."""

CAPS: Final = 0x40
COMMON_AT, NOTIFY_AT, ISR_AT, DEVICE_AT = 0, 0x1000, 0x2000, 0x3000
FEATURES: Final = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 38 | 1 << 40


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def virtio(
    kind: int,
    *,
    bar: int = 0,
    offset: int = 0,
    length: int = 0,
    number: int = 0,
    extra: bytes = b"",
    cap_len: int | None = None,
) -> bytes:
    """A virtio capability without its link."""
    size = 16 + len(extra) if cap_len is None else cap_len
    return bytes([0x09, 0, size, kind, bar, number, 0, 0]) + le(offset, 4) + le(length, 4) + extra


def common(*, bar: int = 0, offset: int = COMMON_AT, length: int = 0x40) -> bytes:
    return virtio(CapType.COMMON_CFG, bar=bar, offset=offset, length=length)


def notify(multiplier: int = 4, *, bar: int = 0, offset: int = NOTIFY_AT, length: int = 0x1000) -> bytes:
    return virtio(CapType.NOTIFY_CFG, bar=bar, offset=offset, length=length, extra=le(multiplier, 4))


def isr(*, bar: int = 0, offset: int = ISR_AT, length: int = 1) -> bytes:
    return virtio(CapType.ISR_CFG, bar=bar, offset=offset, length=length)


def device(*, bar: int = 0, offset: int = DEVICE_AT, length: int = 0x100) -> bytes:
    return virtio(CapType.DEVICE_CFG, bar=bar, offset=offset, length=length)


def window() -> bytes:
    return virtio(CapType.PCI_CFG, extra=bytes(4))


def shared(number: int, offset: int, length: int, *, bar: int = 2, cap_len: int | None = None) -> bytes:
    high = le(offset >> 32, 4) + le(length >> 32, 4)
    return virtio(
        CapType.SHARED_MEMORY_CFG,
        bar=bar,
        offset=offset & 0xFFFF_FFFF,
        length=length & 0xFFFF_FFFF,
        number=number,
        extra=high,
        cap_len=cap_len,
    )


def vendor(vendor_id: int, *, cap_len: int = 12) -> bytes:
    return bytes([0x09, 0, cap_len, CapType.VENDOR_CFG]) + le(vendor_id, 2) + b"abcdef"


def msix(vectors: int = 4, *, table: int = 1, pba: int = 0x801) -> bytes:
    return bytes([0x11, 0]) + le(vectors - 1, 2) + le(table, 4) + le(pba, 4)


GOOD: Final = (common(), notify(), isr(), device(), window(), msix())


class FakePci:
    """`PciAccess` over byte arrays.

    Attributes:
        config: the configuration space.
        places: where each of the capabilities lies that it was made with.
        masks: what each BAR register keeps of what is written to it, and its lowest bits.
        bars: what lies in each BAR.
        reads: overrides of BAR reads, by (bar, offset).
        writes: every write to a BAR: (bar, offset, size, value).
        accesses: every access to a BAR: (bar, offset, size).
    """

    def __init__(self, caps: Sequence[bytes] = GOOD, *, device_id: int = 0x1044, vectors: int = MESSAGES) -> None:
        self.clock = VirtualClock()
        self._loop = OwnerLoop(clock=self.clock)
        self._memory = GuestMemory([(0, 1 << 20)])
        self.config = bytearray(256)
        self.masks = [(0xFFFF_C000, 0), (0xFFFF_F000, 0), (0xFFF0_0000, 0x4), (0xFFFF_FFFF, 0), (0, 0), (0, 0)]
        self.bars = {0: bytearray(0x4000), 1: bytearray(0x1000), 2: bytearray(0x1000)}
        self.reads: dict[tuple[int, int], Callable[[], int]] = {}
        self.writes: list[tuple[int, int, int, int]] = []
        self.accesses: list[tuple[int, int, int]] = []
        self.looks = 0
        self.messages = vectors
        self.features = FEATURES
        self.placed: dict[int, int] = {}
        self.message_handler: Callable[[int], object] = lambda _vector: None
        self.line_handler: Callable[[], object] = lambda: None
        self.set(0x00, 2, 0x1AF4)
        self.set(0x02, 2, device_id)
        self.set(0x06, 2, 0x10)
        self.set(0x2E, 2, 4)
        self.config[0x3D] = 1
        self.places = self.lay(caps)
        self.fresh = bytearray(0x40)
        self.fresh[0x12:0x14] = le(1, 2)
        self.fresh[0x18:0x1C] = le(64, 2) + le(0xFFFF, 2)
        self.fresh[0x10:0x12] = le(0xFFFF, 2)
        self.bars[0][: len(self.fresh)] = self.fresh

    def set(self, offset: int, size: int, value: int) -> None:
        """Put a value into the configuration space."""
        self.config[offset : offset + size] = le(value, size)

    def lay(self, caps: Sequence[bytes]) -> list[int]:
        """Chain capabilities from 0x40 on; where each lies."""
        self.config[CAPS:] = bytes(256 - CAPS)
        places: list[int] = []
        link, at = 0x34, CAPS
        for cap in caps:
            self.config[at : at + len(cap)] = cap
            self.config[link] = at
            places.append(at)
            link, at = at + 1, (at + len(cap) + 3) & ~3
        assert len(self.config) == 256
        self.config[link] = 0
        return places

    def put(self, register: str, value: int) -> None:
        """Put a value into the common configuration, as it is after a reset and now."""
        place = COMMON[register]
        self.fresh[place.offset : place.offset + place.size] = le(value, place.size)
        self.bars[0][place.offset : place.offset + place.size] = le(value, place.size)

    def lie(self, register: str, value: int | Callable[[], int]) -> None:
        """Let a register of the common configuration read so, whatever is written to it."""
        self.reads[0, COMMON[register].offset] = value if callable(value) else lambda: value

    # --- the bus --------------------------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        return self._loop

    @property
    def memory(self) -> GuestMemory:
        return self._memory

    def read_config(self, offset: int, size: int) -> int:
        self.looks += 1
        assert self.looks < ENDLESS
        assert size in (1, 2, 4)
        assert offset % size == 0
        return int.from_bytes(self.config[offset : offset + size].ljust(size, b"\xff"), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        assert offset % size == 0
        assert 0 <= value < 1 << 8 * size
        if 0x10 <= offset < 0x28 and size == 4:
            mask, flags = self.masks[offset - 0x10 >> 2]
            self.set(offset, 4, value & mask | flags)
        elif offset == 4 or self.config[offset - 2 & 0xFF] == 0x11:
            self.set(offset, size, value)

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        if size > 1 << 32:
            raise StateError("no room")
        self.placed[bar] = (0x10_0000_0000 if not io and size > 1 << 24 else 0) + size * 2
        return self.placed[bar] & 0xFFFF_FFFF if size <= 1 << 24 else self.placed[bar]

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        assert bar in self.placed
        self.accesses.append((bar, offset, size))
        if (bar, offset) in self.reads:
            return self.reads[bar, offset]() & (1 << 8 * size) - 1
        if (bar, offset) == (0, COMMON_AT + 4) and size == 4:
            select = int.from_bytes(self.bars[0][:4], "little")
            return self.features >> 32 * select & 0xFFFF_FFFF if select < 4 else 0
        data = bytes(self.bars.get(bar, b"")[offset : offset + size])
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        assert bar in self.placed
        assert 0 <= value < 1 << 8 * size
        self.accesses.append((bar, offset, size))
        self.writes.append((bar, offset, size, value))
        if (bar, offset, value) == (0, COMMON["device_status"].offset, 0):
            self.bars[0][: len(self.fresh)] = self.fresh
        elif (bar, offset) == (0, COMMON["queue_reset"].offset):
            self.bars[0][: len(self.fresh)] = self.fresh
            self.bars[0][COMMON["device_status"].offset] = 0x0F
        elif bar in self.bars and offset + size <= len(self.bars[bar]):
            self.bars[bar][offset : offset + size] = le(value, size)

    def message(self, vector: int) -> tuple[int, int]:
        if vector >= self.messages:
            raise StateError("no message")
        return 0xFEE0_0000 + vector, 0x40 + vector

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        self.message_handler = message
        self.line_handler = line

    def hold_line(self) -> None:
        """Assert the line and never let go; whoever does not give up is told so."""
        turns = 0

        def turn() -> bool:
            nonlocal turns
            turns += 1
            assert turns < ENDLESS
            self.line_handler()
            return True

        self._loop.pend((self, "line"), turn)

    @property
    def status(self) -> Status:
        return Status(self.bars[0][COMMON["device_status"].offset])

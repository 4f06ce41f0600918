"""The kernel side of PCI over virtio: commands and interrupt buffers as user-mode Linux makes them, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from virtio_test._core import GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.uml import UmlPci
from virtio_test.clock import VirtualClock
from virtio_test.device import RING_FEATURES, Device
from virtio_test.driver.alloc import Arena
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pcidev import HEADER, Op
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci

BUFFERS: Final = 10
BUFFER_SIZE: Final = 20
HALF: Final = 8 << 20
WINDOW: Final = 0xF000_0000
VECTOR: Final = 64
MESSAGES: Final = 0xA0000
TURNS: Final = 100
"""How often the command queue is looked at for an answer."""


def command(op: int, address: int = 0, size: int = 0, *, bar: int = 0, data: bytes = b"") -> bytes:
    return HEADER.pack(op, bar, 0, size, address) + data


class UmlKernel:
    """A kernel with one PCI function on its bus: `PciAccess`, over the two queues.

    It waits for an answer as the real one does: without letting anything else run on its own side.
    """

    def __init__(
        self,
        device: Device,
        *,
        declaration: Declaration | None = None,
        packed: bool = False,
        buffers: int = BUFFERS,
    ) -> None:
        self.memory = GuestMemory([(0, 2 * HALF)])
        self.loop = OwnerLoop(clock=VirtualClock())
        self.function = VirtioPci(
            device,
            declaration=declaration or declare(device, flavour="non-transitional"),
            loop=self.loop,
            memory=self.memory,
        )
        self.uml = UmlPci(self.function)
        self.bus = Loopback(self.uml, loop=self.loop, memory=self.memory)
        wanted = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
        self.outer = Driver(self.bus, wanted=wanted, arena=Arena(self.memory, size=HALF))
        self.inner_arena = Arena(self.memory, address=HALF)
        self.interrupts: list[bytes] = []
        self.buffers = buffers
        self._message: Callable[[int], object] = lambda _: None
        self._line: Callable[[], object] = lambda: None
        self._next = WINDOW
        self._bases: dict[int, int] = {}
        self.outer.initialize()
        for _ in range(buffers):
            self.give_buffer()

    # --- the two queues -------------------------------------------------------------------------------------

    def send(self, pieces: Sequence[bytes], room: Sequence[int] = ()) -> bytes:
        """One command, whose descriptors are `pieces` and `room`; what the device has written."""
        queue = self.outer.queues[0]
        readable = [(self.outer.arena.allocate(len(piece)), len(piece)) for piece in pieces]
        writable = [(self.outer.arena.allocate(size), size) for size in room]
        for (address, _), piece in zip(readable, pieces, strict=True):
            self.memory.write(address, piece)
        token = queue.add(readable, writable)
        queue.signal()
        used = queue.get_used()
        for _ in range(TURNS):
            if used is not None:
                break
            assert self.outer.broken is None
            self.uml.kicked(0)
            used = queue.get_used()
        assert used is not None
        assert used[0] == token
        answer = b"".join(self.memory.read(address, size) for address, size in writable)[: used[1]]
        for address, _ in (*readable, *writable):
            self.outer.arena.free(address)
        return answer

    def give_buffer(self, size: int = BUFFER_SIZE) -> Request:
        """One more buffer for interrupts."""
        return self.outer.submit(1, [], [size], on_done=self._interrupted)

    def _interrupted(self, request: Request) -> None:
        if request.error is not None:
            return
        self.interrupts.append(request.data)
        if len(self.interrupts) < 1 << 16 and self.buffers:
            self.give_buffer()
        if len(request.data) < HEADER.size:
            return
        op, _, _, size, _ = HEADER.unpack_from(request.data)
        if op == Op.INT:
            self._line()
        elif op == Op.MSI:
            number = int.from_bytes(request.data[HEADER.size : HEADER.size + size], "little")
            self._message(number - VECTOR)

    # --- `PciAccess` ----------------------------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        return self._answer(self.send([command(Op.CFG_READ, offset, size)], [8]), size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        # As the real one: always 8 bytes of data, of which the first count.
        self.send([command(Op.CFG_WRITE, offset, size, data=value.to_bytes(size, "little").ljust(8, b"\0"))])

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        assert not io, "user-mode Linux has no I/O ports"
        self._bases[bar] = (self._next + size - 1) & -size
        self._next = self._bases[bar] + size
        return self._bases[bar]

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return self._answer(self.send([command(Op.MMIO_READ, offset, size, bar=bar)], [size]), size)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.send([command(Op.MMIO_WRITE, offset, size, bar=bar), value.to_bytes(size, "little")])

    def message(self, vector: int) -> tuple[int, int]:
        return MESSAGES, VECTOR + vector

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        self._message = message
        self._line = line

    @staticmethod
    def _answer(data: bytes, size: int) -> int:
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

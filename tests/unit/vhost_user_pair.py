"""A back-end and who speaks to it in one thread and on one virtual clock: each message and what it sets in motion."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.clock import VirtualClock
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.sockets.fds import OwnedFd
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import Decoder, Message, encode, encode_reply
from virtio_test.transport.vhost_user.frontend import USER_OFFSET
from virtio_test.transport.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    PROTOCOL_FEATURES_BIT,
    Permission,
    Request,
)
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Iotlb,
    MemoryRegion,
    MemoryTable,
    Payload,
    VringAddress,
    VringState,
)
from virtio_test.transport.vhost_user.rings import Ring
from virtio_test.transport.vhost_user.session import SUPPORTED, Session

SIZE: Final = 8
MEMORY_BYTES: Final = 1 << 20
PROTOCOL: Final = 1 << PROTOCOL_FEATURES_BIT
R = Request
_MOST_TURNS: Final = 64


class Counting(BaseDevice):
    """Answers in upper case, and counts what it is asked."""

    def __init__(self) -> None:
        handlers = {0: bytes.upper, 1: bytes.upper}
        super().__init__(7, handlers=handlers, queue_sizes=(SIZE, SIZE), features=RING_FEATURES)
        self.asked = Counter[str]()

    def start_queue(self, queue: DeviceQueue) -> None:
        self.asked[f"start {queue.index}"] += 1
        super().start_queue(queue)

    def kicked(self, queue_index: int) -> bool:
        self.asked[f"kick {queue_index}"] += 1
        return super().kicked(queue_index)

    def reset(self) -> None:
        self.asked["reset"] += 1
        super().reset()


class Pair:
    """The back-end of a device, and the socket at its other end.

    Args:
        device: what is served.
        options: what `Backend` takes more.
    """

    def __init__(self, device: BaseDevice | None = None, **options: Any) -> None:
        self.device = Counting() if device is None else device
        self.clock = VirtualClock()
        self.loop = OwnerLoop(clock=self.clock)
        self.mine, theirs = socket.socketpair()
        options.setdefault("protocol_features", SUPPORTED)
        self.backend = Backend(self.device, fd=theirs.detach(), loop=self.loop, **options)
        self.memory = GuestMemory([(0, MEMORY_BYTES)])
        self.kicks: dict[int, Notifier] = {}
        self._decoder = Decoder(FRONTEND_REQUESTS, replies=True)

    def close(self) -> None:
        self.mine.close()
        self.settle()
        self.backend.close()

    def settle(self) -> None:
        """Everything that can be done at once; it must come to an end."""
        turns = count()
        assert not self.loop.run(until=lambda: next(turns) > _MOST_TURNS, timeout=1e-6), "it never comes to rest"

    @property
    def session(self) -> Session:
        assert self.backend.session is not None
        return self.backend.session

    @property
    def rings(self) -> list[Ring]:
        return self.session.rings.rings

    def ask(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> Message | None:
        """The answer to a request; None when the connection has ended instead."""
        socket.send_fds(self.mine, [encode(request, payload, need_reply=True)], list(fds))
        self.settle()
        while data := self.mine.recv(self._decoder.wanted, socket.MSG_DONTWAIT):
            for message in self._decoder.feed(data):
                return message
        return None

    def told(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> int:
        """The number that answers a request: 0 when it was done."""
        reply = self.ask(request, payload, fds)
        assert reply is not None
        assert isinstance(reply.payload, U64)
        return reply.payload.value

    def do(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        assert self.told(request, payload, fds) == 0

    def protocol(self, bits: int) -> None:
        self.do(R.SET_PROTOCOL_FEATURES, U64(bits))

    def features(self, *names: str, protocol_bit: bool = True) -> None:
        accepted = FeatureSet("VERSION_1", *names)
        self.do(R.SET_FEATURES, U64(accepted.bits | (PROTOCOL if protocol_bit else 0)))

    def share(self, *regions: tuple[int, int, int]) -> None:
        """Share `regions` (guest address, user address, size), each of the file's start; the memory when none."""
        table = [
            MemoryRegion(guest, size, user, 0) for guest, user, size in regions or ((0, USER_OFFSET, MEMORY_BYTES),)
        ]
        fd = self.memory.regions[0].fd
        assert fd is not None
        self.do(R.SET_MEM_TABLE, MemoryTable(tuple(table)), [fd] * len(table))

    def address(self, layout: RingLayout, index: int = 0, *, offset: int = USER_OFFSET, **more: int) -> VringAddress:
        return VringAddress(
            index,
            more.get("flags", 0),
            layout.desc + offset,
            layout.device + offset,
            layout.driver + offset,
            more.get("log", 0),
        )

    def setup(self, layout: RingLayout, index: int = 0, *, offset: int = USER_OFFSET) -> None:
        """Everything that a ring needs, its kick fd and SET_VRING_ENABLE too."""
        self.kicks[index] = Notifier.eventfd()
        self.do(R.SET_VRING_NUM, VringState(index, layout.size))
        self.do(R.SET_VRING_BASE, VringState(index, 0))
        self.do(R.SET_VRING_ADDR, self.address(layout, index, offset=offset))
        self.do(R.SET_VRING_KICK, U64(index), [self.kicks[index].fileno()])
        self.do(R.SET_VRING_ENABLE, VringState(index, 1))

    def live(self, *names: str, index: int = 0, protocol_bit: bool = True) -> DriverQueue:
        """The driver's end of a ring that runs."""
        packed = "RING_PACKED" in names
        self.features(*names, protocol_bit=protocol_bit)
        self.share()
        layout = RingLayout.contiguous(SIZE, 0x1000, packed=packed)
        self.setup(layout, index)
        assert self.rings[index].running
        features = FeatureSet("VERSION_1", *names).bits
        return DriverQueue(self.memory, QueueConfig.from_layout(layout, index=index, features=features))

    def post(self, queue: DriverQueue, index: int = 0) -> int:
        """A request, and a kick for it."""
        self.memory.write(0x8000, b"hello")
        token = queue.add([(0x8000, 5)], [(0x9000, 5)])
        queue.publish()
        self.kicks[index].notify()
        return token

    # --- the device IOTLB -----------------------------------------------------------------------------------

    def channel(self) -> socket.socket:
        """The front-end's end of the back-end's channel."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.do(R.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        return ours

    def map(self, address: int, size: int) -> None:
        """All of it at the same address for the device."""
        both = int(Permission.READ | Permission.WRITE)
        self.do(R.IOTLB_MSG, Iotlb(address, size, address + USER_OFFSET, both, 2))


def misses(channel: socket.socket) -> list[Message]:
    """What has come over the channel by now."""
    found: list[Message] = []
    decoder = Decoder(BACKEND_REQUESTS)
    while True:
        try:
            data = channel.recv(decoder.wanted, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        found += decoder.feed(data)


def answer(channel: socket.socket, message: Message, value: int) -> None:
    channel.send(encode_reply(message.request, U64(value)))


@contextmanager
def pair(device: BaseDevice | None = None, **options: Any) -> Generator[Pair]:
    """A pair, gone at the end."""
    made = Pair(device, **options)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def file(size: int) -> Generator[OwnedFd]:
    """A file of zeros that is only memory."""
    fd = OwnedFd(os.memfd_create("file", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), size)
    try:
        yield fd
    finally:
        fd.close()

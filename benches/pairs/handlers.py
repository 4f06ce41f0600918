"""Handlers in Python: what is around one, request by request and as a whole batch.

Requests are the test device's, 48 bytes with an answer of 12. Each round puts bursts into a queue with our own driver
end; only the device's part is timed, with the same clock around the same bursts on both sides. Both sides answer the
same requests, in a memory each, and the answers are compared byte by byte after each burst. A round's time is that of
its median burst: a process that takes the core for a while hits few of them.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout

from benches.peers.plain import PlainQueue
from benches.runner import BenchError, Case, Round, turns

REQUEST = struct.Struct("<4I32s")
ANSWER = struct.Struct("<3I")
WORDS = struct.Struct("<4I")
SIZE = 256
MEMORY = 1 << 20
BUFFERS = 0x10000
"""Where request 0 lies; its answer follows it, and the next pair begins 64 bytes on."""

BURSTS = 400
"""Bursts of one round; of 4 in a quick one."""


def handler(request: bytes) -> bytes:
    """The test device's arithmetic, without logging."""
    _, arg1, arg2, arg3 = WORDS.unpack_from(request)
    return ANSWER.pack(arg1 + 100 & 0xFFFFFFFF, arg2 + 100 & 0xFFFFFFFF, arg3 + 100 & 0xFFFFFFFF)


def requests_of(burst: int) -> list[bytes]:
    """What the driver asks in a burst."""
    return [REQUEST.pack(i, i + 1, 0xFFFFFFFF - i, 7 * i, b"hello back end!") for i in range(burst)]


def answers_of(requests: Sequence[bytes]) -> list[bytes]:
    """What it must get: the arithmetic once more, in other words than the handlers'."""
    every = [[(word + 100) % 2**32 for word in struct.unpack("<12I", request)[1:4]] for request in requests]
    return [b"".join(word.to_bytes(4, "little") for word in words) for words in every]


class Driver:
    """A memory with a ring, a burst of requests laid out in it, and the driver's end."""

    def __init__(self, burst: int, *, packed: bool) -> None:
        self.memory = GuestMemory([(0, MEMORY)])
        self.layout = RingLayout.contiguous(SIZE, 0x1000, packed=packed)
        self.config = QueueConfig.from_layout(self.layout)
        self.queue = DriverQueue(self.memory, self.config)
        self.burst = burst
        requests = requests_of(burst)
        self.answers = answers_of(requests)
        for i, request in enumerate(requests):
            self.memory.write(BUFFERS + 64 * i, request)

    def add(self) -> None:
        """Make the burst available, with room for answers that is zeroed."""
        for i in range(self.burst):
            self.memory.write(BUFFERS + 64 * i + 48, bytes(12))
            self.queue.add([(BUFFERS + 64 * i, 48)], [(BUFFERS + 64 * i + 48, 12)])
        self.queue.publish()

    def check(self, done: int) -> None:
        """Take the burst back: it must be answered, all of it and rightly."""
        used = self.queue.get_used_many()
        if done != self.burst or [length for _, length in used] != [12] * self.burst:
            raise BenchError(f"{done} of {self.burst} requests were answered: {used}")
        answers = [self.memory.read(BUFFERS + 64 * i + 48, 12) for i in range(self.burst)]
        if answers != self.answers:
            raise BenchError(f"wrong answers: {answers}")

    def measure(self, work: Callable[[], int], bursts: int) -> float:
        """Nanoseconds per request of `work`, which answers one burst and says how many requests that were."""
        spent: list[int] = []
        for _ in range(bursts):
            self.add()
            start = time.perf_counter_ns()
            done = work()
            spent.append(time.perf_counter_ns() - start)
            self.check(done)
        return statistics.median(spent) / self.burst


def per_request(burst: int, bursts: int, *, packed: bool) -> Callable[[], float]:
    """Ours: `process` with the handler."""
    driver = Driver(burst, packed=packed)
    process = DeviceQueue(driver.memory, driver.config).process
    return lambda: driver.measure(lambda: process(handler), bursts)


def alone(burst: int, bursts: int) -> Callable[[], float]:
    """The handler called from Python, on bytes that are there already; burst by burst, as the queues do."""
    requests = requests_of(burst)
    answers = answers_of(requests)

    def run() -> float:
        spent: list[int] = []
        for _ in range(bursts):
            start = time.perf_counter_ns()
            for request in requests:
                handler(request)
            spent.append(time.perf_counter_ns() - start)
        if [handler(request) for request in requests] != answers:
            raise BenchError("the handler answers wrongly")
        return statistics.median(spent) / burst

    return run


@contextmanager
def plain(burst: int, bursts: int) -> Generator[Callable[[], float]]:
    """The plain Python back-end, on a split ring."""
    driver = Driver(burst, packed=False)
    layout = driver.layout
    places = {"desc": layout.desc, "avail": layout.driver, "used": layout.device}
    fd = driver.memory.regions[0].fd
    if fd is None:
        raise BenchError("the memory has no file that the plain back-end could map")
    queue = PlainQueue(fd, MEMORY, size=SIZE, **places)
    try:
        yield lambda: driver.measure(lambda: queue.process(handler), bursts)
    finally:
        queue.close()


def _case(packed: bool) -> Iterator[Case]:
    ring = "packed" if packed else "split"

    @contextmanager
    def against_alone(quick: bool) -> Generator[Round]:
        bursts = 4 if quick else BURSTS
        yield turns(per_request(32, bursts, packed=packed), alone(32, bursts))

    @contextmanager
    def against_plain(quick: bool) -> Generator[Round]:
        bursts = 4 if quick else BURSTS // 4
        with plain(32, bursts) as peer:
            yield turns(per_request(32, bursts, packed=packed), peer)

    shape = f"{ring}, per request, burst 32"
    yield Case("handlers", f"{shape}: handler called from Python", "ns/request", against_alone, must=0.71, aim=0.91)
    yield Case("handlers", f"{shape}: plain Python back-end", "ns/request", against_plain, must=10, aim=14)


def cases() -> Sequence[Case]:
    """Both rings."""
    return [case for packed in (False, True) for case in _case(packed)]

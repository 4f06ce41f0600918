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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout

from benches.peers.plain import Memory, PlainQueue
from benches.runner import BenchError, Case, Round, turns

REQUEST = struct.Struct("<4I32s")
ANSWER = struct.Struct("<3I")
WORDS = struct.Struct("<4I")
SIZE = 256
MEMORY = 1 << 20
BUFFERS = 0x10000
"""Where request 0 lies; its answer follows it, and the next pair begins 64 bytes on."""

BURSTS = 100
"""Bursts of one round; of 4 in a quick one."""


def handler(request: bytes) -> bytes:
    """The test device's arithmetic, without logging."""
    _, arg1, arg2, arg3 = WORDS.unpack_from(request)
    return ANSWER.pack(arg1 + 100 & 0xFFFFFFFF, arg2 + 100 & 0xFFFFFFFF, arg3 + 100 & 0xFFFFFFFF)


HUNDRED = np.uint32(100)


def batch_handler(requests: memoryview, responses: memoryview) -> None:
    """The same for a whole batch, in numpy: three columns of the requests, and all of the responses."""
    rows = len(responses) // ANSWER.size
    words = np.ndarray((rows, 3), "<u4", requests, offset=4, strides=(REQUEST.size, 4))
    np.add(words, HUNDRED, out=np.ndarray((rows, 3), "<u4", responses))


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


def at_once(burst: int, bursts: int, *, packed: bool) -> Callable[[], float]:
    """Ours: `process_batch` with the numpy handler."""
    driver = Driver(burst, packed=packed)
    process = DeviceQueue(driver.memory, driver.config).process_batch
    return lambda: driver.measure(
        lambda: process(batch_handler, request_size=REQUEST.size, response_size=ANSWER.size, limit=burst), bursts
    )


def beside(
    burst: int, bursts: int, work: Callable[[], object], answers: Callable[[], list[bytes]]
) -> Callable[[], float]:
    """Nanoseconds per request of `work` on requests that are there already; `answers` shows what it comes to.

    What happens between the bursts is what happens between ours, so that neither side finds its code and data warmer:
    a queue is filled, answered and checked.
    """
    driver = Driver(burst, packed=False)
    process = DeviceQueue(driver.memory, driver.config).process

    def run() -> float:
        spent: list[int] = []
        for _ in range(bursts):
            driver.add()
            start = time.perf_counter_ns()
            work()
            spent.append(time.perf_counter_ns() - start)
            driver.check(process(handler))
        if answers() != driver.answers:
            raise BenchError(f"wrong answers without a queue: {answers()}")
        return statistics.median(spent) / burst

    return run


def alone(burst: int, bursts: int) -> Callable[[], float]:
    """The handler called from Python, request by request, and its answers dropped."""
    requests = requests_of(burst)

    def each() -> None:
        for request in requests:
            handler(request)

    return beside(burst, bursts, each, lambda: [handler(request) for request in requests])


def array(burst: int, bursts: int) -> Callable[[], float]:
    """The numpy handler called on one plain buffer."""
    requests = memoryview(b"".join(requests_of(burst)))
    responses = memoryview(bytearray(ANSWER.size * burst))

    def rows() -> list[bytes]:
        return [bytes(responses[at : at + ANSWER.size]) for at in range(0, len(responses), ANSWER.size)]

    return beside(burst, bursts, lambda: batch_handler(requests, responses), rows)


@contextmanager
def plain_queue(driver: Driver) -> Generator[PlainQueue]:
    """The plain Python back-end on a driver's split ring."""
    fd = driver.memory.regions[0].fd
    if fd is None:
        raise BenchError("the memory has no file that the plain back-end could map")
    memory, layout = Memory([(0, MEMORY, fd)]), driver.layout
    try:
        yield PlainQueue(memory, SIZE, layout.desc, layout.driver, layout.device)
    finally:
        memory.close()


@contextmanager
def plain(burst: int, bursts: int) -> Generator[Callable[[], float]]:
    """The plain Python back-end with the handler."""
    driver = Driver(burst, packed=False)
    with plain_queue(driver) as queue:
        yield lambda: driver.measure(lambda: queue.process(handler), bursts)


Side = Callable[[int], AbstractContextManager[Callable[[], float]]]
"""Sets one side up for so many bursts in a round; what it gives measures them."""


def _pair(shape: str, ours: Side, peer: Side, must: float | None = None, aim: float | None = None) -> Case:
    @contextmanager
    def both(quick: bool) -> Generator[Round]:
        bursts = 4 if quick else BURSTS
        with ours(bursts) as mine, peer(bursts) as theirs:
            yield turns(mine, theirs)

    return Case("handlers", shape, "ns/request", both, must=must, aim=aim)


def _cases(ring: str) -> Iterator[Case]:
    packed = ring == "packed"
    one = f"{ring}, per request, burst 32"

    def each(bursts: int) -> AbstractContextManager[Callable[[], float]]:
        return nullcontext(per_request(32, bursts, packed=packed))

    def bare(bursts: int) -> AbstractContextManager[Callable[[], float]]:
        return nullcontext(alone(32, bursts))

    yield _pair(f"{one}: handler called from Python", each, bare, 0.71, 0.91)
    yield _pair(f"{one}: plain Python back-end", each, partial(plain, 32), 10, 14)
    for burst, must, aim in ((32, 25, 35), (128, 45, 70)):
        many = f"{ring}, numpy batch of {burst}"

        def batch(bursts: int, burst: int = burst) -> AbstractContextManager[Callable[[], float]]:
            return nullcontext(at_once(burst, bursts, packed=packed))

        def numpy(bursts: int, burst: int = burst) -> AbstractContextManager[Callable[[], float]]:
            return nullcontext(array(burst, bursts))

        yield _pair(f"{many}: plain Python back-end", batch, partial(plain, burst), must, aim)
        yield _pair(f"{many}: numpy on a plain array", batch, numpy)


def cases() -> Sequence[Case]:
    """Both rings."""
    return [case for ring in ("split", "packed") for case in _cases(ring)]

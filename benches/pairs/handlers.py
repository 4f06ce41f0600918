"""Handlers in Python: what is around one, request by request and as a whole batch.

Requests are the test device's, 48 bytes with an answer of 12. Our own driver end fills a ring, and the device answers
it burst by burst; only its part is timed, with the same clock around the same bursts on both sides. Both sides answer
the same requests, in a memory each, and all answers are compared byte by byte when the ring is empty. A round's time is
that of its median burst: few are hit by a process that takes the core for a while, and few are the first after the
driver was at work, whose code and data are in the caches then.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout

from benches.build import built
from benches.peers.plain import Memory, PlainQueue
from benches.runner import BenchError, Case, Round, turns

REQUEST = struct.Struct("<4I32s")
ANSWER = struct.Struct("<3I")
SIZE = 1024
"""Descriptors of the ring: two for each request."""

MEMORY = 1 << 20
BUFFERS = 0x10000
"""Where request 0 lies; its answer follows it, and the next pair begins 64 bytes on."""

FILLS = 12
"""How often the ring is filled in one round; once in a quick one."""


read, write = struct.Struct("<4x3I").unpack_from, ANSWER.pack


def handler(request: bytes) -> bytes:
    """The test device's arithmetic, without logging."""
    arg1, arg2, arg3 = read(request)
    return write(arg1 + 100 & 0xFFFFFFFF, arg2 + 100 & 0xFFFFFFFF, arg3 + 100 & 0xFFFFFFFF)


WORD = np.dtype("<u4")
HUNDRED = WORD.type(100)


def batch_handler(requests: memoryview, responses: memoryview) -> None:
    """The same for a whole batch, in numpy: three columns of the requests, and all of the responses."""
    rows = len(responses) // ANSWER.size
    words = np.ndarray((rows, 3), WORD, requests, 4, (48, 4))
    np.add(words, HUNDRED, np.ndarray((rows, 3), WORD, responses))


REQUESTS = [REQUEST.pack(i, i + 1, 0xFFFFFFFF - i, 7 * i, b"hello back end!") for i in range(SIZE // 2)]
"""What the driver asks when it fills the ring."""

ANSWERS = [
    b"".join(((word + 100) % 2**32).to_bytes(4, "little") for word in struct.unpack("<12I", request)[1:4])
    for request in REQUESTS
]
"""What it must get: the arithmetic once more, in other words than the handlers'."""


class Driver:
    """A memory with a ring, requests laid out in it, and the driver's end."""

    def __init__(self, *, packed: bool) -> None:
        self.memory = GuestMemory([(0, MEMORY)])
        self.layout = RingLayout.contiguous(SIZE, 0x1000, packed=packed)
        self.config = QueueConfig.from_layout(self.layout)
        self.queue = DriverQueue(self.memory, self.config)
        for i, request in enumerate(REQUESTS):
            self.memory.write(BUFFERS + 64 * i, request)

    def add(self, count: int = len(REQUESTS)) -> None:
        """Make requests available, with room for answers that is zeroed."""
        places = [BUFFERS + 64 * i for i in range(count)]
        for place in places:
            self.memory.write(place + 48, bytes(12))
        self.queue.add_many([([(place, 48)], [(place + 48, 12)]) for place in places])
        self.queue.publish()

    def check(self, done: int, count: int = len(REQUESTS)) -> None:
        """Take them back: they must be answered, all of them and rightly."""
        used = self.queue.get_used_many()
        if done != count or [length for _, length in used] != [12] * count:
            raise BenchError(f"{done} of {count} requests were answered: {used}")
        answers = [self.memory.read(BUFFERS + 64 * i + 48, 12) for i in range(count)]
        if answers != ANSWERS[:count]:
            raise BenchError(f"wrong answers: {answers}")

    def measure(self, burst: int, fills: int, work: Callable[[], int]) -> float:
        """Nanoseconds per request of `work`, which answers one burst and says how many requests that were."""
        spent: list[int] = []
        for _ in range(fills):
            self.add()
            done = 0
            for _ in range(len(REQUESTS) // burst):
                start = time.perf_counter_ns()
                done += work()
                spent.append(time.perf_counter_ns() - start)
            self.check(done)
        return statistics.median(spent) / burst


def per_request(burst: int, fills: int, *, packed: bool) -> Callable[[], float]:
    """Ours: `process` with the handler."""
    driver = Driver(packed=packed)
    process = DeviceQueue(driver.memory, driver.config).process
    return lambda: driver.measure(burst, fills, lambda: process(handler, limit=burst))


def at_once(burst: int, fills: int, *, packed: bool) -> Callable[[], float]:
    """Ours: `process_batch` with the numpy handler."""
    driver = Driver(packed=packed)
    process = DeviceQueue(driver.memory, driver.config).process_batch
    return lambda: driver.measure(
        burst, fills, lambda: process(batch_handler, request_size=48, response_size=12, limit=burst)
    )


def alone(burst: int, fills: int) -> Callable[[], float]:
    """The handler called from Python, request by request, on bytes that are there already; its answers are dropped."""

    def run() -> float:
        spent: list[int] = []
        for _ in range(fills):
            for at in range(0, len(REQUESTS), burst):
                requests = REQUESTS[at : at + burst]
                start = time.perf_counter_ns()
                for request in requests:
                    handler(request)
                spent.append(time.perf_counter_ns() - start)
        if [handler(request) for request in REQUESTS] != ANSWERS:
            raise BenchError("wrong answers of the handler alone")
        return statistics.median(spent) / burst

    return run


def array(burst: int, fills: int) -> Callable[[], float]:
    """The numpy handler called on plain buffers of the same size."""

    def run() -> float:
        spent: list[int] = []
        for _ in range(fills):
            for at in range(0, len(REQUESTS), burst):
                requests = memoryview(b"".join(REQUESTS[at : at + burst]))
                responses = memoryview(bytearray(ANSWER.size * burst))
                start = time.perf_counter_ns()
                batch_handler(requests, responses)
                spent.append(time.perf_counter_ns() - start)
                if bytes(responses) != b"".join(ANSWERS[at : at + burst]):
                    raise BenchError("wrong answers of numpy alone")
        return statistics.median(spent) / burst

    return run


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
def plain(burst: int, fills: int) -> Generator[Callable[[], float]]:
    """The plain Python back-end with the handler."""
    driver = Driver(packed=False)
    with plain_queue(driver) as queue:
        yield lambda: driver.measure(burst, fills, lambda: queue.process(handler, burst))


@contextmanager
def in_rust(burst: int, fills: int, *, packed: bool) -> Generator[Callable[[], float]]:
    """The same device end with a handler in Rust: `benches/peers/handler.rs`, in a process that waits for its turn."""
    arguments = [built("handler"), "packed" if packed else "split", str(burst), str(fills)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise BenchError("no pipe to the handler in Rust")
        asked, answered = process.stdin, process.stdout

        def run() -> float:
            asked.write("\n")
            asked.flush()
            nanos, _, answers = answered.readline().rstrip().partition(" ")
            if answers != b"".join(ANSWERS).hex():
                raise BenchError(f"wrong answers of the handler in Rust: {answers or 'none'}")
            return float(nanos)

        try:
            yield run
        finally:
            asked.close()


Side = Callable[[int], AbstractContextManager[Callable[[], float]]]
"""Sets one side up for so many fills of the ring in a round; what it gives measures them."""


def _pair(shape: str, ours: Side, peer: Side, must: float | None = None, aim: float | None = None) -> Case:
    @contextmanager
    def both(quick: bool) -> Generator[Round]:
        fills = 1 if quick else FILLS
        with ours(fills) as mine, peer(fills) as theirs:
            yield turns(mine, theirs)

    return Case("handlers", shape, "ns/request", both, must=must, aim=aim, cores=1)


def _cases(ring: str) -> Iterator[Case]:
    packed = ring == "packed"
    one = f"{ring}, per request, burst 32"

    def each(fills: int) -> AbstractContextManager[Callable[[], float]]:
        return nullcontext(per_request(32, fills, packed=packed))

    def bare(fills: int) -> AbstractContextManager[Callable[[], float]]:
        return nullcontext(alone(32, fills))

    yield _pair(f"{one}: handler called from Python", each, bare, 0.71, 0.91)
    yield _pair(f"{one}: plain Python back-end", each, partial(plain, 32), 10, 14)
    for burst, must, aim in ((32, 25, 35), (128, 45, 70)):
        many = f"{ring}, numpy batch of {burst}"

        def batch(fills: int, burst: int = burst) -> AbstractContextManager[Callable[[], float]]:
            return nullcontext(at_once(burst, fills, packed=packed))

        def numpy(fills: int, burst: int = burst) -> AbstractContextManager[Callable[[], float]]:
            return nullcontext(array(burst, fills))

        yield _pair(f"{many}: plain Python back-end", batch, partial(plain, burst), must, aim)
        yield _pair(f"{many}: numpy on a plain array", batch, numpy)
    yield _pair(f"{many}: handler in Rust", batch, partial(in_rust, burst, packed=packed), 0.333, 0.556)


def cases() -> Sequence[Case]:
    """Both rings."""
    return [case for ring in ("split", "packed") for case in _cases(ring)]

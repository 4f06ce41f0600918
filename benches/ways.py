"""Nanoseconds per request of the ways to write a handler, beside the handler called alone.

Each row drives our own driver end and device end in one thread over one memory, in bursts; only the device's
part is timed. Medians of rounds; compare rows of one run, not runs. `python -m benches.ways [--json]`.
"""

from __future__ import annotations

import json
import statistics
import struct
import sys
import time
from collections.abc import Callable

from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout, build_info

REQUEST = struct.Struct("<4I32s")
ANSWER = struct.Struct("<3I")
WORDS = struct.Struct("<4I")
SIZE = 256
ROUNDS = 15
BURSTS = 200


def handler(request: bytes) -> bytes:
    """The test device's arithmetic, without logging."""
    _, arg1, arg2, arg3 = WORDS.unpack_from(request)
    return ANSWER.pack(arg1 + 100 & 0xFFFFFFFF, arg2 + 100 & 0xFFFFFFFF, arg3 + 100 & 0xFFFFFFFF)


def batch_handler(requests: memoryview, responses: memoryview) -> None:
    """The same for a whole batch, in numpy."""
    import numpy as np

    words = np.frombuffer(requests, dtype="<u4").reshape(-1, REQUEST.size // 4)
    np.add(words[:, 1:4], 100, out=np.frombuffer(responses, dtype="<u4").reshape(-1, 3))


class Pair:
    """Both ends of one queue, with `burst` requests laid out in memory."""

    def __init__(self, burst: int, *, packed: bool) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        config = QueueConfig.from_layout(RingLayout.contiguous(SIZE, 0x1000, packed=packed))
        self.driver = DriverQueue(self.memory, config)
        self.device = DeviceQueue(self.memory, config)
        self.burst = burst
        for i in range(burst):
            self.memory.write(0x10000 + 64 * i, REQUEST.pack(i, i + 1, i + 2, i + 3, b"hello back end!"))

    def time(self, work: Callable[[], int]) -> float:
        """Nanoseconds per request of `work`, which handles one burst and says how many it did."""
        spent = 0
        for _ in range(BURSTS):
            for i in range(self.burst):
                self.driver.add([(0x10000 + 64 * i, 48)], [(0x10030 + 64 * i, 12)])
            self.driver.publish()
            start = time.perf_counter_ns()
            done = work()
            spent += time.perf_counter_ns() - start
            used = self.driver.get_used_many()
            if done != self.burst or [length for _, length in used] != [12] * self.burst:
                msg = f"{done} of {self.burst} requests were answered: {used}"
                raise RuntimeError(msg)
            answer = ANSWER.unpack(self.memory.read(0x10030 + 64 * (self.burst - 1), 12))
            if answer[0] != self.burst + 100:
                msg = f"a wrong answer: {answer}"
                raise RuntimeError(msg)
        return spent / BURSTS / self.burst


def alone(burst: int) -> float:
    """Nanoseconds of the handler called from a Python loop, on bytes that are there already."""
    requests = [REQUEST.pack(i, i + 1, i + 2, i + 3, b"hello back end!") for i in range(burst)]
    start = time.perf_counter_ns()
    for _ in range(BURSTS):
        for request in requests:
            handler(request)
    return (time.perf_counter_ns() - start) / BURSTS / burst


def measure() -> list[dict[str, object]]:
    """One row for each way, ring and burst."""
    rows: list[dict[str, object]] = []
    for packed in (False, True):
        for burst in (1, 32, 128):
            pair = Pair(burst, packed=packed)
            device = pair.device
            ways: dict[str, Callable[[], float]] = {
                "handler alone": lambda burst=burst: alone(burst),
                "per request": lambda pair=pair, device=device: pair.time(lambda: device.process(handler)),
                "batch, numpy": lambda pair=pair, device=device: pair.time(
                    lambda: device.process_batch(batch_handler, request_size=48, response_size=12)
                ),
            }
            rounds = [{name: way() for name, way in ways.items()} for _ in range(ROUNDS)]
            for name in ways:
                nanos = statistics.median(row[name] for row in rounds)
                ring = "packed" if packed else "split"
                rows.append({"way": name, "ring": ring, "burst": burst, "ns": round(nanos, 1)})
    return rows


def render(rows: list[dict[str, object]]) -> str:
    """The rows as a table."""
    head = f"ns per request, median of {ROUNDS} rounds, {build_info()['profile']} build"
    lines = [f"{row['ring']:<7} burst {row['burst']:>4}  {row['way']:<14} {row['ns']:>9}" for row in rows]
    return "\n".join([head, *lines])


def main() -> str:
    """Measure and print, as text or with `--json` one object per line."""
    rows = measure()
    text = "\n".join(json.dumps(row) for row in rows) if "--json" in sys.argv[1:] else render(rows)
    print(text)
    return text


if __name__ == "__main__":
    main()

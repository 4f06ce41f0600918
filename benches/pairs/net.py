"""Packets through a vhost-user back-end: ours against DPDK's net_vhost, with DPDK's virtio-user as the driver of both.

Each back-end has a driver of its own, and all four processes stay up for a case; what is not measured just now does not
run: testpmd has stopped forwarding, and our thread is parked. Both poll when they are measured. The back-end has the
first CPU that is ours, the driver the second. What counts is what the driver's port says it has sent or received, in a
stretch of time between two looks. Afterwards both ends must have counted the same packets, up to what a ring holds, and
every byte of them.

*to* is a driver that sends as fast as its ring empties, to a back-end that takes each frame and drops it; *from* is the
other way round; *both* is frames that go round and round between them. net_vhost does more with each: it allocates a
packet, and takes locks. Neither has huge pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

from virtio_test.devices.net import Backend as Network
from virtio_test.devices.net import Generate, NetDevice
from virtio_test.transport.vhost_user.backend import Backend

from benches.runner import BenchError, Case, MissingPeer, Round, turns
from tests.kernel.cache import BuildError
from tests.peers.dpdk import Testpmd

Way = Literal["to", "from", "both"]
WORDS: Final[dict[Way, str]] = {"to": "to the back-end", "from": "from the back-end", "both": "both ways"}
FORWARD: Final[dict[Way, tuple[str, str, str]]] = {
    "to": ("txonly", "rxonly", "start"),
    "from": ("rxonly", "txonly", "start"),
    "both": ("io", "io", "start tx_first 8"),
}
"""What the driver does, what the back-end does, and how the driver starts."""

SECONDS: Final = 0.4
QUICK_SECONDS: Final = 0.05
SETTLE: Final = 0.05
AGREE_SECONDS: Final = 1.0
_END_SECONDS: Final = 10.0
QUEUE: Final = 256
BOUNDS: Final[dict[tuple[int, bool, bool], tuple[float, float]]] = {
    (64, False, False): (0.95, 1.1),
    (64, False, True): (1.1, 1.3),
    (64, True, False): (0.95, 1.1),
    (64, True, True): (1.1, 1.3),
    (1518, False, False): (1.0, 1.3),
    (1518, False, True): (1.0, 1.3),
    (1518, True, False): (1.0, 1.3),
    (1518, True, True): (0.8, 1.1),
}
"""Must and aim, by size, packed, both ways."""


def _cpus() -> tuple[int, int]:
    """Of the back-end, and of the driver."""
    ours = sorted(os.sched_getaffinity(0))
    return ours[0], ours[1 % len(ours)]


class Ours:
    """Our back-end in a process of its own."""

    def __init__(self, path: Path, way: Way, size: int) -> None:
        words = [sys.executable, "-m", "benches.pairs.net", str(path), way, str(size), str(_cpus()[0])]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"our back-end has ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _tell(self, word: str) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._answer()

    def begin(self) -> None:
        """Have its thread run."""
        self._tell("release")

    def end(self) -> None:
        """Park it."""
        self._tell("hold")

    def counted(self) -> tuple[int, int]:
        """Packets that came from the driver, and that went to it."""
        counters = self._tell("count")
        if counters["broken"]:
            raise BenchError(f"our back-end found {counters['broken']} packets broken")
        return counters["sent"], counters["received"]


class Theirs:
    """net_vhost in a testpmd."""

    def __init__(self, testpmd: Testpmd, way: Way) -> None:
        self._testpmd = testpmd
        testpmd.tell(f"set fwd {FORWARD[way][1]}")

    def begin(self) -> None:
        """Start to forward."""
        self._testpmd.tell("start")

    def end(self) -> None:
        """Stop it."""
        self._testpmd.tell("stop")

    def counted(self) -> tuple[int, int]:
        """Packets that came from the driver, and that went to it."""
        stats = self._testpmd.stats()
        return stats["RX-packets"], stats["TX-packets"]


class Side:
    """A back-end and the driver before it."""

    def __init__(self, back: Ours | Theirs, driver: Testpmd, way: Way, size: int, seconds: float) -> None:
        self.back = back
        self.driver = driver
        self.way: Way = way
        self.size = size
        self.seconds = seconds
        driver.tell(f"set fwd {FORWARD[way][0]}")

    def _now(self) -> tuple[float, dict[str, int]]:
        before = time.perf_counter()
        stats = self.driver.stats()
        return (before + time.perf_counter()) / 2, stats

    def measure(self) -> float:
        """Million packets a second; of both ways together, those of one, since each packet goes both."""
        name = "TX" if self.way == "to" else "RX"
        self.back.begin()
        self.driver.tell(FORWARD[self.way][2])
        time.sleep(SETTLE)
        start, first = self._now()
        time.sleep(self.seconds)
        end, last = self._now()
        self.driver.tell("stop")
        self.back.end()
        self.check()
        packets = last[f"{name}-packets"] - first[f"{name}-packets"]
        if packets <= 0:
            raise BenchError(f"no packet in {end - start:.3f} s")
        return packets / (end - start) / 1e6

    def check(self) -> None:
        """Both ends have counted the same, but for what is in the rings; counters may be a moment late.

        Raises:
            BenchError: they have not.
        """
        end = time.perf_counter() + AGREE_SECONDS
        while wrong := self._disagreement():
            if time.perf_counter() > end:
                raise BenchError(f"{type(self.back).__name__.lower()}: {wrong}")

    def _disagreement(self) -> str:
        stats = self.driver.stats()
        for name in ("TX", "RX"):
            packets, size = stats[f"{name}-packets"], stats[f"{name}-bytes"]
            if size != packets * self.size:
                return f"{packets} packets of {size} bytes together, each of {self.size}"
        came, went = self.back.counted()
        # What the driver sent may lie in the ring still, and so may what it was given. When it starts it empties its
        # ring of what came since it was ready, and does not count that.
        if self.way != "from" and not 0 <= stats["TX-packets"] - came <= QUEUE:
            return f"the driver has sent {stats['TX-packets']} packets, and {came} came"
        if self.way != "to" and not 0 <= went - stats["RX-packets"] <= 2 * QUEUE:
            return f"{went} packets went to the driver, and it got {stats['RX-packets']}"
        return ""


@contextmanager
def _sides(way: Way, size: int, packed: bool, quick: bool) -> Generator[Round]:
    back, front = _cpus()
    seconds = QUICK_SECONDS if quick else SECONDS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-net-")))
        try:
            peer = stack.enter_context(Testpmd.back_end(folder / "peer", cpu=back, frame=size))
            ours = stack.enter_context(Ours(folder / "ours", way, size))
            made: list[Side] = []
            for name, what in (("ours", ours), ("peer", Theirs(peer, way))):
                driver = stack.enter_context(
                    Testpmd.driver(folder / name, packed=packed, cpu=front, frame=size, name=name)
                )
                made.append(Side(what, driver, way, size, seconds))
        except (BuildError, OSError) as error:
            raise MissingPeer(f"DPDK's testpmd: {error}; 'make kernels' says what it needs") from None
        yield turns(made[0].measure, made[1].measure)


def _case(way: Way, size: int, *, packed: bool) -> Case:
    must, aim = BOUNDS[size, packed, way == "both"]
    return Case(
        pair="net",
        shape=f"{size} B, {'packed' if packed else 'split'}, {WORDS[way]}",
        unit="Mpps",
        open=lambda quick: _sides(way, size, packed, quick),
        more_is_better=True,
        must=must,
        aim=aim,
    )


def cases() -> list[Case]:
    """See `benches.runner.Case`."""
    return [_case(way, size, packed=packed) for size in (64, 1518) for packed in (False, True) for way in WORDS]


def main(arguments: list[str]) -> None:
    """Our back-end: serves, does what each line says that comes, and prints its counters; until there are none more."""
    path, way, size, cpu = arguments
    backends: dict[str, Network] = {"to": "drop", "from": Generate(int(size)), "both": "loopback"}
    options: dict[str, Any] = {"native": True, "wait": "busy", "cpus": [int(cpu)]}
    device = NetDevice(backends[way], control=False, **options)
    with Backend(device, path=path) as backend:

        def told() -> None:
            word = sys.stdin.readline().strip()
            if word:
                if word != "count":
                    (device.hold if word == "hold" else device.release)()
                print(json.dumps({name: device.counters[name] for name in ("sent", "received", "broken")}), flush=True)
            else:
                backend.loop.stop()

        backend.loop.add_reader(sys.stdin.fileno(), told)
        print("{}", flush=True)
        backend.loop.run()
    device.close()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Latency: one request of 8 random bytes, kicked and called for, there and back between two cores.

Both sides are ours, and serve the same requests in a thread; what differs is how the two ends wait. One looks at the
ring: the worker by its strategy, the driver all the time. The other sleeps until it is kicked or called, each time. The
driver is that of `asking`; each end has a CPU of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benches.asking import Asking, asking, build, running
from benches.runner import BenchError, Case, Round, turns

SPIN = 1_000_000
"""Microseconds: as good as for ever, and the driver never yields its CPU then."""


def ends(folder: Path, wait: str, cpus: tuple[int, int], stack: contextlib.ExitStack) -> Asking:
    """A driver on one CPU before a back-end whose worker waits in that way on the other."""
    path = folder / wait
    words = [sys.executable, "-m", "benches.peers.serve", path, "--wait", wait, "--cpu", str(cpus[1])]
    stack.enter_context(running([str(word) for word in words], path))
    made = stack.enter_context(asking(path, "rng", depth=1))
    made.pin(cpus[0])
    return made


def case(wait: str, *, must: float, aim: float) -> Case:
    """A strategy against sleeping."""

    @contextmanager
    def opened(quick: bool) -> Generator[Round]:
        build()
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise BenchError("a ping-pong between two cores needs two CPUs, and this process may use one")
        looks, sleeps = (200, 200) if quick else (5_000, 2_000)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ours = ends(folder, wait, (cpus[0], cpus[1]), stack)
            peer = ends(folder, "blocking", (cpus[0], cpus[1]), stack)

            def looking() -> float:
                asked = ours.ask(looks, spin=SPIN, seed=1)
                if asked.waits:
                    raise BenchError(f"the driver that looks at the ring has waited for {asked.waits} calls")
                return asked.nanoseconds / looks

            def sleeping() -> float:
                asked = peer.ask(sleeps, spin=0, seed=1)
                if not asked.kicks or not asked.waits:
                    raise BenchError("the ends that sleep have sent no kick, or waited for no call")
                return asked.nanoseconds / sleeps

            yield turns(looking, sleeping)

    return Case("pingpong", f"{wait} against blocking, two cores", "ns/round trip", opened, must=must, aim=aim)


def cases() -> Sequence[Case]:
    """Each strategy that looks at the ring."""
    return [case("adaptive", must=15.0, aim=30.0), case("busy", must=15.0, aim=30.0)]

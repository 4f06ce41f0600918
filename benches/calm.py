"""Whether the cores are as fast as they can be, just now.

# Theory

On a machine that is shared, and a virtual one mostly is, a core is slow while somebody else uses the other half of it:
for a second or for minutes, by a half or more, and nothing in this machine says so. It is no fair slowness either.
What waits for nothing loses more by it than what waits for memory anyhow, so a ratio between the two moves as well.

A short loop that always does the same tells: what it takes now, beside the least that it has ever taken here. Before
and after each round every core that matters is asked. A round that began or ended on a slow one is measured again,
for as long as patience lasts; nothing that was measured in it has a say in that. Cases run on the first cores that are
ours, as many as they need and no more, so only these are asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

SLOW = 1.2
"""A core that takes so many times as long as it can is slow: noise of the loop itself is below, a shared core above."""
PATIENCE = 10.0
"""Seconds for a case, beyond which no round is waited for or measured again."""
PAUSE = 0.05
_LOOPS = 20_000
_FIRST_LOOKS = 20


class Calm:
    """The cores' speed, beside the best that was seen of them."""

    def __init__(self) -> None:
        self._least = float("inf")

    def begin(self) -> None:
        """Look often enough to have seen full speed, in a second, unless they are slow all the time."""
        for _ in range(_FIRST_LOOKS):
            self.slowdown()
            time.sleep(PAUSE)

    def slowdown(self) -> float:
        """How many times as long as it can the slowest core takes, of those this thread may run on: 1 is full speed."""
        cpus = os.sched_getaffinity(0)
        taken: list[float] = []
        try:
            for cpu in cpus:
                # Of this thread alone: 0 is the caller.
                os.sched_setaffinity(0, {cpu})
                # Twice, so that being interrupted once says nothing.
                taken.append(min(_loop(), _loop()))
        finally:
            os.sched_setaffinity(0, cpus)
        self._least = min(self._least, *taken)
        return max(taken) / self._least


@contextmanager
def first_cores(count: int) -> Generator[None]:
    """Keep this thread, and what it starts, on so many of the cores that it may run on."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cpus)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def _loop() -> float:
    begin = time.perf_counter()
    for _ in range(_LOOPS):
        pass
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Rounds:
    """Rounds that count, and in how many of them the cores were at full speed."""

    measured: list[tuple[float, float]]
    calm: int


def rounds_of(
    one: Callable[[], tuple[float, float]],
    count: int,
    slowdown: Callable[[], float],
    *,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Rounds:
    """Measure `count` rounds in calm moments; once patience is over, those that were the calmest.

    Args:
        one: measures a round.
        count: rounds that count.
        slowdown: see `Calm.slowdown`.
        patience: seconds, from now on.
        clock: seconds that go on.
        sleep: waits so many seconds.
    """
    end = clock() + patience
    found: list[tuple[float, tuple[float, float]]] = []
    calm = 0
    while calm < count and (len(found) < count or clock() < end):
        before = slowdown()
        while before > SLOW and clock() < end:
            sleep(PAUSE)
            before = slowdown()
        both = one()
        worst = max(before, slowdown())
        found.append((worst, both))
        calm += worst <= SLOW
    found.sort(key=lambda round_: round_[0])
    return Rounds([both for _, both in found[:count]], calm)

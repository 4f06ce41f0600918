"""Rounds are measured while the cores are at full speed, as far as that can be had."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benches.calm import PAUSE, Calm, Rounds, first_cores, rounds_of


class Machine:
    """A clock, and cores whose speed is known at every second; a round takes one."""

    def __init__(self, slow: Sequence[tuple[float, float]], worse: float = 2.0) -> None:
        self.now = 0.0
        self.slept = 0.0
        self._slow = slow
        self._worse = worse

    def slowdown(self) -> float:
        return self._worse if any(start <= self.now < end for start, end in self._slow) else 1.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def one(self) -> tuple[float, float]:
        self.now += 1.0
        return self.now, self.now

    def measure(self, count: int, patience: float) -> Rounds:
        return rounds_of(self.one, count, self.slowdown, patience=patience, clock=lambda: self.now, sleep=self.sleep)


def ends(found: Rounds) -> list[float]:
    """When each round that counts ended."""
    return [round(end, 6) for end, _ in found.measured]


def test_on_a_quiet_machine_every_round_counts() -> None:
    machine = Machine([])
    assert machine.measure(3, 10) == Rounds([(1, 1), (2, 2), (3, 3)], 3)
    assert machine.slept == 0


def test_a_round_that_ends_slow_is_measured_again_when_that_is_over() -> None:
    machine = Machine([(1.5, 4.0)])
    found = machine.measure(3, 10)
    assert found.calm == 3
    assert (1 in ends(found), 2 in ends(found)) == (True, False)
    assert min(end for end in ends(found) if end > 1) >= 5
    assert PAUSE < machine.slept <= 2 + 2 * PAUSE


def test_without_patience_the_calmest_rounds_count() -> None:
    machine = Machine([(0.5, 100.0)])
    found = machine.measure(3, 4)
    # The one that began in time ended slow, like all others; nobody waited for longer than that.
    assert (len(found.measured), found.calm) == (3, 0)
    assert machine.slept <= 4


def test_calm_rounds_come_before_slow_ones() -> None:
    machine = Machine([(1.5, 100.0)])
    found = machine.measure(2, 3)
    assert (ends(found)[0], len(found.measured), found.calm) == (1, 2, 1)


def test_the_cores_are_asked_and_the_thread_stays_where_it_was() -> None:
    before = os.sched_getaffinity(0)
    calm = Calm()
    looks = [calm.slowdown() for _ in range(3)]
    assert os.sched_getaffinity(0) == before
    assert min(looks) >= 1


def test_what_needs_one_core_stays_on_the_first() -> None:
    before = os.sched_getaffinity(0)
    with first_cores(1):
        assert os.sched_getaffinity(0) == {min(before)}
        Calm().slowdown()
        assert os.sched_getaffinity(0) == {min(before)}
    with first_cores(len(before) + 1):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before

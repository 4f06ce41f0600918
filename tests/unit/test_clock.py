"""Clocks and timers: exact grids, order, late wake-ups, and what a callback may do."""

from __future__ import annotations

import gc
import math
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.clock import Clock, MonotonicClock, Timer, VirtualClock, to_nanoseconds
from virtio_test.errors import InvalidArgument, StateError

NANO = 1_000_000_000
spans = st.integers(0, 10 * NANO).map(lambda ns: ns / NANO)
periods = st.integers(1, 3 * NANO).map(lambda ns: ns / NANO)


class LateClock(VirtualClock):
    """A clock that can jump without running timers, as real time does while the owner loop is busy."""

    def jump(self, seconds: float) -> None:
        self._now += to_nanoseconds(seconds)


def stop_if_alive(timer: Timer | None) -> None:
    assert timer is not None, "an armed timer lives without its maker"
    timer.stop()


def test_both_clocks_satisfy_the_protocol() -> None:
    assert isinstance(VirtualClock(), Clock)
    assert isinstance(MonotonicClock(), Clock)


@given(nanoseconds=st.integers(0, 2**51))
def test_nanoseconds_survive_as_float_seconds(nanoseconds: int) -> None:
    assert to_nanoseconds(nanoseconds / NANO) == nanoseconds


@pytest.mark.parametrize("bad", [-1.0, -1e-12, math.inf, -math.inf, math.nan, 1e12])
def test_impossible_times_are_refused(bad: float) -> None:
    clock = VirtualClock()
    with pytest.raises(InvalidArgument, match="seconds"):
        clock.advance(bad)
    with pytest.raises(InvalidArgument, match="first_after"):
        Timer(clock, lambda: None, first_after=bad)
    with pytest.raises(InvalidArgument, match="every"):
        Timer(clock, lambda: None, first_after=1, every=bad)
    assert clock.next_deadline() is None
    assert clock.now_ns() == 0


@pytest.mark.parametrize("tiny", [0, 0.0, 1e-10])
def test_a_period_of_nothing_is_refused(tiny: float) -> None:
    with pytest.raises(InvalidArgument, match="at least one nanosecond"):
        Timer(VirtualClock(), lambda: None, first_after=1, every=tiny)


def test_the_original_timer() -> None:
    clock = VirtualClock()
    ticks: list[float] = []
    timer = Timer(clock, lambda: ticks.append(clock.now()), first_after=30, every=1)
    assert clock.advance(29.999999999) == 0
    assert ticks == []
    assert clock.advance(0.000000001) == 1
    assert ticks == [30.0]
    assert clock.advance(8) == 8
    assert ticks == [30.0 + k for k in range(9)]
    assert (timer.fired, timer.missed, timer.remaining) == (9, 0, 1.0)


def test_a_million_ticks_of_a_tenth_do_not_drift() -> None:
    clock = VirtualClock()
    timer = Timer(clock, lambda: None, first_after=0.1, every=0.1)
    assert clock.advance(10_000) == 100_000
    assert clock.now_ns() == 10_000 * NANO
    assert timer.deadline_ns == 10_000 * NANO + NANO // 10


@given(first=spans, every=periods, steps=st.lists(spans, max_size=8))
def test_virtual_ticks_fall_on_the_grid_however_time_is_cut(first: float, every: float, steps: list[float]) -> None:
    every = max(every, 0.01)
    clock = VirtualClock()
    seen: list[int] = []
    Timer(clock, lambda: seen.append(clock.now_ns()), first_after=first, every=every)
    fired = sum(clock.advance(step) for step in steps)
    total = sum(to_nanoseconds(step) for step in steps)
    grid_start, period = to_nanoseconds(first), to_nanoseconds(every)
    expected = list(range(grid_start, total + 1, period)) if steps else []
    assert seen == expected
    assert fired == len(expected)
    assert clock.now_ns() == total


@given(
    timers=st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 3)), max_size=8),
    length=st.integers(0, 12),
)
def test_order_is_deadline_then_arming(timers: list[tuple[int, int | None]], length: int) -> None:
    def run() -> list[tuple[int, int]]:
        clock = VirtualClock()
        log: list[tuple[int, int]] = []

        def record(index: int) -> None:
            log.append((clock.now_ns() // NANO, index))

        for index, (first, every) in enumerate(timers):
            Timer(clock, lambda index=index: record(index), first_after=first, every=every)
        clock.advance(length)
        return log

    log = run()
    assert log == run()
    assert [when for when, _ in log] == sorted(when for when, _ in log)
    expected = sorted(
        (when, index)
        for index, (first, every) in enumerate(timers)
        for when in (range(first, length + 1, every) if every else [first] * (first <= length))
    )
    assert sorted(log) == expected
    one_shots = [index for index, (first, every) in enumerate(timers) if every is None and first <= length]
    for when in {timers[index][0] for index in one_shots}:
        same = [index for moment, index in log if moment == when and timers[index] == (when, None)]
        assert same == sorted(same)


@given(every=st.integers(1, 1000), first=st.integers(0, 3000), late=st.integers(0, 10_000))
def test_missed_ticks_are_not_made_up(every: int, first: int, late: int) -> None:
    clock = LateClock()
    timer = Timer(clock, lambda: None, first_after=first / 1000, every=every / 1000)
    clock.jump(late / 1000)
    ran = clock.run_due()
    assert clock.run_due() == 0
    if late < first:
        assert (ran, timer.fired, timer.missed, timer.deadline_ns) == (0, 0, 0, first * 1_000_000)
        return
    assert (ran, timer.fired) == (1, 1)
    assert timer.missed == (late - first) // every
    assert timer.deadline_ns is not None
    on_grid, rest = divmod(timer.deadline_ns - first * 1_000_000, every * 1_000_000)
    assert rest == 0
    assert on_grid == timer.missed + 1
    assert 0 < timer.deadline_ns - clock.now_ns() <= every * 1_000_000


def test_deadlines_and_waiting() -> None:
    clock = LateClock()
    assert (clock.next_deadline(), clock.wait_time()) == (None, None)
    timer = Timer(clock, lambda: None, first_after=5)
    assert (clock.next_deadline(), clock.wait_time()) == (5.0, None)
    clock.jump(7)
    assert (clock.wait_time(), timer.remaining) == (0.0, 0.0)
    timer.stop()
    assert (clock.next_deadline(), clock.wait_time(), timer.remaining, timer.active) == (None, None, None, False)
    assert clock.run_due() == 0


def test_one_shot_fires_once() -> None:
    clock = VirtualClock()
    timer = Timer(clock, lambda: None, first_after=1)
    assert clock.advance(100) == 1
    assert (timer.active, timer.fired, timer.remaining) == (False, 1, None)
    timer.stop()
    assert repr(timer) == "<Timer stopped, fired 1, missed 0>"


def test_remaining_carries_a_timer_over() -> None:
    first, second = VirtualClock(), VirtualClock()
    timer = Timer(first, lambda: None, first_after=30, every=1)
    first.advance(12.25)
    saved = timer.remaining
    assert saved is not None
    assert saved == 17.75
    resumed = Timer(second, lambda: None, first_after=saved, every=timer.every)
    assert second.advance(17.75) == 1
    assert resumed.remaining == 1.0


def test_a_callback_may_stop_its_own_timer_and_others() -> None:
    clock = VirtualClock()
    timers: list[Timer] = []

    def stop_all() -> None:
        for each in timers:
            each.stop()

    timers.extend(Timer(clock, stop_all, first_after=1, every=1) for _ in range(3))
    assert clock.advance(10) == 1
    assert [each.fired for each in timers] == [1, 0, 0]
    assert clock.next_deadline() is None


def test_what_a_callback_arms_for_now_waits_for_the_next_round() -> None:
    clock = VirtualClock()
    log: list[str] = []

    def first() -> None:
        log.append("first")
        Timer(clock, lambda: log.append("armed by first"), first_after=0)

    Timer(clock, first, first_after=0)
    Timer(clock, lambda: log.append("second"), first_after=0)
    assert clock.run_due() == 2
    assert log == ["first", "second"]
    assert clock.wait_time() == 0.0
    assert clock.run_due() == 1
    assert log[2:] == ["armed by first"]


def test_timers_that_arm_each_other_without_end_are_an_error_and_not_a_hang() -> None:
    clock = VirtualClock()

    def again() -> None:
        Timer(clock, again, first_after=0)

    again()
    assert clock.run_due() == 1
    with pytest.raises(StateError, match="without end"):
        clock.advance(1)
    assert clock.now_ns() == 0


def test_an_exception_leaves_a_consistent_clock() -> None:
    clock = VirtualClock()
    later: list[float] = []

    def bad() -> None:
        raise RuntimeError("handler")

    timer = Timer(clock, bad, first_after=2, every=5)
    Timer(clock, lambda: later.append(clock.now()), first_after=2)
    with pytest.raises(RuntimeError, match="handler"):
        clock.advance(3)
    assert clock.now() == 2.0
    assert (timer.fired, timer.remaining, later) == (1, 5.0, [])
    assert clock.advance(1) == 1
    assert later == [2.0]
    with pytest.raises(RuntimeError):
        clock.advance(10)
    assert clock.now() == 7.0


def test_time_moves_once_at_a_time() -> None:
    clock = VirtualClock()
    Timer(clock, lambda: clock.advance(1), first_after=1)
    with pytest.raises(StateError, match="already moving"):
        clock.advance(5)
    assert clock.advance(5) == 0
    assert clock.now() == 6.0


def test_stopped_timers_are_let_go() -> None:
    clock = VirtualClock()

    class Owner:
        def tick(self) -> None: ...

    owner = Owner()
    timer = Timer(clock, owner.tick, first_after=1)
    gone = weakref.ref(timer)
    timer.stop()
    clock.advance(2)
    del timer
    gc.collect()
    assert gone() is None


def test_ten_thousand_stopped_timeouts_do_not_pile_up() -> None:
    clock = VirtualClock()
    kept = [Timer(clock, lambda: None, first_after=after) for after in (5, 3, 4)]
    gone = [weakref.ref(timer) for timer in (Timer(clock, lambda: None, first_after=30) for _ in range(10_000))]
    for each in gone:
        stop_if_alive(each())
    gc.collect()
    assert sum(each() is not None for each in gone) <= 32
    assert [timer.remaining for timer in kept] == [5.0, 3.0, 4.0]
    assert clock.advance(30) == 3


def test_a_stopped_timer_cannot_be_armed_again() -> None:
    clock = VirtualClock()
    timer = Timer(clock, lambda: None, first_after=1)
    timer.stop()
    with pytest.raises(StateError):
        clock.arm(timer)


def test_monotonic_clock_runs_by_itself() -> None:
    clock = MonotonicClock()
    start = time.monotonic()
    timer = Timer(clock, lambda: None, first_after=0.02, every=1000)
    first = timer.deadline_ns
    assert clock.run_due() == 0
    wait = clock.wait_time()
    assert first is not None
    assert wait is not None
    assert 0 < wait <= 0.02
    while clock.run_due() == 0:
        remaining = clock.wait_time()
        assert remaining is not None
        time.sleep(remaining)
    assert time.monotonic() - start >= 0.02
    assert timer.fired == 1
    assert clock.now() >= 0.02
    assert timer.deadline_ns == first + 1000 * NANO
    assert clock.next_deadline() == (first + 1000 * NANO) / NANO


def test_reprs() -> None:
    clock = VirtualClock()
    timer = Timer(clock, lambda: None, first_after=2.5, every=1)
    assert repr(timer) == "<Timer in 2.5 s, every 1 s, fired 0, missed 0>"
    assert repr(clock) == "<VirtualClock at 0 s>"
    assert repr(MonotonicClock()).startswith("<MonotonicClock at 0.0")


def test_the_longest_time_is_one() -> None:
    longest = 2**63 // NANO
    assert to_nanoseconds(longest) == longest * NANO
    with pytest.raises(InvalidArgument):
        to_nanoseconds(longest + 1)


def test_as_many_rounds_at_one_instant_as_it_says() -> None:
    """Ten thousand timers that arm each other for now may be a long way; one more is a way without end."""
    for more in (0, 1):
        clock, left = VirtualClock(), [10_000 + more]

        def again(clock: VirtualClock = clock, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0]:
                Timer(clock, again, first_after=0)

        Timer(clock, again, first_after=0)
        if more:
            with pytest.raises(StateError, match="without end"):
                clock.advance(1)
        else:
            assert clock.advance(1) == 10_000
            assert clock.now() == 1.0


def test_a_timer_is_active_until_it_stops_and_does_not_fire_behind_that() -> None:
    clock = VirtualClock()
    called: list[float] = []
    timer = Timer(clock, lambda: called.append(clock.now()), first_after=1)
    assert timer.active
    timer.stop()
    assert not timer.active
    timer.fire(clock.now_ns())
    assert (called, timer.fired) == ([], 0)

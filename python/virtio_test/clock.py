"""Time for devices: a clock that runs by itself, a clock that is moved by hand, and timers on either.

Theory
------
A device never asks the operating system for the time and never sleeps. It arms a `Timer` on the clock of
its bus; the owner loop asks the clock how long it may wait (`wait_time`) and calls `run_due` afterwards, so
that every callback runs in the owner loop. With `MonotonicClock` a second is a second; with `VirtualClock`
nothing happens until somebody calls `advance`, and thirty seconds then cost nothing.

Three rules make timers exact:

* Instants are whole nanoseconds, so a grid of a million ticks does not drift. Seconds as floats exist at the
  surface only.
* A periodic timer lives on the grid ``first, first + every, first + 2 * every …``. Who comes late by several
  periods fires once and goes on with the next instant of the grid: missed ticks are counted in `Timer.missed`,
  never made up.
* Due timers fire in the order of their deadlines, and timers of one instant in the order in which they were
  armed. Two runs of the same program on virtual clocks are the same run.

A callback may stop its own timer, arm others or raise. What it arms for "now" fires in the next round, not in
this one. What it raises comes out of `run_due` or `advance`; timers that were due after it stay due.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from .console import shown
from .errors import InvalidArgument, StateError

__all__ = ["Clock", "MonotonicClock", "Timer", "VirtualClock", "to_nanoseconds"]

_NANO: Final = 1_000_000_000
_MAX_SECONDS: Final = 2**63 // _NANO
_ROUNDS_AT_ONE_INSTANT: Final = 10_000


def to_nanoseconds(seconds: float, what: str = "time") -> int:
    """Seconds as whole nanoseconds, rounded to the nearest.

    Args:
        seconds: a finite number, not negative, below 2**63 nanoseconds (292 years).
        what: name of the quantity for the error's text.

    Raises:
        InvalidArgument: the number is negative, too large, infinite or not a number.
    """
    # Compared and not converted: an integer can be larger than any float.
    if not 0 <= seconds <= _MAX_SECONDS:
        raise InvalidArgument(f"{what} is {shown(seconds)} s; it must be a number from 0 to {_MAX_SECONDS}")
    return round(seconds * _NANO)


@runtime_checkable
class Clock(Protocol):
    """What timers and the owner loop need of a clock. Its time starts at 0 when it is made and never goes back."""

    def now(self) -> float:
        """Present time in seconds."""
        ...

    def now_ns(self) -> int:
        """Present time in nanoseconds."""
        ...

    def next_deadline(self) -> float | None:
        """Time of the earliest armed timer in seconds, on the axis of `now`; None when none is armed."""
        ...

    def wait_time(self) -> float | None:
        """How many seconds the owner loop may sleep for the timers' sake; None means for ever."""
        ...

    def run_due(self) -> int:
        """Fire every timer that is due; returns how many fired."""
        ...

    def arm(self, timer: Timer) -> None:
        """Queue `timer` for its deadline; called by `Timer`."""
        ...

    def disarm(self, timer: Timer) -> None:
        """Forget `timer`; called by `Timer`."""
        ...


class Timer:
    """One callback, once or periodically. It is armed when it is made.

    Args:
        clock: the clock to live on.
        callback: called without arguments, in whatever thread runs the clock.
        first_after: seconds from now to the first firing; a saved `remaining` goes here.
        every: seconds between firings, at least one nanosecond; None fires once only.

    Raises:
        InvalidArgument: a time is negative, zero (`every` only), infinite or not a number.
    """

    __slots__ = ("__weakref__", "_callback", "_clock", "_deadline_ns", "_every_ns", "_fired", "_missed")

    def __init__(
        self, clock: Clock, callback: Callable[[], object], *, first_after: float, every: float | None = None
    ) -> None:
        first_ns = to_nanoseconds(first_after, "first_after")
        every_ns = None if every is None else to_nanoseconds(every, "every")
        if every_ns == 0:
            raise InvalidArgument(f"every is {every!r} s; it must be at least one nanosecond")
        self._clock = clock
        self._callback = callback
        self._every_ns = every_ns
        self._fired = 0
        self._missed = 0
        self._deadline_ns: int | None = clock.now_ns() + first_ns
        clock.arm(self)

    @property
    def active(self) -> bool:
        """Whether the timer will fire (again)."""
        return self._deadline_ns is not None

    @property
    def deadline_ns(self) -> int | None:
        """When it fires next, in nanoseconds on the clock's axis; None when it never will."""
        return self._deadline_ns

    @property
    def remaining(self) -> float | None:
        """Seconds until it fires next, 0.0 when overdue, None when it never will. What a saved state keeps."""
        deadline = self._deadline_ns
        return None if deadline is None else max(0, deadline - self._clock.now_ns()) / _NANO

    @property
    def every(self) -> float | None:
        """Seconds between firings, or None."""
        return None if self._every_ns is None else self._every_ns / _NANO

    @property
    def fired(self) -> int:
        """How often the callback was called."""
        return self._fired

    @property
    def missed(self) -> int:
        """How many instants of the grid passed without a call, because the clock was run too late."""
        return self._missed

    def stop(self) -> None:
        """Never fire again. Harmless when it already stopped."""
        if self._deadline_ns is not None:
            self._deadline_ns = None
            self._clock.disarm(self)

    def fire(self, now_ns: int) -> None:
        """Move to the next instant of the grid after `now_ns`, then call back; the clock calls this when due."""
        due = self._deadline_ns
        if due is None:
            return
        if self._every_ns is None:
            self._deadline_ns = None
        else:
            late = max(0, now_ns - due) // self._every_ns
            self._missed += late
            self._deadline_ns = due + (late + 1) * self._every_ns
            self._clock.arm(self)
        # The timer is complete before the callback runs: one that raises or stops the timer finds it consistent.
        self._fired += 1
        self._callback()

    def __repr__(self) -> str:
        left = "stopped" if self.remaining is None else f"in {self.remaining:g} s"
        period = "" if self.every is None else f", every {self.every:g} s"
        return f"<Timer {left}{period}, fired {self._fired}, missed {self._missed}>"


class _TimerQueue:
    """The armed timers of one clock, by (deadline, order of arming). Stopped ones are dropped when they surface."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._heap: list[tuple[int, int, Timer]] = []
        self._armed: dict[Timer, int] = {}

    def now_ns(self) -> int:
        raise StateError("a bare timer queue has no time: use MonotonicClock or VirtualClock")

    def now(self) -> float:
        """Present time in seconds."""
        return self.now_ns() / _NANO

    def arm(self, timer: Timer) -> None:
        """Queue `timer` for its deadline; called by `Timer`."""
        deadline = timer.deadline_ns
        if deadline is None:
            raise StateError("a stopped timer cannot be armed: make a new one")
        with self._lock:
            order = next(self._order)
            self._armed[timer] = order
            heapq.heappush(self._heap, (deadline, order, timer))

    def disarm(self, timer: Timer) -> None:
        """Forget `timer`; called by `Timer`."""
        with self._lock:
            self._armed.pop(timer, None)
            if len(self._heap) > 2 * len(self._armed) + 16:
                # Timeouts that are armed and stopped by the thousand must not pile up until their deadlines.
                self._heap = [entry for entry in self._heap if self._armed.get(entry[2]) == entry[1]]
                heapq.heapify(self._heap)

    def next_deadline(self) -> float | None:
        """Time of the earliest armed timer in seconds, on the axis of `now`; None when none is armed."""
        deadline = self._first()
        return None if deadline is None else deadline / _NANO

    def run_due(self) -> int:
        """Fire every timer that is due; returns how many fired. What a callback arms waits for the next call."""
        now = self.now_ns()
        with self._lock:
            bound = next(self._order)
        fired = 0
        while (timer := self._take(now, bound)) is not None:
            fired += 1
            timer.fire(now)
        return fired

    def _first(self) -> int | None:
        with self._lock:
            self._drop_stopped()
            return self._heap[0][0] if self._heap else None

    def _take(self, now: int, bound: int) -> Timer | None:
        with self._lock:
            self._drop_stopped()
            if not self._heap:
                return None
            deadline, order, timer = self._heap[0]
            if deadline > now or order > bound:
                # What was armed in this round has a deadline of `now` at the earliest and a later order, so it
                # sorts behind everything that this round still has to fire.
                return None
            heapq.heappop(self._heap)
            del self._armed[timer]
            return timer

    def _drop_stopped(self) -> None:
        while self._heap and self._armed.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)


class MonotonicClock(_TimerQueue):
    """Real time: `time.monotonic_ns`, counted from the making of the clock."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.monotonic_ns()

    def now_ns(self) -> int:
        """Present time in nanoseconds since the clock was made."""
        return time.monotonic_ns() - self._start

    def wait_time(self) -> float | None:
        """Seconds until the next timer is due, 0.0 when one is overdue, None when none is armed."""
        deadline = self._first()
        return None if deadline is None else max(0, deadline - self.now_ns()) / _NANO

    def __repr__(self) -> str:
        return f"<MonotonicClock at {self.now():.3f} s>"


class VirtualClock(_TimerQueue):
    """Time that stands still until `advance`: tests of hours take no time and always run the same.

    `advance` runs the callbacks in the calling thread; with a running owner loop, call it there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0
        self._advancing = False

    def now_ns(self) -> int:
        """Present time in nanoseconds since the clock was made."""
        return self._now

    def wait_time(self) -> float | None:
        """0.0 when a timer is due now, else None: waiting does not move this clock."""
        deadline = self._first()
        return 0.0 if deadline is not None and deadline <= self._now else None

    def advance(self, seconds: float) -> int:
        """Let `seconds` pass, stopping at every deadline on the way; returns how many timers fired.

        No tick is missed, however far the clock moves. A callback that raises leaves the clock standing at
        that instant, with the rest of the way not gone.

        Raises:
            InvalidArgument: the time is negative, infinite or not a number.
            StateError: called from within a callback, or the callbacks of one instant arm each other for ever.
        """
        if self._advancing:
            raise StateError("advance() called from within a timer's callback: time is already moving")
        target = self._now + to_nanoseconds(seconds, "seconds")
        self._advancing = True
        try:
            return self._advance_to(target)
        finally:
            self._advancing = False

    def _advance_to(self, target: int) -> int:
        fired = rounds = 0
        while (deadline := self._first()) is not None and deadline <= target:
            rounds = rounds + 1 if deadline <= self._now else 0
            if rounds > _ROUNDS_AT_ONE_INSTANT:
                raise StateError(f"timers at {self.now():g} s arm each other without end: give them a delay")
            self._now = max(self._now, deadline)
            fired += self.run_due()
        self._now = target
        return fired

    def __repr__(self) -> str:
        return f"<VirtualClock at {self.now():g} s>"

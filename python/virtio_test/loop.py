"""The owner loop: the one place where registers, messages, timers and Python handlers run, never nested.

Theory
------
Each device has one owner. Whatever reaches it from outside only leaves a mark and wakes the loop:

* `call_soon(callback)`: run once, in order, after what runs now (any thread, and signal handlers);
* `pend(key, run)`: a kick. It marks its queue pending, however often it comes, and runs after the access
  that carried it has been answered (any thread). A `run` that returns True has more to do and stays pending;
* `add_reader(fd, callback)`: the fd has something to read, or its peer has gone;
* the clock's timers, when they are due.

One *turn* does these in that order, each only as far as it was there when the turn came to it: nothing
starves the others. A callback that would start a second turn is told so (`StateError`): what looks like
recursion elsewhere, a guest that kicks from inside a kick, is a queue here.

The loop waits in Rust with the GIL released. Python's signal handlers run between waits; `KeyboardInterrupt`,
`SystemExit` and every exception of a callback leave `run()` as they are, and what was marked stays marked; so does a
kick whose `run` was interrupted.

A virtual clock makes no one wait: when nothing is marked and nothing is readable, the loop moves the clock to
its next deadline (`jump=True`). With `jump=False` someone else moves the clock, and bounds are real seconds.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager

from ._core import Poller
from .clock import Clock, MonotonicClock, VirtualClock
from .errors import InvalidArgument, StateError

__all__ = ["OwnerLoop", "stopped_by_signals"]


class OwnerLoop:
    """The loop that owns a device, a driver, or both.

    Args:
        clock: whose timers it runs; a `MonotonicClock` when None.
        jump: move a `VirtualClock` to its next deadline instead of waiting for it.
    """

    def __init__(self, *, clock: Clock | None = None, jump: bool = True) -> None:
        self.clock: Clock = MonotonicClock() if clock is None else clock
        self._virtual = self.clock if jump and isinstance(self.clock, VirtualClock) else None
        self._poller = Poller()
        self._readers: dict[int, Callable[[], object]] = {}
        self._soon: deque[Callable[[], object]] = deque()
        self._pending: dict[Hashable, Callable[[], object]] = {}
        self._pending_lock = threading.Lock()
        self._owner: int | None = None
        self._guard = threading.Lock()
        self._stopping = False

    def __repr__(self) -> str:
        return f"OwnerLoop(clock={self.clock!r}, jump={self._virtual is not None})"

    @property
    def running(self) -> bool:
        """Whether a turn is under way, in this thread or another."""
        return self._owner is not None

    # --- what leaves a mark ---------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run `callback` once in the loop. From any thread or signal handler."""
        self._soon.append(callback)
        self._wake()

    def pend(self, key: Hashable, run: Callable[[], object]) -> None:
        """Mark `key` pending: `run` is called once, however often it is marked before. From any thread.

        When `run` returns True, more is to be done, and `key` stays pending behind the others.
        """
        with self._pending_lock:
            self._pending.setdefault(key, run)
        self._wake()

    def unpend(self, key: Hashable) -> None:
        """Take the mark of `key` away, if it has one."""
        with self._pending_lock:
            self._pending.pop(key, None)

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` in each turn in which `fd` is readable or closed by its peer.

        Raises:
            InvalidArgument: `fd` has a reader already.
        """
        if fd in self._readers:
            raise InvalidArgument(f"fd {fd} has a reader already: remove that first")
        self._poller.add(fd)
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """Forget `fd`, before it is closed. An fd without a reader is no error."""
        if self._readers.pop(fd, None) is not None:
            self._poller.remove(fd)

    def stop(self) -> None:
        """End the present `run`, or the next one if none runs. From any thread or signal handler."""
        self._stopping = True
        self._poller.wake()

    def _wake(self) -> None:
        if self._owner != threading.get_ident():
            self._poller.wake()

    # --- what runs ------------------------------------------------------------------------------------------

    def run(self, *, until: Callable[[], bool] | None = None, timeout: float | None = None) -> bool:
        """Turn until `until()` holds, `stop()` is called or `timeout` seconds of the clock have passed.

        On a virtual clock that the loop moves itself it also ends when nothing can happen any more: no mark,
        no timer, no reader.

        Returns:
            True when `until()` held.

        Raises:
            StateError: called from inside the loop, or while another thread runs it.
        """
        with self._owned():
            deadline = None if timeout is None else self._now() + timeout
            try:
                while not self._stopping:
                    if until is not None and until():
                        return True
                    if deadline is not None and self._now() >= deadline:
                        return False
                    if not self._turn(deadline):
                        return False
                return False
            finally:
                self._stopping = False

    def run_pending(self) -> int:
        """Do all that can be done at once, without waiting and without moving the clock.

        Returns:
            How many callbacks have run.

        Raises:
            StateError: called from inside the loop, or while another thread runs it.
        """
        with self._owned():
            total = 0
            while ran := self._ready() + self._poll(0.0):
                total += ran
            return total

    @contextmanager
    def _owned(self) -> Generator[None]:
        if not self._guard.acquire(blocking=False):
            where = "from inside the loop" if self._owner == threading.get_ident() else "while another thread runs it"
            raise StateError(f"the owner loop is not re-entrant and was called {where}: use call_soon() or pend()")
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._guard.release()

    def _now(self) -> float:
        """The time that bounds are measured in: real where nobody but another thread moves the clock."""
        if self._virtual is None and isinstance(self.clock, VirtualClock):
            return time.monotonic()
        return self.clock.now()

    def _turn(self, deadline: float | None) -> bool:
        """One turn; False when nothing is left that could ever happen."""
        if self._ready():
            # Marks may have come meanwhile: look at the fds, but do not wait.
            self._poll(0.0)
            return True
        bound = None if deadline is None else max(0.0, deadline - self._now())
        if self._virtual is None:
            waits = [each for each in (bound, self.clock.wait_time()) if each is not None]
            self._poll(min(waits, default=None))
            return True
        if self._poll(0.0) or self._soon or self._pending or self._stopping:
            return True
        timer = self._virtual.next_deadline()
        steps = [each for each in (bound, None if timer is None else timer - self._now()) if each is not None]
        if steps:
            # At least a nanosecond, so that rounding far from zero cannot make the loop stand still.
            self._virtual.advance(max(1e-9, min(steps)))
        elif self._readers:
            self._poll(None)
        else:
            return False
        return True

    def _ready(self) -> int:
        """Run the marks and due timers that are there now; how many."""
        ran = 0
        for _ in range(len(self._soon)):
            callback = self._soon.popleft()
            ran += 1
            callback()
        with self._pending_lock:
            keys = list(self._pending)
        for key in keys:
            with self._pending_lock:
                run = self._pending.pop(key, None)
            if run is None:
                continue
            ran += 1
            try:
                again = run() is True
            except BaseException as error:
                if not isinstance(error, Exception):
                    # An interrupt: nobody would mark it again for what it has not done.
                    self.pend(key, run)
                raise
            if again:
                self.pend(key, run)
        return ran + self.clock.run_due()

    def _poll(self, timeout: float | None) -> int:
        """Wait for fds and run their callbacks; how many. Without readers and without waiting it costs nothing."""
        if timeout == 0.0 and not self._readers:
            return 0
        ran = 0
        for fd in self._poller.wait(timeout):
            callback = self._readers.get(fd)
            if callback is not None:
                ran += 1
                callback()
        return ran


@contextmanager
def stopped_by_signals(loop: OwnerLoop) -> Generator[None]:
    """Inside, SIGINT and SIGTERM stop `loop`. To be used in the main thread."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(_number: int, _frame: object) -> None:
        loop.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

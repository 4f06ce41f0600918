"""The owner loop: what leaves a mark, the order it runs in, and that nothing nests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from virtio_test.clock import MonotonicClock, Timer, VirtualClock
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.loop import OwnerLoop


@pytest.fixture
def loop() -> OwnerLoop:
    return OwnerLoop(clock=VirtualClock())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_marks_run_in_order_and_kicks_after_what_carried_them(loop: OwnerLoop) -> None:
    seen: list[str] = []

    def access() -> None:
        loop.pend("queue 0", lambda: seen.append("kick"))
        seen.append("access answered")

    loop.call_soon(access)
    loop.call_soon(lambda: seen.append("next access"))
    assert loop.run_pending() == 3
    assert seen == ["access answered", "next access", "kick"]


def test_a_queue_is_pending_once_however_often_it_is_kicked(loop: OwnerLoop) -> None:
    runs: list[int] = []
    for _ in range(5):
        loop.pend("queue 0", lambda: runs.append(0))
    loop.pend("queue 1", lambda: runs.append(1))
    loop.run_pending()
    assert runs == [0, 1]


def test_who_returns_true_stays_pending_behind_the_others(loop: OwnerLoop) -> None:
    runs: list[str] = []

    def busy() -> bool:
        runs.append("busy")
        return runs.count("busy") < 3

    loop.pend("busy", busy)
    loop.pend("other", lambda: runs.append("other"))
    loop.run_pending()
    assert runs == ["busy", "other", "busy", "busy"]


def test_a_kick_that_arrives_while_its_queue_runs_is_not_lost(loop: OwnerLoop) -> None:
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        if len(runs) == 1:
            loop.pend("queue", run)
            assert len(runs) == 1, "it must not run from inside itself"

    loop.pend("queue", run)
    loop.run_pending()
    assert len(runs) == 2


def test_unpend_takes_the_mark_away(loop: OwnerLoop) -> None:
    loop.pend("queue", lambda: pytest.fail("it was taken away"))
    loop.unpend("queue")
    loop.unpend("never marked")
    assert loop.run_pending() == 0


@pytest.mark.parametrize("again", ["run", "run_pending"])
def test_nothing_nests(loop: OwnerLoop, again: str) -> None:
    caught: list[StateError] = []

    def inside() -> None:
        with pytest.raises(StateError, match="re-entrant") as found:
            getattr(loop, again)()
        caught.append(found.value)

    loop.call_soon(inside)
    loop.run_pending()
    assert len(caught) == 1
    assert loop.run_pending() == 0, "the loop works on after the refusal"


def test_a_second_thread_may_not_run_it(loop: OwnerLoop) -> None:
    caught: list[str] = []

    def other() -> None:
        try:
            loop.run()
        except StateError as error:
            caught.append(str(error))

    def inside() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    loop.call_soon(inside)
    loop.run_pending()
    assert len(caught) == 1
    assert "another thread" in caught[0]


def test_an_exception_leaves_and_the_other_marks_stay(loop: OwnerLoop) -> None:
    seen: list[str] = []

    def bad() -> None:
        raise RuntimeError("from a callback")

    loop.call_soon(lambda: seen.append("first"))
    loop.call_soon(bad)
    loop.call_soon(lambda: seen.append("second"))
    loop.pend("queue", lambda: seen.append("queue"))
    with pytest.raises(RuntimeError, match="from a callback"):
        loop.run_pending()
    assert seen == ["first"]
    assert not loop.running
    loop.run_pending()
    assert seen == ["first", "second", "queue"]


def test_an_exception_of_one_queue_keeps_the_next_one_pending(loop: OwnerLoop) -> None:
    seen: list[str] = []

    def bad() -> None:
        raise RuntimeError("queue 0")

    loop.pend(0, bad)
    loop.pend(1, lambda: seen.append("queue 1"))
    with pytest.raises(RuntimeError, match="queue 0"):
        loop.run_pending()
    loop.run_pending()
    assert seen == ["queue 1"]


def test_the_virtual_clock_jumps_only_when_nothing_is_marked(loop: OwnerLoop) -> None:
    seen: list[tuple[str, float]] = []

    def note(what: str) -> None:
        seen.append((what, loop.clock.now()))

    def tick() -> None:
        note("tick")
        loop.pend("queue", lambda: note("queue"))

    Timer(loop.clock, tick, first_after=30, every=1)
    started = time.monotonic()
    assert loop.run(until=lambda: len(seen) >= 6)
    assert seen == [(what, 30.0 + k) for k in range(3) for what in ("tick", "queue")]
    assert time.monotonic() - started < 5


def test_run_pending_moves_no_clock(loop: OwnerLoop) -> None:
    Timer(loop.clock, lambda: pytest.fail("it is not due"), first_after=1)
    assert loop.run_pending() == 0
    assert loop.clock.now() == 0


def test_a_timeout_is_virtual_time_on_a_virtual_clock(loop: OwnerLoop) -> None:
    started = time.monotonic()
    # A reader that never gets anything: without it the loop would see at once that nothing can happen.
    reader, writer = os.pipe()
    try:
        loop.add_reader(reader, lambda: None)
        assert not loop.run(until=lambda: False, timeout=3600)
    finally:
        os.close(reader)
        os.close(writer)
    assert loop.clock.now() == pytest.approx(3600)
    assert time.monotonic() - started < 5


def test_far_from_zero_rounding_does_not_stop_time() -> None:
    clock = VirtualClock()
    clock.advance(1e9 + 0.1)
    loop = OwnerLoop(clock=clock)
    fired: list[int] = []
    Timer(clock, lambda: fired.append(1), first_after=1e-9, every=0.3)
    assert loop.run(until=lambda: len(fired) == 5)


def test_when_nothing_can_happen_any_more_the_run_ends(loop: OwnerLoop) -> None:
    assert not loop.run(until=lambda: False)
    assert not loop.run()


def test_until_that_holds_runs_nothing(loop: OwnerLoop) -> None:
    loop.call_soon(lambda: pytest.fail("until held already"))
    assert loop.run(until=lambda: True)


def test_readers_run_while_readable(loop: OwnerLoop, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    got: list[bytes] = []
    loop.add_reader(reader, lambda: got.append(os.read(reader, 1)))
    os.write(writer, b"abc")
    assert loop.run(until=lambda: len(got) == 3, timeout=1)
    assert got == [b"a", b"b", b"c"]
    loop.remove_reader(reader)
    os.write(writer, b"d")
    assert loop.run_pending() == 0
    loop.remove_reader(reader)


def test_a_reader_hears_that_its_peer_has_gone() -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    reader, writer = os.pipe()
    try:
        ends: list[bytes] = []
        loop.add_reader(reader, lambda: ends.append(os.read(reader, 1)))
        os.close(writer)
        assert loop.run(until=lambda: bool(ends), timeout=5)
        assert ends[0] == b""
        loop.remove_reader(reader)
    finally:
        os.close(reader)


def test_a_reader_that_another_removed_is_not_called(loop: OwnerLoop) -> None:
    one, two = os.pipe(), os.pipe()
    try:
        calls: list[int] = []

        def first_of_both(mine: int, other: int) -> None:
            calls.append(mine)
            loop.remove_reader(other)
            loop.remove_reader(mine)

        loop.add_reader(one[0], lambda: first_of_both(one[0], two[0]))
        loop.add_reader(two[0], lambda: first_of_both(two[0], one[0]))
        os.write(one[1], b"x")
        os.write(two[1], b"x")
        loop.run_pending()
        assert len(calls) == 1
    finally:
        for fd in (*one, *two):
            os.close(fd)


def test_one_fd_has_one_reader(loop: OwnerLoop, pipe: tuple[int, int]) -> None:
    loop.add_reader(pipe[0], lambda: None)
    with pytest.raises(InvalidArgument, match="has a reader already"):
        loop.add_reader(pipe[0], lambda: None)


def test_a_busy_queue_does_not_starve_readers_and_timers(pipe: tuple[int, int]) -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    reader, writer = pipe
    seen: set[str] = set()
    loop.pend("busy", lambda: True)
    loop.add_reader(reader, lambda: seen.add("reader"))
    Timer(loop.clock, lambda: seen.add("timer"), first_after=0.01)
    os.write(writer, b"x")
    assert loop.run(until=lambda: seen == {"reader", "timer"}, timeout=10)


def test_marks_from_another_thread_wake_it() -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    seen: list[str] = []

    def other() -> None:
        time.sleep(0.05)
        loop.call_soon(lambda: seen.append("soon"))
        loop.pend("queue", lambda: seen.append("queue"))

    thread = threading.Thread(target=other)
    thread.start()
    started = time.monotonic()
    assert loop.run(until=lambda: len(seen) == 2, timeout=30)
    assert time.monotonic() - started < 10
    thread.join()


def test_stop_from_another_thread_and_before_the_run() -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    thread = threading.Timer(0.05, loop.stop)
    thread.start()
    assert not loop.run()
    thread.join()
    loop.stop()
    assert not loop.run(), "a stop that came first is not lost"
    loop.call_soon(loop.stop)
    assert not loop.run(), "and it counts once"
    assert loop.run(until=lambda: True)


def test_stop_from_a_signal_handler_while_it_waits() -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: loop.stop())
    try:
        thread = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        thread.start()
        started = time.monotonic()
        assert not loop.run(timeout=60)
        assert time.monotonic() - started < 30
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_keyboard_interrupt_leaves_a_loop_that_still_works() -> None:
    loop = OwnerLoop(clock=MonotonicClock())
    thread = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(timeout=60)
    thread.join()
    assert not loop.running
    assert loop.run_pending() == 0


def test_a_kick_that_is_interrupted_stays_marked_and_one_that_fails_does_not() -> None:
    loop = OwnerLoop(clock=VirtualClock())
    ran: list[str] = []

    def run(name: str, error: type[BaseException]) -> None:
        ran.append(name)
        if ran.count(name) == 1:
            raise error

    loop.pend("interrupted", lambda: run("interrupted", KeyboardInterrupt))
    loop.pend("failing", lambda: run("failing", KeyError))
    loop.pend("other", lambda: ran.append("other"))
    with pytest.raises(KeyboardInterrupt):
        loop.run_pending()
    with pytest.raises(KeyError):
        loop.run_pending()
    loop.run_pending()
    assert ran == ["interrupted", "failing", "other", "interrupted"]


def test_a_clock_that_someone_else_moves_bounds_in_real_seconds() -> None:
    clock = VirtualClock()
    loop = OwnerLoop(clock=clock, jump=False)
    fired: list[int] = []
    Timer(clock, lambda: fired.append(1), first_after=5)
    assert not loop.run(until=lambda: bool(fired), timeout=0.05)
    assert clock.now() == 0
    loop.call_soon(lambda: clock.advance(5))
    assert loop.run(until=lambda: bool(fired), timeout=5)


def test_who_takes_a_mark_away_while_others_run(loop: OwnerLoop) -> None:
    seen: list[str] = []
    loop.pend("first", lambda: (seen.append("first"), loop.unpend("second")))
    loop.pend("second", lambda: seen.append("second"))
    assert loop.run_pending() == 1
    assert seen == ["first"]


def test_a_bound_is_reached_and_not_passed(loop: OwnerLoop) -> None:
    clock = loop.clock
    for expected in (1, 2):
        assert not loop.run(timeout=1)
        assert clock.now_ns() == expected * 1_000_000_000


def test_a_loop_with_nothing_but_a_timer_sleeps_until_then() -> None:
    """How often it looks says so, not how long that takes: one that does not sleep looks thousands of times."""
    clock, asked, fired = MonotonicClock(), list[None](), list[None]()
    loop = OwnerLoop(clock=clock)
    Timer(clock, lambda: fired.append(None), first_after=0.05)
    assert loop.run(until=lambda: asked.append(None) or bool(fired))
    assert len(asked) < 20


def test_it_runs_while_it_turns(loop: OwnerLoop) -> None:
    seen: list[bool] = []
    loop.call_soon(lambda: seen.append(loop.running))
    assert not loop.running
    loop.run_pending()
    assert (seen, loop.running) == ([True], False)

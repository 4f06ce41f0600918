"""Notifiers and the poller: eventfds, pipes, callbacks, and waits that end when they should."""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from virtio_test._core import Notifier, Poller
from virtio_test.errors import InvalidArgument, StateError


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_an_eventfd_counts() -> None:
    notifier = Notifier.eventfd()
    for _ in range(3):
        notifier.notify()
    assert (notifier.drain(), notifier.drain(), notifier.count) == (3, 0, 3)
    twin = Notifier.from_fd(notifier.fileno())
    twin.notify()
    assert (notifier.drain(), notifier.count, twin.count) == (1, 3, 1)


@pytest.mark.row("N11")
def test_a_pipe_takes_eight_bytes_and_a_full_one_blocks_nobody(pipe: tuple[int, int]) -> None:
    reader, writer = (Notifier.from_fd(fd) for fd in pipe)
    writer.notify()
    assert os.read(pipe[0], 100) == (1).to_bytes(8, sys.byteorder)
    for _ in range(10_000):
        writer.notify()
    assert 1 <= reader.drain() < 10_000
    assert reader.drain() == 0
    with pytest.raises(StateError):
        reader.notify()


def test_files_that_wake_nobody_are_refused() -> None:
    memory = os.memfd_create("test")
    for fd in (-1, 99_999, 2**40, memory):
        with pytest.raises(InvalidArgument):
            Notifier.from_fd(fd)
    os.close(memory)


def test_a_callback_is_called_and_its_exception_is_the_notifiers() -> None:
    calls: list[int] = []
    notifier = Notifier.callback(lambda: calls.append(len(calls)))
    notifier.notify()
    notifier.notify()
    assert (calls, notifier.count, notifier.drain()) == ([0, 1], 2, 0)
    with pytest.raises(InvalidArgument):
        notifier.fileno()
    with pytest.raises(TypeError):
        Notifier.callback(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ZeroDivisionError):
        Notifier.callback(lambda: 1 // 0).notify()


class Owner:
    """Holds a notifier that calls it: a cycle."""

    def __init__(self) -> None:
        self.notifier = Notifier.callback(self.called)

    def called(self) -> None: ...


def test_a_cycle_through_a_callback_is_collected() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_wait_names_what_is_readable_or_closed(pipe: tuple[int, int]) -> None:
    poller = Poller()
    notifier = Notifier.eventfd()
    poller.add(pipe[0])
    poller.add(notifier.fileno())
    assert poller.wait(0) == []
    notifier.notify()
    assert poller.wait() == [notifier.fileno()]
    os.write(pipe[1], b"x")
    assert poller.wait() == [pipe[0], notifier.fileno()]
    poller.remove(pipe[0])
    notifier.drain()
    assert poller.wait(0) == []
    reader, writer = os.pipe()
    poller.add(reader)
    os.close(writer)
    assert poller.wait() == [reader]
    os.close(reader)
    assert poller.wait() == [reader], "a number that was closed is its owner's to find out"


def test_wrong_arguments_are_refused(pipe: tuple[int, int]) -> None:
    poller = Poller()
    poller.add(pipe[0])
    for fd in (-1, pipe[0], 99_999, 2**31):
        with pytest.raises(InvalidArgument):
            poller.add(fd)
    with pytest.raises(InvalidArgument):
        poller.remove(pipe[1])
    for timeout in (-1.0, -math.inf, math.nan):
        with pytest.raises(InvalidArgument):
            poller.wait(timeout)


def test_a_wait_ends_by_time_by_wake_and_by_signal() -> None:
    poller = Poller()
    start = time.monotonic()
    assert poller.wait(0.25) == []
    assert time.monotonic() - start >= 0.25

    timer = threading.Timer(0.02, poller.wake)
    timer.start()
    assert poller.wait(math.inf) == []
    timer.join()

    def handler(*_: object) -> None:
        raise KeyError("signal")

    # Delivered to this thread, and to another one.
    for thread in (threading.main_thread(), threading.Timer(0.02, lambda: time.sleep(0.5))):
        if thread is not threading.main_thread():
            thread.start()
        previous = signal.signal(signal.SIGUSR1, handler)
        target = thread.ident
        assert target is not None
        sender = threading.Timer(0.1, signal.pthread_kill, args=(target, signal.SIGUSR1))
        sender.start()
        start = time.monotonic()
        with pytest.raises(KeyError, match="signal"):
            poller.wait(60)
        assert time.monotonic() - start < 30
        signal.signal(signal.SIGUSR1, previous)
        sender.join()
        if thread is not threading.main_thread():
            thread.join()

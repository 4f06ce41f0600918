"""A peer that holds our eventfds too, fills them to the brim between any two of our steps, and has made them blocking.

Whoever looks for room and then writes is caught sooner or later; the attacker here catches one within a second.
Whoever is attacked is a process of its own: one that hangs is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from virtio_test._core import Notifier

from tests.cli.test_serve import serving
from tests.unit.vhost_user_world import Guest, guest
from tests.unit.world import eventually

ATTEMPTS: Final = 300
FULL: Final = 2**64 - 2

VICTIM: Final = """
import os, sys
from virtio_test._core import Notifier
notifier, shown = Notifier.from_fd(int(sys.argv[1])), int(sys.argv[2])
{before}
while True:
    for _ in range(100):
        notifier.notify()
    os.pwrite(shown, notifier.count.to_bytes(8, "little"), 0)
"""
FORKED: Final = """
notifier.notify()  # what was made for the parent is not the child's
if child := os.fork():
    os.wait()
"""


@pytest.fixture(autouse=True)
def one_processor() -> Generator[None]:
    """For all: so whoever wakes up does so in the middle of what another does."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


class Requests:
    """One after the other, in a thread."""

    def __init__(self, guest: Guest) -> None:
        self.answered = 0
        self._guest = guest
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            self._guest.request(self.answered)
            self.answered += 1

    def close(self) -> None:
        self._ended = True
        self._thread.join()


@contextmanager
def victim(program: str, *fds: int) -> Generator[None]:
    command = [sys.executable, "-c", program, *map(str, fds)]
    with subprocess.Popen(command, pass_fds=fds, start_new_session=True) as started:
        try:
            yield
        finally:
            os.killpg(started.pid, signal.SIGKILL)


def attack(fd: int, lives: Callable[[], bool]) -> None:
    """Empty `fd` and fill it, at any moment of those who write to it; they must live."""
    for _ in range(ATTEMPTS):
        for step in (os.eventfd_read, partial(os.eventfd_write, value=FULL)):
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                step(fd)
            os.set_blocking(fd, True)
            time.sleep(0.0005)
        assert lives()


def changed(look: Callable[[], object]) -> bool:
    """Whether what `look` sees changes in time."""
    before = look()
    return eventually(lambda: look() != before)


@pytest.mark.row("N11")
@pytest.mark.parametrize("before", ["", FORKED], ids=["process", "child"])
def test_a_notifier_never_waits_for_room(before: str) -> None:
    fd, shown = os.eventfd(0, 0), os.memfd_create("shown")

    def count() -> bytes:
        return os.pread(shown, 8, 0)

    with victim(VICTIM.format(before=before), fd, shown):
        assert changed(count)
        attack(fd, lambda: changed(count))
    os.close(fd)
    os.close(shown)


@pytest.mark.row("N11")
def test_a_front_end_that_fills_its_call_eventfd_does_not_keep_the_server_from_the_next(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path)):
        with guest(path) as evil:
            call = os.eventfd(0, 0)
            evil.setup(call=Notifier.from_fd(call))
            evil.front.enable(0)
            with closing(Requests(evil)) as requests:
                attack(call, lambda: changed(lambda: requests.answered))
        with guest(path) as good:
            good.setup()
            good.front.enable(0)
            good.request(1)
            assert good.ring is not None
            assert eventually(lambda: good.ring is not None and good.ring.call.drain() == 1)
        os.close(call)

"""A target as a process of its own: started, watched, and ended whatever it does."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from virtio_test.errors import PeerDisconnected, PeerTimeout

__all__ = ["Child"]

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 5.0
_STEP_SECONDS: Final = 0.02
_LOOK_SECONDS: Final = 0.005
_SPIN_SECONDS: Final = 0.2
_WATCH_SECONDS: Final = 10.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_LAST_BYTES: Final = 4096


class Child:
    """One process in a session of its own, without core dumps, with a bound on its processor time.

    Until `close` it is not reaped, however it ends, so that its id, and that of its group, can be nobody else's.

    Args:
        words: program and arguments.
        folder: where its log is written, and for what it leaves behind while it runs.
        ready: whether it can be spoken to, asked with what it has written so far.
        cpu: processor seconds after which the kernel ends it.

    Raises:
        PeerDisconnected: it cannot be started, ended at once, or is not ready in time; with its last words.
    """

    def __init__(self, words: Sequence[str], folder: Path, *, ready: Callable[[str], bool], cpu: int = 600) -> None:
        self._log = folder / "log"
        self._name = words[0]
        self._pidfd = -1
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the user's own command, no shell
                    list(words),
                    # Kept open: some of them end with their standard input.
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Where DPDK keeps its own, which would stay.
                    env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerDisconnected(f"{words[0]} cannot be started: {error.strerror}") from None
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))
                resource.prlimit(self._process.pid, resource.RLIMIT_CPU, (cpu, cpu))
            self._come_up(ready)
        except BaseException:
            # Whoever interrupts the wait as well: the session is its own, so nobody else would end it.
            self.close()
            raise

    def _come_up(self, ready: Callable[[str], bool]) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            # Looked at first: what has ended has said all of it.
            alive = self.alive
            if ready(self._said()):
                return
            if not alive or time.monotonic() > end:
                raise PeerDisconnected(f"{self._name} does not come up: {self.last_words() or 'it said nothing'}")
            time.sleep(_STEP_SECONDS)

    def __repr__(self) -> str:
        return f"<Child {self._process.args!r}, {'running' if self.alive else 'ended'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._status() is None

    def _status(self) -> int | None:
        """As `Popen.returncode`; None while it runs."""
        if self._pidfd < 0:
            return self._process.returncode
        found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def died(self, within: float = 0.0) -> str:
        """How it ended, in words, or empty; waits so many seconds for its end."""
        select.select([self._pidfd], [], [], within)
        status = self._status()
        if status is None:
            return ""
        how = f"exit status {status}" if status >= 0 else f"signal {_signal_name(-status)}"
        said = self.last_words()
        return f"{how}: {said}" if said else how

    def spins(self) -> bool:
        """Watch whether it burns a processor: it has used so much of one without ever being seen to sleep.

        Neither alone would tell: on a busy machine a process with little to do waits long for a processor, and one that
        spins gets little of it.
        """
        began, end = self._processor_seconds(), time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < end:
            if not self._runnable():
                return False
            if self._processor_seconds() - began > _SPIN_SECONDS:
                break
            time.sleep(_LOOK_SECONDS)
        return True

    def _processor_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def _runnable(self) -> bool:
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            # It may end while we look.
            with contextlib.suppress(OSError):
                if task.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
        return False

    def last_words(self) -> str:
        """The last line that it wrote; what it says of its socket's folder, which each case has anew, is left out."""
        said = self._said().replace(f"{self._log.parent}/", "")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return "".join(each if each.isprintable() else " " for each in lines[-1]) if lines else ""

    def _said(self) -> str:
        """The end of its log."""
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_BYTES))
            return log.read().decode(errors="replace")

    def close(self) -> None:
        """End it, and all that it has started; harmless a second time.

        Raises:
            PeerTimeout: the kernel does not end it.
        """
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise PeerTimeout(f"{self._name} does not end within {_STOP_SECONDS:g} s of being killed") from None
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Of the real-time signals only the first and the last have a name.
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"

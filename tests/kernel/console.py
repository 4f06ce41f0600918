"""A child process as a console: its lines as they come, waiting for them, and ending it hard."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

STEP_SECONDS = 30.0
"""How long any single step may take."""


class GuestError(Exception):
    """A guest or server did not do what was asked for; the message ends with its console's last lines."""


class Console:
    """A child process with its output collected line by line; its standard input takes commands.

    Args:
        command: program and arguments.
        env: its environment; ours by default.
        cwd: where it runs.
        stderr: where its standard error goes; into the console by default.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            list(command),
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if stderr is None else stderr,
            start_new_session=True,
            bufsize=0,
        )
        self.started = time.monotonic()
        self._lines: list[str] = []
        self._times: list[float] = []
        self._ended = False
        self._change = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended, or closed its output."""
        with self._change:
            return self._ended

    @property
    def lines(self) -> list[str]:
        """All lines so far, without line ends."""
        with self._change:
            return list(self._lines)

    def time_of(self, line: str) -> float:
        """When the first such line came, on the monotonic clock.

        Raises:
            ValueError: it has not come.
        """
        with self._change:
            return self._times[self._lines.index(line)]

    @property
    def text(self) -> str:
        """All output so far."""
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        with self._process.stdout as stream:
            while data := stream.read(1 << 16):
                *whole, rest = (rest + data).split(b"\n")
                now = time.monotonic()
                with self._change:
                    self._lines += [line.decode(errors="replace").rstrip("\r") for line in whole]
                    self._times += [now] * len(whole)
                    self._change.notify_all()
        with self._change:
            if rest:
                self._lines.append(rest.decode(errors="replace"))
                self._times.append(time.monotonic())
            self._ended = True
            self._change.notify_all()

    def wait_until(self, reached: Callable[[list[str]], bool], what: str, *, timeout: float = STEP_SECONDS) -> None:
        """Waits until the lines so far satisfy ``reached``.

        Raises:
            GuestError: they did not within ``timeout`` seconds, or the process ended before.
        """
        deadline = time.monotonic() + timeout
        with self._change:
            while not reached(self._lines):
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "it ended" if self._ended else f"{timeout:g} s passed"
                    raise GuestError(f"no {what}: {why}; its last lines:\n" + "\n".join(self._lines[-40:]))
                self._change.wait(left)

    def wait_for(self, line: str, *, count: int = 1, timeout: float = STEP_SECONDS) -> None:
        """Waits until ``line`` stands there ``count`` times."""
        self.wait_until(lambda lines: lines.count(line) >= count, f"{count} x {line!r}", timeout=timeout)

    def wait_for_lines(self, count: int, *, timeout: float = STEP_SECONDS) -> list[str]:
        """Waits until there are ``count`` lines; returns all that there are."""
        self.wait_until(lambda lines: len(lines) >= count, f"{count} lines", timeout=timeout)
        return self.lines

    def send(self, line: str) -> None:
        """Writes one line to its standard input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError as error:
            raise GuestError(f"no console for {line!r}; its last lines:\n" + "\n".join(self.lines[-40:])) from error

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone."""
        self._process.send_signal(number)

    def wait(self, timeout: float = STEP_SECONDS) -> int:
        """The exit status, once it has ended and all its output is here."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"still running after {timeout:g} s; its last lines:\n{self.text[-4000:]}") from error
        self._reader.join(timeout)
        return status

    def kill(self) -> None:
        """Ends it with all its processes, at once; fine when it has ended already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(STEP_SECONDS)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

"""``virtio-test serve`` as a process of its own: the back-end that the guests are given."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.kernel.console import STEP_SECONDS, Console, GuestError


class Server:
    """A running ``virtio-test serve``; a context manager that kills it.

    Args:
        folder: for its socket and its log; short, as a socket's path may have 107 bytes.
        arguments: further arguments of the command.
        program: another program that takes ``--socket`` and says when it serves.

    Attributes:
        path: of the socket.
        console: the device's console.
        started: when it was started, on the monotonic clock.
    """

    def __init__(self, folder: Path, *arguments: str, program: Sequence[str] = ("-m", "virtio_test", "serve")) -> None:
        self.path = folder / "socket"
        self._log = folder / "log"
        with self._log.open("ab") as log:
            command = [sys.executable, "-W", "ignore::UserWarning", *program, "--socket"]
            self.console = Console([*command, str(self.path), *arguments], stderr=log)
        self.started = self.console.started
        try:
            self.wait_for_log("virtio-test: serving ")
        except GuestError:
            self.close()
            raise

    @property
    def log(self) -> str:
        """What it said on its standard error."""
        return self._log.read_text()

    @property
    def lines(self) -> list[str]:
        """The device's console, line by line, as far as it has reached us."""
        return self.console.lines

    def said(self, count: int) -> list[str]:
        """The device's console once it has ``count`` lines; all of it, so that one too many shows."""
        return self.console.wait_for_lines(count)

    def wait_for_log(self, text: str, *, count: int = 1) -> None:
        """Waits until its log holds ``text`` that often.

        Raises:
            GuestError: it does not.
        """
        deadline = time.monotonic() + STEP_SECONDS
        while self.log.count(text) < count:
            if time.monotonic() > deadline or (self.console.ended and text not in self.log):
                raise GuestError(f"the server's log has not {count} x {text!r}:\n{self.log[-4000:]}")
            time.sleep(0.01)

    def wait_for_disconnects(self, count: int) -> None:
        """Waits until it has seen that many front-ends go."""
        self.wait_for_log(" has gone", count=count)

    def fds(self) -> list[str]:
        """What its open file descriptors are, sorted."""
        folder = Path(f"/proc/{self.console.pid}/fd")
        kinds: list[str] = []
        for entry in folder.iterdir():
            try:
                kinds.append(str(entry.readlink()).split(":")[0])
            except FileNotFoundError:
                continue
        return sorted(kinds)

    def memory(self) -> int:
        """Its resident memory in bytes, without what it maps of files (a guest's memory is one)."""
        for line in Path(f"/proc/{self.console.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise GuestError("this kernel does not tell RssAnon")

    def mappings(self) -> int:
        """How many memory mappings it has."""
        return Path(f"/proc/{self.console.pid}/maps").read_text().count("\n")

    def pause(self) -> None:
        """Stops it from answering, with nothing closed, until `resume`."""
        self.console.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        self.console.signal(signal.SIGCONT)

    def stop(self) -> int:
        """Ends it as its user does; the exit status."""
        self.console.signal(signal.SIGTERM)
        return self.console.wait()

    def close(self) -> None:
        """Kills it at once."""
        self.console.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

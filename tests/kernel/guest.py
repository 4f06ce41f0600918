"""Booted guests: their console, and the commands that our init runs for us (guest/user/init.c lists them).

A guest is a context manager; leaving it kills it hard, with all its processes: QEMU that waits for a back-end ignores
SIGTERM, and user-mode Linux is several processes. A wait that ends in vain raises with the console's last lines.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Self

from tests.kernel import build
from tests.kernel.console import STEP_SECONDS, Console, GuestError
from tests.kernel.cpio import archive
from tests.kernel.transcript import WRITE_FAILED, driver_request

BOOT_SECONDS = 60.0
"""How long a boot may take on a busy machine; it takes 1 to 3 s on an idle one."""

# No time stamps, so that lines compare with the original's; no limit to how often init may log.
ARGUMENTS = "quiet printk.time=0 printk.devkmsg=on panic=-1 rdinit=/init"


class Guest:
    """A Linux guest with our init; subclasses say how it is started.

    Attributes:
        console: the process and its output.
        boot_seconds: from its start to the moment at which init reads commands.
    """

    console: Console
    boot_seconds: float

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="virtio-test-guest-")
        self.folder = Path(self._folder.name)
        self._initrd = self.folder / "initrd"
        self._initrd.write_bytes(archive(files))

    def _boot(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, stderr: IO[bytes] | None = None
    ) -> None:
        self.console = Console(command, env=env, cwd=self.folder, stderr=stderr)
        try:
            self.console.wait_for("guest: ready", timeout=BOOT_SECONDS)
        except GuestError:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - self.console.started

    def command(self, line: str, *, status: int | None = 0, timeout: float = STEP_SECONDS) -> list[str]:
        """Runs one command of init and returns the console's lines from then to its end.

        Args:
            line: the command.
            status: the status that it must end with; None takes any.
            timeout: in seconds.

        Raises:
            GuestError: another status, or no end in time.
        """
        before = len(self.console.lines)
        pattern = re.compile(rf"guest: end: (\d+) {re.escape(line)}")

        def ends(lines: list[str]) -> list[int]:
            return [i for i, text in enumerate(lines[before:], before) if pattern.fullmatch(text)]

        self.console.send(line)
        self.console.wait_until(lambda lines: bool(ends(lines)), f"end of {line!r}", timeout=timeout)
        lines = self.console.lines
        end = ends(lines)[0]
        found = pattern.fullmatch(lines[end])
        if status is not None and (found is None or int(found[1]) != status):
            raise GuestError(f"{lines[end]!r}, expected {status}; its last lines:\n" + "\n".join(lines[-40:]))
        return lines[before:end]

    def start(self, line: str) -> None:
        """Sends a command without waiting for its end."""
        self.console.send(line)

    def ends_of_writers(self, numbers: Sequence[int]) -> tuple[int, int]:
        """How many of the writers of ``numbers`` failed, and how many requests were answered, once all have ended."""
        ended = re.compile(r"guest: end: \d+ wait")
        self.console.wait_until(lambda lines: any(map(ended.fullmatch, lines)), "end of the writers")
        lines = self.console.lines
        return lines.count(WRITE_FAILED), sum(lines.count(driver_request(number)[1]) for number in numbers)

    def load(self, *parameters: str) -> list[str]:
        """Loads our driver module; returns what the console says meanwhile."""
        return self.command(" ".join(["insmod virtio_test", *parameters]))

    def power_off(self) -> None:
        """Powers off and waits for the end.

        Raises:
            GuestError: it does not end, or not with status 0.
        """
        self.console.send("poweroff")
        status = self.console.wait()
        if status:
            raise GuestError(f"power off ended with status {status}; its last lines:\n{self.console.text[-4000:]}")

    def close(self) -> None:
        """Kills it and removes its files."""
        if hasattr(self, "console"):
            self.console.kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Uml(Guest):
    """User-mode Linux as a vhost-user front-end.

    Args:
        socket: of the back-end, which must be listening.
        virtio_id: the device behind it.
        arguments: further words for the kernel.
        prefix: words before its own, of a program that starts it.
        files: further files, by path.
    """

    def __init__(
        self,
        socket: Path,
        *,
        virtio_id: int = 45,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.kernel = kernel = build.uml_kernel()
        super().__init__(build.files(kernel) | dict(files))
        command = [*prefix, str(kernel.image), "mem=64M", f"initrd={self._initrd}", f"uml_dir={self.folder}"]
        command += ["con=null", "con0=fd:0,fd:1", "ssl=null", "console=tty0", *ARGUMENTS.split()]
        command += [f"virtio_uml.device={socket}:{virtio_id}", *arguments]
        self._boot(command)

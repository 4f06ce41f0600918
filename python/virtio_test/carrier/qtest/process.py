"""`QemuProcess`: one QEMU without a guest, ready to be driven over its test protocol.

Theory
------
The machine has to run: rng, blk and net complete nothing while it is stopped. So it is started on a firmware image
of ours whose first instruction stops the processor (``cli; hlt``), and everything else is done from outside. Its
RAM is a file that both processes map, and its test protocol goes over a socket pair, so nothing of either has a
name that could be left behind but one temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from virtio_test.errors import InvalidArgument, PeerDisconnected

__all__ = ["Machine", "QemuProcess", "halting_firmware"]

Machine = Literal["q35", "pc", "microvm"]

_FIRMWARE_SIZE: Final = 64 << 10
_RESET_VECTOR: Final = _FIRMWARE_SIZE - 16
_HALT: Final = bytes([0xFA, 0xF4, 0xEB, 0xFD])  # cli; hlt; jmp back to the hlt
_LAST_LINES: Final = 12
_LAST_BYTES: Final = 4096
_STOP_SECONDS: Final = 5.0
_MACHINES: Final = ("q35", "pc", "microvm")


def halting_firmware() -> bytes:
    """64 KiB of firmware in which an x86 processor stops at its first instruction."""
    return bytes(_RESET_VECTOR) + _HALT.ljust(16, b"\0")


class QemuProcess:
    """A running QEMU; a context manager that ends it.

    Args:
        command: the words that start ``qemu-system-x86_64``; everything else is added.
        arguments: ``-device``, ``-netdev`` and the like, in QEMU's own words.
        machine: ``q35``, ``pc`` (i440fx) or ``microvm``.
        env: its environment; ours when None.
        ram: bytes of RAM, a multiple of 1 MiB up to 1 GiB.
        exit_with_parent: let it die with the thread that started it (QEMU 10.2 and newer).

    Attributes:
        channel: our end of its test protocol.
        ram_path: the file that is its RAM.
        folder: a folder that goes with it, for sockets and images.

    Raises:
        InvalidArgument: an unknown machine or a size that cannot be.
        PeerDisconnected: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str] = ("qemu-system-x86_64",),
        arguments: Sequence[str] = (),
        *,
        machine: Machine = "q35",
        env: Mapping[str, str] | None = None,
        ram: int = 64 << 20,
        exit_with_parent: bool = True,
    ) -> None:
        if machine not in _MACHINES:
            raise InvalidArgument(f"machine {machine!r}; known are {', '.join(_MACHINES)}")
        if ram % (1 << 20) or not 2 << 20 <= ram <= 1 << 30:
            raise InvalidArgument(f"{ram} bytes of RAM; it is a multiple of 1 MiB from 2 MiB to 1 GiB")
        self.machine: Machine = machine
        self.ram = ram
        self._folder = tempfile.TemporaryDirectory(prefix="virtio-test-qemu-")
        self.folder = Path(self._folder.name)
        self.ram_path = self.folder / "ram"
        self._errors = self.folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None
        self.channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._start([*command, *self._words(theirs.fileno(), exit_with_parent), *arguments], env, theirs)
        except BaseException:
            self.close()
            raise

    def _words(self, fd: int, exit_with_parent: bool) -> list[str]:  # noqa: FBT001 - handed on from a keyword
        firmware = self.folder / "firmware"
        firmware.write_bytes(halting_firmware())
        with self.ram_path.open("wb") as file:
            file.truncate(self.ram)
        words = ["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-bios", str(firmware)]
        words += ["-object", f"memory-backend-file,id=m0,size={self.ram},mem-path={self.ram_path},share=on"]
        # With one I/O APIC all inputs can be intercepted; microvm takes two where it can, for more transports.
        more = ",acpi=on,ioapic2=off" if self.machine == "microvm" else ""
        words += ["-machine", f"{self.machine},memory-backend=m0{more}", "-m", f"{self.ram >> 20}"]
        words += ["-chardev", f"socket,id=qtest,fd={fd}", "-qtest", "chardev:qtest", "-qtest-log", "none"]
        if self.machine == "microvm":
            words += ["-global", "virtio-mmio.force-legacy=false"]
        if exit_with_parent:
            words += ["-run-with", "exit-with-parent=on"]
        return words

    def _start(self, words: list[str], env: Mapping[str, str] | None, theirs: socket.socket) -> None:
        with self._errors.open("wb") as errors:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    env=None if env is None else dict(env),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerDisconnected(f"{words[0]} cannot be started: {error.strerror}") from None

    def __repr__(self) -> str:
        return f"<QemuProcess {self.machine}, {'running' if self.running else 'ended'}>"

    @property
    def pid(self) -> int | None:
        """Its process id; None once it was closed."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The last lines that it wrote, and its exit status if it has one, as one line."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Its socket closes a moment before its status is there.
                self._process.wait(0.5)
        try:
            with self._errors.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
                lines = file.read(_LAST_BYTES).decode(errors="replace").splitlines()
        except OSError:
            lines = []
        status = None if self._process is None else self._process.poll()
        return " | ".join([*lines[-_LAST_LINES:], *([f"exit status {status}"] if status is not None else [])])

    def close(self) -> None:
        """End it and remove its files; harmless a second time."""
        self.channel.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_SECONDS)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

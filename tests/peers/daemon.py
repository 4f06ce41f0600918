"""qemu-storage-daemon as a peer: one file behind a vhost-user socket, started, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.kernel import build

__all__ = ["Daemon"]

_START_SECONDS: Final = 30.0


class Daemon:
    """One daemon with one export.

    Args:
        folder: short, for its sockets, its image and its log.
        size: bytes of the image, which is random.
        queues: its request queues.
        writable: whether it may be written to.
        slow: operations a second; None for as many as it can.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 4 << 20,
        queues: int = 1,
        writable: bool = True,
        slow: int | None = None,
    ) -> None:
        self.folder = folder
        self.path = folder / "s"
        self.image = folder / "image"
        self.content = os.urandom(size)
        self.image.write_bytes(self.content)
        self.queues = queues
        self.writable = writable
        self.slow = slow
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def version() -> str:
        """As it says itself, such as ``11.1.2``."""
        return build.qemu().version.split()[3]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it listens."""
        root = build.qemu()
        for name in ("s", "qmp"):
            (self.folder / name).unlink(missing_ok=True)
        words = [
            *root.command("qemu-storage-daemon"),
            "--blockdev",
            f"driver=file,node-name=file,filename={self.image}",
        ]
        node = "file"
        if self.slow is not None:
            words += ["--object", f"throttle-group,id=slow,x-iops-total={self.slow}"]
            words += ["--blockdev", "driver=throttle,node-name=slowed,throttle-group=slow,file=file"]
            node = "slowed"
        words += [
            "--chardev",
            f"socket,id=qmp,path={self.folder / 'qmp'},server=on,wait=off",
            "--monitor",
            "chardev=qmp",
        ]
        words += [
            "--export",
            f"type=vhost-user-blk,id=export,node-name={node},writable={'on' if self.writable else 'off'},"
            f"addr.type=unix,addr.path={self.path},num-queues={self.queues}",
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                words, env=root.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + _START_SECONDS
        while not self._listens():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < end, f"qemu-storage-daemon does not listen: {self.log()}"
            time.sleep(0.01)

    def _listens(self) -> bool:
        """Whether its socket is there and bound; a connection would be the front-end that it serves."""
        lines = Path("/proc/net/unix").read_text().splitlines()
        # Field 3 is __SO_ACCEPTCON where it listens.
        return any(line.endswith(f" {self.path}") and line.split()[3] == "00010000" for line in lines)

    def kill(self) -> None:
        """End it without a word, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    def qmp(self, command: str, **arguments: object) -> Any:
        """One command to its monitor; what it returns."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_START_SECONDS)
            connection.connect(str(self.folder / "qmp"))
            lines = connection.makefile("rw")
            json.loads(lines.readline())
            for each in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(each) + "\n")
                lines.flush()
                answer = json.loads(lines.readline())
                while "event" in answer:
                    answer = json.loads(lines.readline())
            assert "return" in answer, answer
            lines.close()
            return answer["return"]

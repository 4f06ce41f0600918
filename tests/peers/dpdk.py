"""DPDK's testpmd, as a back-end (net_vhost) or as a driver (virtio-user), told what to do on its command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import termios
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.peers import reference

__all__ = ["Stats", "Testpmd"]

_PROMPT: Final = b"testpmd> "
_SECONDS: Final = 60.0
_BURST: Final = 32
Stats = dict[str, int]


class Testpmd:
    """One testpmd with one port and one core that forwards, without huge pages.

    Args:
        device: the port, as ``--vdev`` has it.
        cpu: where the port is polled.
        prefix: what tells it from others that run.
        frame: bytes of each frame that it sends by itself.
        mbufs: packets that it has memory for.
        options: what follows.

    Raises:
        BuildError: it cannot be fetched.
    """

    __test__ = False

    def __init__(
        self,
        device: str,
        *,
        cpu: int = 0,
        prefix: str,
        frame: int = 64,
        mbufs: int = 16000,
        options: Sequence[str] = (),
    ) -> None:
        words = shlex.split(reference.program("dpdk-testpmd"))
        cpus = f"0-{max(os.sched_getaffinity(0))}" if max(os.sched_getaffinity(0)) else "0"
        words += ["--no-huge", "-m", "256", "--no-pci", "--lcores", f"0@({cpus}),1@{cpu}", "--no-telemetry"]
        words += ["--file-prefix", f"{prefix}{os.getpid()}", "--vdev", device, "--", "-i", "--nb-cores=1"]
        words += [f"--burst={_BURST}", f"--txpkts={frame}", f"--total-num-mbufs={mbufs}", "--no-mlockall", *options]
        self._heard = b""
        # What it prints to a pipe it keeps to itself until there is much of it.
        self._terminal, end = os.openpty()
        attributes = termios.tcgetattr(end)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(end, termios.TCSANOW, attributes)
        try:
            self._process = subprocess.Popen(words, stdin=end, stdout=end, stderr=end)
        except BaseException:
            os.close(self._terminal)
            raise
        finally:
            os.close(end)
        self._more = threading.Condition()
        self._ended = False
        # A terminal that is full would stop it in the middle of a message.
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @classmethod
    def back_end(cls, path: Path, **options: object) -> Testpmd:
        """net_vhost, listening at `path`."""
        return cls(f"net_vhost0,iface={path}", prefix="be", **options)  # type: ignore[arg-type]

    @classmethod
    def driver(cls, path: Path, *, packed: bool, name: str = "", **options: object) -> Testpmd:
        """virtio-user in front of what listens at `path`; `name` tells it from others of ours."""
        device = f"net_virtio_user0,path={path},queue_size=256,queues=1,packed_vq={int(packed)}"
        return cls(device, prefix=f"fe{name}", **options)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        try:
            self.wait_for(_PROMPT)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_for(self, text: bytes, *, seconds: float = _SECONDS) -> str:
        """What it says up to `text`.

        Raises:
            AssertionError: it ends, or does not say it in time.
        """
        with self._more:
            self._more.wait_for(lambda: text in self._heard or self._ended, seconds)
            told = self._heard[-2000:].decode(errors="replace")
            assert text in self._heard, f"testpmd says no {text!r} but {told}"
            said, _, self._heard = self._heard.partition(text)
        return said.decode(errors="replace")

    def _listen(self) -> None:
        data = b"-"
        while data:
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:  # what a terminal without another end says
                data = b""
            with self._more:
                self._heard += data
                self._ended = not data
                self._more.notify_all()

    def tell(self, command: str) -> str:
        """One command; what it says to that."""
        os.write(self._terminal, command.encode() + b"\n")
        self.wait_for(command.encode() + b"\r")
        return self.wait_for(_PROMPT)

    def stats(self) -> Stats:
        """The port's counters, by testpmd's names (``RX-packets``, ``TX-packets``, …)."""
        said = self.tell("show port stats 0")
        return {name: int(value) for name, value in re.findall(r"([RT]X-[\w-]+): +(\d+)", said)}

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._terminal)

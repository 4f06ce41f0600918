"""A native driver before a vhost-user back-end: `benches/peers/load.rs`, built and asked for a round at a time.

The connection, the memory and the ring are set up in Python by our front-end; the program gets the memory and both fds
of the ring and does the asking, so that what is measured is the back-end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from virtio_test._core import GuestMemory, QueueConfig, RingLayout
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.frontend import FrontEnd

from benches.runner import BenchError, MissingPeer

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "target" / "benches"
PROGRAM = TARGET / "load" / "examples" / "load"

MEMORY = 4 << 20
QUEUE = 256
PATIENCE = 20.0
LONGEST = 120.0
"""Seconds that a round may take on a machine that is busy with other things."""


def build() -> None:
    """Build the program anew when its sources have changed.

    Raises:
        MissingPeer: there is no cargo.
        BenchError: it does not build.
    """
    cargo = shutil.which("cargo") or shutil.which(Path("~/.cargo/bin/cargo").expanduser())
    if cargo is None:
        raise MissingPeer("no cargo on the path builds benches/peers/load.rs: install Rust 1.85 or newer (rustup)")
    command = [cargo, "build", "--quiet", "--locked", "--profile=load", "--example=load", "--no-default-features"]
    built = subprocess.run(
        [*command, f"--target-dir={TARGET}"], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False
    )
    if built.returncode:
        lines = built.stderr.strip().splitlines() or ["cargo says nothing"]
        raise BenchError(f"benches/peers/load.rs does not build: {lines[0]}")


@contextmanager
def running(words: Sequence[str | os.PathLike[str]], path: Path) -> Generator[None]:
    """A program that listens at `path` before we go on, and is ended with a signal.

    Raises:
        BenchError: it ends by itself, or does not listen.
    """
    with tempfile.TemporaryFile() as said:
        program = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=ROOT)
        try:
            end = time.monotonic() + PATIENCE
            while not _listens(path):
                if program.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    told = said.read().decode("utf-8", "replace").strip().splitlines() or ["it says nothing"]
                    raise BenchError(f"{Path(words[0]).name} does not listen at {path}: {told[-1]}")
                time.sleep(0.01)
            yield
        finally:
            program.terminate()
            try:
                program.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def _listens(path: Path) -> bool:
    """Whether a socket is bound there and listens; to connect would be to be its front-end."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    # Field 3 is __SO_ACCEPTCON where it listens.
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


@dataclass(frozen=True)
class Asked:
    """What came of a round: nanoseconds of all of it, kicks that were sent, and waits for a call."""

    nanoseconds: int
    kicks: int
    waits: int


class Asking:
    """The program, with the ring of a back-end set up for it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._socket, self._pid = connection, pid
        self._lines: IO[str] = connection.makefile("r", encoding="utf-8")
        if self._lines.readline() != "ready\n":
            raise BenchError("the driver program does not begin")

    def ask(self, requests: int, *, spin: int, seed: int) -> Asked:
        """Have it make `requests`, and look at the ring for `spin` microseconds before it waits for a call.

        Raises:
            BenchError: an answer is wrong, or missing.
        """
        self._socket.sendall(f"{requests} {spin} {seed}\n".encode())
        try:
            line = self._lines.readline().strip()
        except TimeoutError:
            raise BenchError(f"the driver has not done {requests} requests in {LONGEST:g} s") from None
        words = line.split()
        if len(words) != 3 or not all(word.isdecimal() for word in words):
            raise BenchError(f"the driver: {line or 'it has ended'}")
        return Asked(*map(int, words))

    def pin(self, cpu: int) -> None:
        """Have it run on that CPU alone."""
        os.sched_setaffinity(self._pid, {cpu})

    def close(self) -> None:
        """End it."""
        self._lines.close()
        self._socket.close()


@contextmanager
def asking(path: Path, kind: str, *, depth: int, packed: bool = False, sectors: int = 8) -> Generator[Asking]:
    """A driver of `kind` (``blk`` or ``rng``) before the back-end at `path`, with `depth` requests in flight."""
    wanted = FeatureSet("VERSION_1", "EVENT_IDX", *(["RING_PACKED"] if packed else []))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        front = stack.enter_context(FrontEnd(path, timeout=PATIENCE))
        features = front.negotiate(wanted)
        if packed and "RING_PACKED" not in features:
            raise BenchError(f"the back-end at {path} has no packed rings")
        memory = GuestMemory([(0, MEMORY)])
        fd = memory.regions[0].fd
        assert fd is not None
        front.share(memory)
        config = QueueConfig.from_layout(RingLayout.contiguous(QUEUE, 0x1000, packed=packed), features=features.bits)
        ring = front.setup_ring(config)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "rounds"))
        listener.listen(1)
        listener.settimeout(PATIENCE)
        words = [PROGRAM, folder / "rounds", f"/proc/{os.getpid()}/fd/{fd}", MEMORY, QUEUE, int(packed), features.bits]
        program = subprocess.Popen(
            [str(word) for word in (*words, kind, depth, sectors)],
            stdin=ring.kick.fileno(),
            stdout=ring.call.fileno(),
        )
        stack.callback(program.wait)
        stack.callback(program.kill)
        connection, _ = listener.accept()
        connection.settimeout(LONGEST)
        made = Asking(connection, program.pid)
        stack.callback(made.close)
        front.enable(0)
        yield made

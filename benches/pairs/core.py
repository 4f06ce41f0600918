"""The bare core: both ends of a queue beside the crates that others build on, and beside themselves.

The program is `benches/rust`, a crate of its own, which this module builds and asks for a round at a time. Device
ends are measured against the three idioms of virtio-queue with vm-memory: its iterator, `pop_descriptor_chain`, that
with `Reader` and `Writer`; the driver end against virtio-driver. A device end takes chains, uses them and decides
whether to notify; our driver end filled the ring before. Both sides run in one process, and what they did is compared
after each round: chains, bytes, used entries, and in a pass of its own every head and every byte that was copied.

"Flat" cases compare our device end with itself: nothing that a chain costs grows with the queue, the memory, or the
time that it has run. Of that time there are only the indices: they begin where those chains would have them end.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benches.runner import BenchError, Case, MissingPeer, Round

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "target" / "benches"
PROGRAM = TARGET / "release" / "virtio-test-benches"

IDIOMS = {"iter": "virtio-queue iterator", "pop": "virtio-queue pop", "reader": "virtio-queue Reader/Writer"}
SHAPES = {"48+12": "48+12 B", "4x4096+12": "4x4 KiB + 12 B", "table-1": "indirect of 1", "table-4": "indirect of 4"}


UPTIME = (1 << 32) + 13
"""Chains, of which there are more than a 32-bit counter tells apart; both kinds of indices then stand within a lap."""


@dataclass(frozen=True)
class Ring:
    """Format, size, the number of memory regions that buffers are spread over, and of chains that it has had."""

    size: int = 128
    regions: int = 1
    packed: bool = False
    before: int = 0

    @property
    def word(self) -> str:
        """As the program takes it."""
        return f"{self.format}:{self.size}:{self.regions}:{self.before}"

    @property
    def format(self) -> str:
        """`split` or `packed`."""
        return "packed" if self.packed else "split"

    def __str__(self) -> str:
        had = f", after {self.before} chains" if self.before else ""
        return f"{self.format} {self.size}, {self.regions} region{'s' if self.regions > 1 else ''}{had}"


@functools.cache
def build() -> Path:
    """The program, built anew when its sources have changed; once in a process.

    Raises:
        MissingPeer: there is no cargo.
        BenchError: it does not build.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise MissingPeer("no cargo on the path builds benches/rust: install Rust 1.85 or newer (rustup)")
    manifest = ROOT / "benches" / "rust" / "Cargo.toml"
    command = [cargo, "build", "--release", "--locked", "--quiet", f"--manifest-path={manifest}"]
    built = subprocess.run([*command, f"--target-dir={TARGET}"], stderr=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        lines = built.stderr.strip().splitlines() or ["cargo says nothing"]
        raise BenchError(f"benches/rust does not build: {lines[0]}")
    return PROGRAM


def _ask(program: subprocess.Popen[bytes], said: IO[str]) -> tuple[float, float]:
    """Have the program measure one round."""
    if program.stdin is None or program.stdout is None:
        raise BenchError("the program has no pipes")
    try:
        program.stdin.write(b"\n")
        line = program.stdout.readline()
    except BrokenPipeError:
        line = b""
    if not line:
        code = program.wait()
        said.seek(0)
        raise BenchError(f"the program ended with {code}: {said.read().strip()[:500]}")
    measured = json.loads(line)
    return measured["ours"], measured["peer"]


def _opener(words: Sequence[str]) -> Callable[[bool], Generator[Round]]:
    def opened(quick: bool) -> Generator[Round]:
        del quick  # a round takes milliseconds
        # What it prints when it panics may be more than a pipe holds.
        with tempfile.TemporaryFile("w+") as said:
            command = [str(build()), "run", *words]
            pipe = subprocess.PIPE
            # Unbuffered: what could not be said to a program that ended must not be said again when the pipe is closed.
            with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, bufsize=0) as program:
                try:
                    yield lambda: _ask(program, said)
                finally:
                    program.kill()

    return opened


ROUNDS_COUNTED = 3
TIMED = ("*Bursts*run*", "*timed*")
"""What of the program is timed, by the names of its functions."""


def _count(words: Sequence[str], side: str) -> float:
    """Of one chain, on one side, by callgrind: of what is timed, and of nothing else."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise MissingPeer("no valgrind on the path counts instructions: install the package valgrind")
    command = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += [f"--toggle-collect={name}" for name in TIMED]
    command += [str(build()), "spin", side, str(ROUNDS_COUNTED), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counted = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or counted is None or not int(counted[1]):
        raise BenchError(f"callgrind counted nothing: {done.stderr.strip()[-500:]}")
    return int(counted[1]) / int(done.stdout)


def case(
    what: str,
    peer: str,
    ring: Ring,
    *,
    shape: str = "48+12",
    burst: int = 32,
    copy: bool = False,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Case:
    """One case; `what` is as the program takes it, `peer` as people call it."""
    words = [what, ring.word, shape, str(burst), "copy" if copy else "plain"]
    name = {"device": "device end", "driver": "driver end", "cores": "two cores polling", "flat": "flat"}
    kind = name[what.partition(":")[0]]
    copied = ", with copy" if copy else ""
    must, aim = bounds
    return Case(
        pair="core",
        shape=f"{kind}, {ring}, {SHAPES[shape]}{copied}, batch {burst}: {peer}",
        unit="M chains/s" if kind == "two cores polling" else "ns/chain",
        open=contextmanager(_opener(words)),
        more_is_better=kind == "two cores polling",
        must=must,
        aim=aim,
        count=None if kind in {"flat", "two cores polling"} else lambda: (_count(words, "ours"), _count(words, "peer")),
        cores=2 if kind == "two cores polling" else 1,
    )


Bounds = tuple[tuple[float | None, float | None], ...]
OPEN: Bounds = ((None, None),) * 3


def _devices() -> Generator[Case]:
    small, large = Ring(), Ring(size=256)
    asked: list[tuple[Ring, str, int, bool, Bounds]] = [
        (small, "48+12", 32, False, ((3, 4.5), (4, 6.5), (8, 12))),
        (Ring(regions=8), "48+12", 32, False, ((4.5, 7), (7, 10), (12, 18))),
        (small, "48+12", 1, False, ((1.8, 2.4), (2.5, 3.5), (4, 6))),
        (small, "48+12", 32, True, ((2.5, 3.5), (4, 5.5), (8, 13))),
        (large, "4x4096+12", 32, False, OPEN),
        (large, "4x4096+12", 32, True, OPEN),
        (small, "table-1", 32, False, OPEN),
        (small, "table-4", 32, False, OPEN),
        (Ring(size=1024), "48+12", 32, False, OPEN),
        (Ring(size=32768), "48+12", 32, False, OPEN),
    ]
    for ring, shape, burst, copy, bounds in asked:
        for (idiom, peer), bound in zip(IDIOMS.items(), bounds, strict=True):
            yield case(f"device:{idiom}", peer, ring, shape=shape, burst=burst, copy=copy, bounds=bound)


def cases() -> Sequence[Case]:
    """Those of the table that we promise first, by what they are."""
    made = list(_devices())
    for packed in (False, True):
        made += [
            case("driver", "virtio-driver", Ring(packed=packed), bounds=(1.15, 1.4)),
            case("driver", "virtio-driver", Ring(packed=packed), burst=1),
        ]
    for idiom, bounds in (("pop", (4.0, 6.0)), ("reader", (6.0, 9.0))):
        made += [
            case(f"cores:{idiom}", IDIOMS[idiom], Ring(size=256), bounds=bounds),
            case(f"cores:{idiom}", IDIOMS[idiom], Ring(size=256), burst=1),
        ]
    # Within 15 % whatever the size and the uptime, and within 25 % whatever the regions: as ratios.
    for packed in (False, True):
        base = Ring(packed=packed)
        for ring, must in (
            (Ring(size=1024, packed=packed), 0.87),
            (Ring(size=32768, packed=packed), 0.87),
            (Ring(regions=8, packed=packed), 0.8),
            (Ring(packed=packed, before=UPTIME), 0.87),
        ):
            made.append(case(f"flat:{base.word}", f"our own, {base}", ring, bounds=(must, None)))
    return made

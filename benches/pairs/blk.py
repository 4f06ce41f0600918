"""A disk behind vhost-user: ours against qemu-storage-daemon, on the same file in memory, asked by the same driver.

The driver is native (`asking`): it keeps a number of requests in flight, looks at the used ring for a while and then
waits for a call. Each read is of 4 KiB at a random place, the same places for both, and what comes back is checked.
Both have one thread for the queue, which looks at the ring before it sleeps: ours for 50 µs, QEMU's for the 32 µs
that are its default.

In another pair the driver is Linux in a QEMU that has both as disks, and a program in it reads them past its cache.
QEMU translates that guest's processor, so most of the time there is the guest's own.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benches.asking import Asking, asking, build, running
from benches.runner import BenchError, Case, MissingPeer, Round, turns
from tests.kernel import build as images
from tests.kernel.cache import BuildError
from tests.kernel.checks import said, shell
from tests.kernel.qemu import Qemu, vhost_user_blk
from tests.peers import reference

SHARED = Path("/dev/shm")
BYTES = 64 << 20
SECTOR = 512
SPIN = 50


def daemon() -> list[str]:
    """The words that start QEMU's program: the one on the path, or else the one that is fetched for the tests.

    Raises:
        MissingPeer: it is not there, and cannot be fetched.
    """
    found = shutil.which("qemu-storage-daemon")
    if found is not None:
        return [found]
    try:
        return shlex.split(reference.program("qemu-storage-daemon"))
    except BuildError as error:
        raise MissingPeer(f"no qemu-storage-daemon on the path, and none to be fetched: {error}") from error


def fill(path: Path) -> None:
    """An image in which each sector begins with its number."""
    with path.open("wb") as image:
        for first in range(0, BYTES // SECTOR, 2048):
            image.write(
                b"".join(number.to_bytes(8, "little").ljust(SECTOR, b"\x5a") for number in range(first, first + 2048))
            )


@contextmanager
def served(folder: Path) -> Generator[tuple[Path, Path]]:
    """Sockets of our back-end and of QEMU's, of one image."""
    image, ours, theirs = folder / "image", folder / "ours", folder / "theirs"
    fill(image)
    export = (
        f"type=vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={theirs},writable=on,iothread=thread"
    )
    words = [*daemon(), "--object", "iothread,id=thread", "--blockdev", f"driver=file,node-name=file,filename={image}"]
    with contextlib.ExitStack() as stack:
        serve = [sys.executable, "-m", "benches.peers.serve", ours, "--wait", "adaptive", "--image", image]
        stack.enter_context(running(serve, ours))
        stack.enter_context(running([*words, "--export", export], theirs))
        yield ours, theirs


@contextmanager
def in_memory() -> Generator[Path]:
    """A folder in memory, where there is one."""
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
        yield Path(folder)


def case(depth: int, *, packed: bool, must: float, aim: float) -> Case:
    """Reads with `depth` of them in flight."""

    @contextmanager
    def opened(quick: bool) -> Generator[Round]:
        build()
        count = (200 if quick else 40_000) * min(depth, 4) // 4
        with contextlib.ExitStack() as stack:
            sides = [
                stack.enter_context(asking(path, "blk", depth=depth, packed=packed, sectors=BYTES // SECTOR))
                for path in stack.enter_context(served(stack.enter_context(in_memory())))
            ]

            def side(which: Asking) -> Callable[[], float]:
                # The same places in the same order on both sides.
                seeds = itertools.count(1)
                return lambda: count / which.ask(count, spin=SPIN, seed=next(seeds)).nanoseconds * 1e9

            yield turns(*map(side, sides))

    ring = "packed" if packed else "split"
    shape = f"4 KiB random read, depth {depth}, {ring}"
    return Case("blk", shape, "requests/s", opened, more_is_better=True, must=must, aim=aim)


@contextmanager
def guest(ours: Path, theirs: Path) -> Generator[tuple[Qemu, tuple[str, str]]]:
    """Linux in QEMU with both disks, and their devices in it: ours, the other.

    Raises:
        MissingPeer: kernel, QEMU or programs are not there, and cannot be fetched or built.
    """
    places = {"ours": 4, "theirs": 5}
    devices = [
        word
        for (name, slot), path in zip(places.items(), (ours, theirs), strict=True)
        for word in vhost_user_blk(path, name=name, properties=(f"addr={slot}.0",))
    ]
    try:
        booted = Qemu(devices, modules=("virtio_pci", "virtio_blk"), tools=True, files=images.disk_files())
    except BuildError as error:
        raise MissingPeer(f"no guest to read from the disks: {error}") from error
    with booted:
        found = shell(booted, "for at in /sys/block/vd*; do echo $(basename $at) $(readlink -f $at); done")
        disks = {f"00:{slot:02x}.0": name for name, slot in places.items()}
        names = {disks[at]: line.split()[0] for line in found for at in disks if f"/0000:{at}/" in line}
        yield booted, (f"/dev/{names['ours']}", f"/dev/{names['theirs']}")


def by_guest(depth: int, *, must: float, aim: float) -> Case:
    """The same with QEMU as the front-end and Linux in it as the driver."""

    @contextmanager
    def opened(quick: bool) -> Generator[Round]:
        count = (200 if quick else 6000) * min(depth, 4) // 4
        with contextlib.ExitStack() as stack:
            ours, theirs = stack.enter_context(served(stack.enter_context(in_memory())))
            booted, disks = stack.enter_context(guest(ours, theirs))
            sums: dict[str, list[str]] = {disk: [] for disk in disks}

            def side(disk: str) -> Callable[[], float]:
                def measure() -> float:
                    seed = len(sums[disk]) + 1
                    (line,) = said(booted.command(f"run reads {disk} {count} {depth} {seed}", status=None))
                    told = re.fullmatch(rf"{count} reads in (\d+) ns, (\d+)", line)
                    if told is None:
                        raise BenchError(f"the guest said of {disk}: {line}")
                    sums[disk].append(told[2])
                    return count / int(told[1]) * 1e9

                return measure

            both = turns(*map(side, disks))

            def one() -> tuple[float, float]:
                rates = both()
                if sums[disks[0]] != sums[disks[1]]:
                    raise BenchError(f"the guest read other sectors of the two disks: {sums}")
                return rates

            yield one

    shape = f"4 KiB random read, depth {depth}, Linux in QEMU"
    return Case("blk", shape, "requests/s", opened, more_is_better=True, must=must, aim=aim)


def cases() -> Sequence[Case]:
    """Each depth; QEMU's export has split rings only."""
    return [
        case(32, packed=False, must=1.0, aim=1.5),
        case(1, packed=False, must=1.0, aim=1.3),
        by_guest(32, must=1.0, aim=1.5),
        by_guest(1, must=1.0, aim=1.3),
    ]

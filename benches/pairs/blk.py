"""A disk behind vhost-user: ours against qemu-storage-daemon, on the same file in memory, asked by the same driver.

The driver is native (`asking`): it keeps a number of requests in flight, looks at the used ring for a while and then
waits for a call. Each read is of 4 KiB at a random place, the same places for both, and what comes back is checked.
Both have one thread for the queue, which looks at the ring before it sleeps: ours for 50 µs, QEMU's for the 32 µs
that are its default.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benches.asking import Asking, asking, build, running
from benches.runner import Case, MissingPeer, Round, turns
from tests.kernel.cache import BuildError
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
def both(folder: Path, depth: int, *, packed: bool) -> Generator[tuple[Asking, Asking]]:
    """The driver before our back-end, and before QEMU's."""
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
        sectors = BYTES // SECTOR
        yield (
            stack.enter_context(asking(ours, "blk", depth=depth, packed=packed, sectors=sectors)),
            stack.enter_context(asking(theirs, "blk", depth=depth, packed=packed, sectors=sectors)),
        )


def case(depth: int, *, packed: bool, must: float, aim: float) -> Case:
    """Reads with `depth` of them in flight."""

    @contextmanager
    def opened(quick: bool) -> Generator[Round]:
        build()
        count = (200 if quick else 40_000) * min(depth, 4) // 4
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None)))
            sides = stack.enter_context(both(folder, depth, packed=packed))

            def side(which: Asking) -> Callable[[], float]:
                # The same places in the same order on both sides.
                seeds = itertools.count(1)
                return lambda: count / which.ask(count, spin=SPIN, seed=next(seeds)).nanoseconds * 1e9

            yield turns(*map(side, sides))

    ring = "packed" if packed else "split"
    shape = f"4 KiB random read, depth {depth}, {ring}"
    return Case("blk", shape, "requests/s", opened, more_is_better=True, must=must, aim=aim)


def cases() -> Sequence[Case]:
    """Each depth; QEMU's export has split rings only."""
    return [case(32, packed=False, must=1.0, aim=1.5), case(1, packed=False, must=1.0, aim=1.3)]

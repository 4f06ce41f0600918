"""Other people's back-ends and machines of two Debians, as `virtio-test judge` starts them; and the page about them.

``python -m tests.peers.reference`` judges all of them and writes docs/judge.md; with ``--only NAME`` and ``--row ID``
it judges a part and prints it. What is not there is fetched into the cache and never installed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from virtio_test import judge
from virtio_test.cli.progress import Progress

from tests.kernel import build, cache, packages

DOCS = Path(__file__).resolve().parents[2] / "docs" / "judge.md"
HEAD = """# What others make of broken rings

Written by `make judge`, which runs `virtio-test judge` against the programs of Debian 12 and of Debian's testing, each
case in a process of its own on one machine.

- **survives**: the broken queue is given up or left alone, and a good request is answered afterwards;
- **refuses**: the connection ends or a message is refused, and the next one is served;
- **ignores**: a broken chain is completed as if it were one;
- **hangs**: nothing good is answered any more, or a processor is burnt until somebody comes;
- **dies**: the process ends.

A finding was seen twice, or says that it was not. What a target cannot be asked is left out: it offers no packed ring,
say, or vhost-user has no memory that is only read. The first target is our own device.

"""
OLD_SUITE = "bookworm"
_PLUGINS = ("librte_net_vhost.so", "librte_net_virtio.so", "librte_mempool_ring.so", "librte_bus_vdev.so")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@functools.cache
def debian_12() -> Path:
    """A root with Debian 12's QEMU and DPDK."""
    key = cache.digest(OLD_SUITE, cache.recipe(_fetch, packages.extract_suite))
    return cache.entry("reference", key, _fetch) / "root"


def _fetch(into: Path) -> None:
    wanted = ["qemu-system-x86", "qemu-utils", "dpdk-dev", "librte-net-vhost23"]
    packages.extract_suite(OLD_SUITE, wanted, into / "root")
    for name in ("include", "share/doc", "share/locale", "share/man"):
        shutil.rmtree(into / "root/usr" / name, ignore_errors=True)


def program(program: str) -> str:
    """The words that start a program of that root, through its own loader."""
    root = debian_12()
    libraries = ":".join(str(root / each) for each in (_LIBRARIES, "lib/x86_64-linux-gnu"))
    words = f"{root}/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --argv0 {program} --library-path {libraries}"
    words += f" {root}/usr/bin/{program}"
    if program.startswith("qemu-system"):
        return (
            f"env QEMU_MODULE_DIR={root / _LIBRARIES}/qemu {words} -L {root}/usr/share/qemu -L {root}/usr/share/seabios"
        )
    if program == "dpdk-testpmd":
        plugins = max((root / _LIBRARIES / "dpdk").glob("pmds-*"))
        return words + "".join(f" -d {plugins / each}" for each in _PLUGINS)
    return words


def _new(program: str) -> str:
    qemu = build.qemu()
    modules = f"{qemu.path}/{_LIBRARIES}/qemu"
    return f"env QEMU_MODULE_DIR={modules} {' '.join(qemu.command(program))}"


PEERS = {
    "virtio-test": ("virtio-test", None),
    "qemu-storage-daemon-12": ("qemu-storage-daemon", lambda: program("qemu-storage-daemon")),
    "qemu-storage-daemon-testing": ("qemu-storage-daemon", lambda: _new("qemu-storage-daemon")),
    "dpdk-testpmd-12": ("dpdk-testpmd", lambda: program("dpdk-testpmd")),
    "qemu-virtio-blk-12": ("qemu-virtio-blk", lambda: program("qemu-system-x86_64")),
    "qemu-virtio-blk-testing": ("qemu-virtio-blk", lambda: _new("qemu-system-x86_64")),
    "qemu-virtio-rng-12": ("qemu-virtio-rng", lambda: program("qemu-system-x86_64")),
    "qemu-virtio-rng-testing": ("qemu-virtio-rng", lambda: _new("qemu-system-x86_64")),
}
"""Name to a target of `virtio_test.judge` and the words that start it."""


def target(name: str) -> judge.Target:
    """One of `PEERS`, ready to be judged."""
    known, words = PEERS[name]
    return judge.named(known).started_by(None if words is None else words())


def judged(name: str, rows: Sequence[str], patience: float) -> tuple[str, list[judge.Result]]:
    """Judges one of them; its name with its version, and the results."""
    one = target(name)
    put = judge.chosen(rows)
    title = f"{one.name} {one.version()}"
    with Progress(title, len(put)) as tick:
        return title, judge.judge(one, put, patience=patience, again=f"make judge ONLY={name} ROW={{row}}", done=tick)


def _fetched() -> int:
    try:
        print(f"Debian 12's QEMU and DPDK: {debian_12()}")
    except cache.BuildError as error:
        print(f"tests.peers.reference: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    """Judges what is named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.reference")
    parser.add_argument("--fetch", action="store_true", help="fetch what is not there, and judge nobody")
    parser.add_argument("--only", choices=sorted(PEERS), action="append")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--patience", type=float, default=judge.PATIENCE)
    asked = parser.parse_args(arguments)
    if asked.fetch:
        return _fetched()
    tables: dict[str, list[judge.Result]] = {}
    with ProcessPoolExecutor(asked.jobs) as pool:
        for title, results in pool.map(judged, asked.only or PEERS, repeat(asked.row), repeat(asked.patience)):
            tables[title] = results
            print(judge.as_lines(title, results, every=bool(asked.row)), flush=True)
    if not asked.only and not asked.row:
        page = judge.as_markdown(tables, date=datetime.datetime.now(datetime.UTC).date().isoformat())
        DOCS.write_text(HEAD + page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

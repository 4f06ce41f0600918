"""Which combinations of device, transport, carrier, ring and kernel really ran.

A test that has seen a request answered calls `record`, with what was negotiated and not with what it asked for. Each
call adds one line of JSON to the file that ``VIRTIO_TEST_COMBINATIONS`` names, else to one in pytest's cache folder.
``python -m tests.combinations`` prints the table for the docs; ``python -m tests.combinations clean`` begins anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("device", "transport", "carrier", "ring", "peer")


class Combination(NamedTuple):
    """One that ran.

    Attributes:
        device: ``test``, ``test (timer)``, ``blk``, …
        transport: the register model with its flavour, such as ``pci transitional, MSI-X``.
        carrier: ``vfio-user``, ``vhost-user``, ``qtest``, ``in process``, …
        ring: ``split`` or ``packed``, with what changes its working: ``packed, in_order``.
        peer: who was on the other side, with its version: ``Linux 6.1, QEMU 11.1 q35``.
    """

    device: str
    transport: str
    carrier: str
    ring: str
    peer: str


def path() -> Path:
    """The file that holds the records."""
    chosen = os.environ.get("VIRTIO_TEST_COMBINATIONS")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[1] / ".pytest_cache" / "combinations.jsonl"


def record(*, device: str, transport: str, carrier: str, ring: str, peer: str) -> Combination:
    """Notes that a combination ran; the arguments are those of `Combination`."""
    ran = Combination(device, transport, carrier, ring, peer)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    # One write of one short line at the end: several test processes may record at once.
    with file.open("ab", buffering=0) as stream:
        stream.write(json.dumps(ran._asdict() | {"test": test}).encode() + b"\n")
    return ran


def recorded() -> list[Combination]:
    """All that ran, each once, in order."""
    try:
        lines = path().read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines]
    return sorted({Combination(*(row[column] for column in COLUMNS)) for row in rows})


def table() -> str:
    """The table in Markdown."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *recorded()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: Sequence[str]) -> int:
    """Prints the table, or removes the records; the exit status."""
    if list(arguments) == ["clean"]:
        path().unlink(missing_ok=True)
        return 0
    if arguments:
        print("usage: python -m tests.combinations [clean]", file=sys.stderr)
        return 2
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

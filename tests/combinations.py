"""Which combinations of device, transport, carrier, ring and kernel really ran.

A test that has seen a request answered calls `record`, with what was negotiated and not with what it asked for. Each
call adds one line of JSON to the file that ``VIRTIO_TEST_COMBINATIONS`` names, else to one in pytest's cache folder.
``python -m tests.combinations`` prints the page for the docs; with ``clean`` it begins anew, with ``write`` it writes
the page, and with ``check`` it fails unless the page says what ran since the last ``clean``, whatever the versions are
of what Debian has today.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs" / "combinations.md"
HEAD = """# What ran with what

Written by the tests (`make combinations`), and compared with what really ran by each `make test`. A row is here only
if a request was answered and its bytes were checked; the rings are what was negotiated, not what was asked for.

"""
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
    """The page for the docs: a row for each device, transport, carrier and peer, with the rings that ran there."""
    rings: dict[tuple[str, str, str, str], list[str]] = {}
    for each in recorded():
        rings.setdefault((each.device, each.transport, each.carrier, each.peer), []).append(each.ring)
    rows = [
        (device, transport, carrier, peer, "; ".join(ran)) for (device, transport, carrier, peer), ran in rings.items()
    ]
    head = [("device", "transport", "carrier", "peer", "rings"), ("---",) * 5]
    return HEAD + "".join("| " + " | ".join(row) + " |\n" for row in [*head, *rows])


def main(arguments: Sequence[str]) -> int:
    """Does what the module's head says; the exit status."""
    if arguments == ["clean"]:
        path().unlink(missing_ok=True)
    elif arguments == ["write"]:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(table())
    elif arguments == ["check"]:
        # Versions are Debian's and move on; that is no reason for a test to fail.
        old, new = (set(re.sub(r"\d+(\.\d+)+", "N", text).splitlines()) for text in (DOCS.read_text(), table()))
        for line in sorted(old - new):
            print(f"in the docs, and did not run like that: {line}", file=sys.stderr)
        for line in sorted(new - old):
            print(f"ran, and is not in the docs: {line}", file=sys.stderr)
        if old != new:
            print(
                f"{DOCS.name} is not what ran: look at the lines above, then run 'make combinations'", file=sys.stderr
            )
            return 1
    elif arguments:
        print("usage: python -m tests.combinations [clean | write | check]", file=sys.stderr)
        return 2
    else:
        print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

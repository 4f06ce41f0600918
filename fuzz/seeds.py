"""Seeds for the fuzz targets from the frozen cases in `tests/corpus`: `python -m fuzz.seeds FOLDER`.

Each case is played up to the point where the judged end is about to look. Then its ring and its first tables become
the image that `fuzz/src/setup.rs` describes: the ring moves to address 0, tables to 512, data and the end of memory to
where they are in 4 KiB. What the driver end is shown becomes moves of `fuzz/src/driver.rs`.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

from virtio_test.strategies import Put, RingCase, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtio_test.strategies import Scene

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
TABLES, ROOM, MEMORY = 512, 512, 4096
INDIRECT = 4
FEATURES = {1 << 28: 2, 1 << 29: 4, 1 << 35: 8, 1 << 24: 64}
"""Feature to its bit in the first byte of an input."""


def header(case: RingCase, policy: str, image: bytes) -> bytes | None:
    """The first six bytes; None for a size that the targets do not have."""
    sizes = range(1, 10) if case.packed else (1, 2, 4, 8)
    if case.size not in sizes or case.areas or case.state is not None:
        return None
    choice = case.packed | (policy == "strict") << 4 | 32
    for feature, bit in FEATURES.items():
        choice |= bit * bool(case.features & feature)
    return pack("<BBHH", choice, sizes.index(case.size), case.start, len(image))


def moved(case: RingCase, address: int) -> int:
    """Where an address of the canonical map lies in the small one."""
    if case.tables <= address < case.tables + ROOM:
        return address - case.tables + TABLES
    if 0x8000 <= address < 0xF000:
        return 1536 + address % 2048
    if 0xF000 <= address < 0x11000:
        return address - 0xF000
    return address


def descriptors(case: RingCase, image: bytes) -> bytes:
    """The same with all addresses moved."""
    out = bytearray(image)
    for first in range(0, len(out) - 15, 16):
        address = int.from_bytes(out[first : first + 8], "little")
        out[first : first + 8] = moved(case, address).to_bytes(8, "little")
    return bytes(out)


def image(case: RingCase, scene: Scene) -> bytes:
    """Ring and tables as they are now."""
    layout = case.layout()
    end = layout.at("device_event.flags" if case.packed else "avail_event") + 2 - case.ring
    table = 16 * case.size
    ring = descriptors(case, scene.memory.read(case.ring, table)) + scene.memory.read(case.ring + table, end - table)
    return ring.ljust(TABLES, b"\0") + descriptors(case, scene.memory.read(case.tables, ROOM - 16))


def shown(case: RingCase, scene: Scene) -> bytes:
    """Moves: the buffers are added, what the case writes is overlaid, and the driver looks."""
    moves = bytearray()
    for buffer in case.buffers:
        readable, writable = min(len(buffer.readable), 3), min(len(buffer.writable), 3)
        moves.append((readable | writable << 2 | buffer.indirect << 4) << 3)
    moves.append(2)
    for act in case.writes:
        if isinstance(act, Put) and not act.field.startswith("table."):
            address, width = scene.at(act.field, act.place)
            moves += pack("<BH", 3 | (width - 1) << 3, address - case.ring) + act.value.to_bytes(width, "little")
    return bytes(moves + b"\5" * (len(case.buffers) + 1))


def seeds(case: RingCase) -> Iterator[tuple[str, bytes]]:
    """(target, input) of every target that can begin with this case."""
    for policy in ("interop", "strict"):
        with case.play(policy) as scene:
            if case.end == "driver":
                if start := header(case, policy, b""):
                    yield "driver_end", start + shown(case, scene)
                continue
            if not scene.built:
                continue
            memory = image(case, scene)
            if (start := header(case, policy, memory)) is None:
                continue
            # Pop, complete with and without notifying, put back, pop again.
            whole = start + memory + bytes((0, 7 | 2 << 3, 2, 0, 3, 1, 6, 0))
            yield "device_packed" if case.packed else "device_split", whole
            if not case.packed:
                yield "differential", whole


def main(folder: Path) -> int:
    """Write them all; how many there are."""
    count = 0
    for _, case in load(CORPUS):
        for target, data in seeds(case):
            place = folder / target
            place.mkdir(parents=True, exist_ok=True)
            (place / sha256(data).hexdigest()[:16]).write_bytes(data)
            count += 1
    return count


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fuzz.seeds FOLDER")
    print(f"{main(Path(sys.argv[1]))} seeds")

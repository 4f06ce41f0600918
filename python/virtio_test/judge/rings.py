"""A case of the catalogue as it lies in memory that a target shares, and a good request beside it.

The image is made by the same `Scene` that plays the case against our own core: a real driver end publishes, the case's
changes follow. Where our device end would be built, the target gets its memory instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from virtio_test._core import DriverQueue, GuestMemory, QueueConfig, QueueState, RingLayout
from virtio_test.errors import InvalidArgument
from virtio_test.strategies import Add, Change, Publish, RingCase, Scene

from .target import Target

__all__ = ["GOOD", "GOOD_BYTES", "Good", "Image", "image_of", "used_entry"]

GOOD: Final = 0x7_0000_0000
"""Where the good request lies: far from all that cases call a hole."""
GOOD_BYTES: Final = 64 << 10
_SIZE: Final = 8
_PACKED: Final = 1 << 34
_WRITE: Final = 2
_AVAIL_USED: Final = 1 << 7 | 1 << 15


class Image(NamedTuple):
    """A ring in memory.

    Attributes:
        memory: guest memory with the case's regions and the one of the good request.
        config: the attacked queue's configuration.
        state: where it goes on.
        layout: where its fields really lie.
        scene: what does what happens later.
    """

    memory: GuestMemory
    config: QueueConfig
    state: QueueState
    layout: RingLayout
    scene: Scene

    def later(self) -> Iterator[None]:
        """What the driver does once the target has seen the ring, each time as far as the next look of the target."""
        done = False
        for act in self.scene.case.later:
            if isinstance(act, Change | Add | Publish):
                self.scene.do(act)
                done = True
            elif done:
                yield
                done = False
        if done:
            yield


class _Untouched:
    """Where a scene wants a device end: there is none in this process."""

    def __init__(self, *_: object) -> None:
        pass

    def has_work(self) -> bool:
        return False

    def pop(self) -> None:
        return None

    def push(self, _chain: object, _written: int | None = None, /) -> bool:
        return False


def image_of(case: RingCase, *, memory: GuestMemory | None = None) -> Image:
    """The case in fresh memory that can be shared, or in `memory`, which has its regions and is all zeros there."""
    if memory is None:
        memory = GuestMemory([(address, size) for address, size, _ in case.regions])
        memory.add_region(GOOD, GOOD_BYTES)
    scene = Scene(case, memory=memory, device=_Untouched)
    return Image(memory, case.config(), case.begin(), case.layout(), scene)


class Good:
    """One request that any device of its class answers, on a fresh ring of 8.

    Args:
        memory: with the region at `GOOD`, or wherever `base` is.
        target: who is asked.
        packed: the format of its queue.
        base: where ring and buffer lie, `GOOD_BYTES` of zeros.
    """

    def __init__(self, memory: GuestMemory, target: Target, *, packed: bool, base: int = GOOD) -> None:
        index, readable, writable = target.attacked, target.good.readable, target.good.writable
        self.memory = memory
        layout = RingLayout.contiguous(_SIZE, base + 0x2000 * index, packed=packed)
        memory.fill(layout.desc, 0x2000)
        features = _PACKED * packed
        self.config = QueueConfig.from_layout(layout, index=index, features=features)
        self._queue = DriverQueue(memory, self.config)
        self._answer = base + 0x9000
        memory.write(base + 0x8000, readable)
        memory.fill(self._answer, max(writable, 1), 0xA5)
        self._writable = writable
        self._right = target.good.right
        asked = [(base + 0x8000, len(readable))] if readable else []
        self._queue.add(asked, [(self._answer, writable)] if writable else [])
        self._queue.publish()

    def answered(self) -> bool | None:
        """Whether the answer is right; None while the buffer is not used.

        Raises:
            QueueViolation: it was used against the rules.
        """
        found = self._queue.get_used()
        return None if found is None else self._right(self.memory.read(self._answer, self._writable))


def used_entry(image: Image) -> tuple[str, int]:
    """What the used ring says, in words, and of how many buffers; of a packed one only the first is looked at."""
    memory, layout = image.memory, image.layout

    def field(name: str, index: int = 0) -> int:
        width = layout.fields()[name][1]
        try:
            return int.from_bytes(memory.read(layout.at(name, index), width), "little")
        except InvalidArgument:
            # The case took its memory away.
            return 0

    if layout.packed:
        slot, wrap = image.state.used & 0x7FFF, image.state.used >> 15
        if field("desc.flags", slot) & _AVAIL_USED != _AVAIL_USED * wrap:
            return "", 0
        written = f" with {field('desc.len', slot)} bytes" if field("desc.flags", slot) & _WRITE else ""
        return f"completed id {field('desc.id', slot)}{written}", 1
    done = (field("used.idx") - image.state.used) & 0xFFFF
    if done == 0:
        return "", 0
    slot = image.state.used % layout.size
    first = f"id {field('used.ring.id', slot)} with {field('used.ring.len', slot)} bytes"
    return (f"completed {first}" if done == 1 else f"completed {done} buffers, the first {first}"), done

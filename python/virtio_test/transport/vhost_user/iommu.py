"""Rings behind an IOMMU: when they have the translations that they need, and what they ask for.

Theory
------
A ring is started only once its areas have their translations, and stopped before one of them goes; so a queue never
loses its ring. What its chains lack comes up when they are popped: the queue tells, the pages are asked for, and
after each change of the entries all that waits is looked at again. Each state is derived anew from what there is
(the queue's `missing`, the ring's areas, the entries), so no order of messages needs a case of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from virtio_test._core import RingLayout
from virtio_test.errors import QueueViolation

from .iotlb import MAX_ENTRIES, MISS_PAGE, Misses, Need
from .messages import Permission
from .payloads import Iotlb, MemoryRegion
from .rings import Ring
from .rules import violation

if TYPE_CHECKING:
    from .runner import RingSet

__all__ = ["Iommu"]

_MOST_FOR_A_CHAIN: Final = 2 * MAX_ENTRIES
"""Pages that one chain may lack: more is a chain that never fits, or a front-end that takes back what it gives."""


class Iommu:
    """The device IOTLB of one session, as its rings use it.

    Args:
        host: the rings.

    Attributes:
        misses: the translations that were asked for.
    """

    def __init__(self, host: RingSet) -> None:
        self._host = host
        # By ring: chains popped, and pages asked for since.
        self._asked: dict[int, tuple[int, int]] = {}
        self.misses = Misses(host.loop, send=self._send_miss, failed=self._failed, missing=self._missing)

    def __repr__(self) -> str:
        return f"<Iommu {'on' if self.on else 'off'}, {self.misses}>"

    @property
    def on(self) -> bool:
        """Whether addresses are those of an IOMMU."""
        return self._host.memory.cache is not None

    def turn(self, *, on: bool) -> None:
        """Whether addresses are those of an IOMMU."""
        if on != (self._host.memory.cache is not None):
            self.misses.clear()
            self._asked.clear()
            self._host.memory.set_translated(self._occupied if on else None)

    def put(self, message: Iotlb) -> None:
        """An entry comes, and what waits for it goes on.

        Raises:
            MessageError: what is wrong with it; nothing was changed.
        """
        cache = self._host.memory.cache
        assert cache is not None
        new = cache.judge(message)
        try:
            if new:
                self._leave(new[0].iova, new[-1].end)
                cache.put(new)
        finally:
            self._look_again()

    def invalidate(self, start: int, end: int) -> None:
        """Entries go; returns when nothing uses them any more."""
        assert self._host.memory.cache is not None
        self._leave(start, end)
        try:
            self._host.memory.cache.invalidate(start, end)
        finally:
            self._look_again()

    def ask_again(self) -> None:
        """There is another channel: what was asked for over the last one is asked for again."""
        self.misses.clear()
        if self._host.memory.cache is not None:
            self._look_again()

    def _leave(self, start: int, end: int) -> None:
        """Stop what lies in these addresses."""
        for ring in self._host.rings:
            layout = None if ring.queue is None else ring.queue.layout()
            if layout is not None and any(at < end and start < at + size for _, at, size, _ in _areas(layout)):
                self._host.stop(ring)

    def _look_again(self) -> None:
        self.misses.settle()
        for ring in self._host.rings:
            if ring.queue is not None and ring.queue.missing is not None:
                self._host.mark(ring)
        self._host.update()

    def _occupied(self) -> Iterator[tuple[int, int]]:
        """Where the rings that run lie."""
        for ring in self._host.rings:
            if ring.queue is not None:
                yield from ((at, size) for _, at, size, _ in _areas(ring.queue.layout()))

    def _missing(self, start: int, end: int, permission: Permission) -> int | None:
        cache = self._host.memory.cache
        return start if cache is None else cache.missing(start, end - start, permission)

    def holds(self, layout: RingLayout, regions: Sequence[MemoryRegion]) -> bool:
        """Whether a ring has translations for all of its areas, to memory of `regions`."""
        return self._lacks(layout) is None and self._shared(layout, regions)

    def _lacks(self, layout: RingLayout) -> tuple[str, int, int, Permission] | None:
        """The first area of a ring that lacks a translation: its name, where, how many bytes from there, for what."""
        assert self._host.memory.cache is not None
        for name, start, size, permission in _areas(layout):
            at = self._host.memory.cache.missing(start, size, permission)
            if at is not None:
                return name, at, start + size - at, permission
        return None

    def _shared(self, layout: RingLayout, regions: Sequence[MemoryRegion]) -> bool:
        """Whether the entries that a ring lies in show memory of `regions`."""
        assert self._host.memory.cache is not None
        return all(
            self._host.memory.pieces(user, length, regions) is not None
            for _, start, size, _ in _areas(layout)
            for user, length in self._host.memory.cache.users(start, size)
        )

    def _need(self, ring: Ring) -> Need | None:
        """What `ring` waits for."""
        if self._host.memory.cache is None:
            return None
        if ring.queue is not None:
            missing = ring.queue.missing
            if missing is None:
                return None
            permission = Permission.WRITE if missing.writable else Permission.READ
            return Need(missing.address, missing.length, permission, missing.violation)
        if not ring.wanted or ring.address is None or ring.size is None or self._host.accepted is None:
            return None
        lacks = self._lacks(ring.layout(ring.address, packed=self._host.packed))
        if lacks is None:
            return None
        name, at, size, permission = lacks
        error = violation("IotlbRefused", f"its {name} area has no translation at {at:#x}", queue=ring.index)
        return Need(at, size, permission, error)

    def ask(self, ring: Ring) -> bool:
        """Ask for what `ring` lacks; False when it lacks nothing (any more).

        Raises:
            QueueViolation, MessageError: it has lacked more than there is room for, so what comes only drives out what
                came before.
        """
        need, cache = self._need(ring), self._host.memory.cache
        if need is None or cache is None:
            return False
        at = cache.missing(need.start, need.size, need.permission)
        if at is None:
            return False
        popped = 0 if ring.queue is None else ring.queue.counters.popped
        since, asked = self._asked.get(ring.index, (popped, 0))
        if since != popped:
            asked = 0
        elif asked > _MOST_FOR_A_CHAIN:
            self._give_up(ring, need)
        asked += self.misses.ask(at, need.start + need.size, need.permission)
        self._asked[ring.index] = (popped, asked)
        return True

    def _give_up(self, ring: Ring, need: Need) -> NoReturn:
        self._asked.pop(ring.index, None)
        if ring.queue is not None and isinstance(need.error, QueueViolation):
            ring.queue.latch(need.error)
        raise need.error

    def _send_miss(self, entry: Iotlb) -> None:
        if self._host.channel is not None:
            self._host.channel.miss(entry, need_reply=self._host.acknowledged)

    def _failed(self, page: int) -> None:
        """A translation was refused, or has not come: whatever waits for it breaks the rule that it would break."""
        for ring in self._host.rings:
            with self._host.working_on(ring):
                need = self._need(ring)
                if need is None or page >= need.start + need.size or need.start >= page + MISS_PAGE:
                    continue
                if self._missing(need.start, need.start + need.size, need.permission) is None:
                    continue
                self._give_up(ring, need)
        self._host.update()


def _areas(layout: RingLayout) -> tuple[tuple[str, int, int, Permission], ...]:
    """The areas of a ring by name: where, how many bytes, and what a device does there."""
    both = Permission.READ | Permission.WRITE
    return (
        ("descriptor", layout.desc, layout.desc_bytes, both if layout.packed else Permission.READ),
        ("driver", layout.driver, layout.driver_bytes, Permission.READ),
        ("device", layout.device, layout.device_bytes, both),
    )

"""Watches a traced device queue: after each call, what it read and wrote is held against the invariants.

| | |
|---|---|
| V1 | bounded reads for each pop |
| V2, V3 | writes only to the used ring (packed: returned slots), the suppression field, writable segments in flight |
| V4 | each byte of ring and tables read at most once for each look (a pop that arms itself looks twice) |
| V5, V7 | one used entry for each push, its length within the chain, written before the index (flags) that shows it |
| V6 | no more in flight than the ring has room for |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from virtio_test._core import Access, Chain, DeviceQueue, Trace

from tests.property.model import Segment

MAX_INDIRECT = 1024
"""Entries of a table that `Policy.interop` takes; strict takes none longer than the queue."""

Span = tuple[int, int]


class Watch:
    """Calls a queue and judges each call by its trace."""

    def __init__(self, queue: DeviceQueue, trace: Trace, *, legal: bool) -> None:
        self.queue = queue
        self.history: list[Access] = []
        self._trace = trace
        self._legal = legal
        self._layout = queue.layout()
        at = self._layout.at
        if self._layout.packed:
            # The structure is 4 bytes, which may be stored as one word.
            self._suppression: list[Span] = [(at("device_event.off_wrap"), 4)]
        else:
            self._suppression = [(at("used.flags"), 2), (at("avail_event"), 2)]
        trace.clear()

    def _done(self, allowed: Iterable[Span]) -> list[Access]:
        """The log of the call that just ended; its writes lie in `allowed`."""
        log = self._trace.log()
        self._trace.clear()
        self.history += log
        spans = list(allowed)
        for access in log:
            if access.kind in ("store", "write") and access.length:
                inside = any(a <= access.address and access.address + access.length <= a + n for a, n in spans)
                assert inside, f"{access.kind} of {access.length} bytes at {access.address:#x} (V2)"
        assert self.queue.in_flight <= self._layout.size, "V6"
        return log

    def pop(self) -> Chain | None:
        try:
            chain = self.queue.pop()
        finally:
            log = self._done(self._suppression)
        reads = sum(access.kind in ("load", "read") for access in log)
        # Four words for a packed descriptor, two for others; the indices twice, when the queue arms itself.
        assert reads <= 6 + 4 * self._layout.size + 2 * MAX_INDIRECT, "V1"
        if chain is not None:
            assert reads <= 6 + 4 * (chain.descriptors + 1), "V1"
            if self._legal:
                self._read_once(log)
        return chain

    def _read_once(self, log: Iterable[Access]) -> None:
        seen = Counter[int]()
        for access in log:
            if access.kind == "fence":
                seen.clear()
            if access.kind in ("load", "read"):
                seen.update(range(access.address, access.address + access.length))
        twice = [hex(address) for address, times in seen.items() if times > 1]
        assert not twice, f"read twice: {twice} (V4)"

    def read(self, chain: Chain) -> bytes:
        data = chain.read()
        self._done([])
        return data

    def write(self, chain: Chain, data: bytes) -> int:
        """Data goes into the chain's writable segments only."""
        count = chain.write(data)
        self._done((address, length) for address, length, writable in chain.segments if writable)
        return count

    def push(self, chain: Chain, written: int) -> bool:
        state = self.queue.state.used
        done = self.queue.push(chain, written)
        log = self._done(self._used())
        stores = [access for access in log if access.kind == "store"]
        if not done or not stores:
            # Dropped; or, with IN_ORDER, kept back until those before it are used.
            assert self.queue.state.used == state
            return done
        last = stores[-1].address
        if self._layout.packed:
            assert last == self._layout.at("desc.flags", state & 0x7FFF), "V7"
        else:
            assert last == self._layout.at("used.idx"), "V7"
            assert [access.address for access in stores].count(last) == 1, "V5"
        return done

    def _used(self) -> list[Span]:
        """What a push may write: entries and index of the used ring; packed, all of a slot but its address."""
        layout, at = self._layout, self._layout.at
        if layout.packed:
            return [(at("desc.len", slot), 8) for slot in range(layout.size)]
        ring = [(at("used.ring.id", slot), 8) for slot in range(layout.size)]
        return [*ring, (at("used.idx"), 2)]

    def others(self) -> None:
        """Calls that write nothing but how the queue wants to be kicked."""
        self.queue.has_work()
        self._done(self._suppression)
        self.queue.signal()
        self._done([])
        self.queue.enable_kicks()
        self._done(self._suppression)
        self.queue.disable_kicks()
        self._done(self._suppression)


class WatchedEnd:
    """A device end for scripts that is watched in everything it does."""

    def __init__(self, queue: DeviceQueue, trace: Trace) -> None:
        self.watch = Watch(queue, trace, legal=True)
        self._popped: list[Chain] = []

    def pop(self) -> int | None:
        self.watch.others()
        chain = self.watch.pop()
        if chain is None:
            return None
        self._popped.append(chain)
        return len(self._popped) - 1

    def segments(self, number: int) -> list[Segment]:
        return [Segment(*segment) for segment in self._popped[number].segments]

    def read(self, number: int) -> bytes:
        return self.watch.read(self._popped[number])

    def finish(self, number: int, response: bytes) -> None:
        chain = self._popped[number]
        assert self.watch.write(chain, response) == len(response)
        assert self.watch.push(chain, len(response))

    def call(self) -> bool:
        self.watch.others()
        return False

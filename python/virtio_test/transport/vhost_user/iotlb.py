"""The device IOTLB: which parts of the shared memory a device may reach, and at which addresses.

Theory
------
With ACCESS_PLATFORM every address that a driver gives, those of the rings included, is one of an IOMMU ("IOVA"). The
front-end knows the translations. It is asked for one (MISS, over the back-end's channel), answers with an UPDATE that
names its own address of the bytes, and takes it back with an INVALIDATE. What queues see is then the memory that
these entries make up: each shows a part of the shared memory at its IOVA (`GuestMemory.translate`).

Nothing here waits. A ring whose next chain lacks a translation stays where it is; every page that it lacks is asked for
once, a bounded number at a time. The ring is looked at again when an UPDATE has come. A page that is refused, or that
has not come when the time is up, breaks the rule that the driver's chain then breaks.

The entries are a cache of a bounded size: when it is full the oldest goes, and is asked for again when it is needed.
Those that a running ring lies in stay. A chain that a device has kept for long may find its buffer gone
(`StaleMemory`).

Source: QEMU, docs/interop/vhost-user.rst, "IOMMU support"; Linux, drivers/vhost/vhost.c, for what an invalidation of
everything looks like.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from virtio_test._core import GuestMemory
from virtio_test.clock import Timer
from virtio_test.errors import InvalidArgument
from virtio_test.loop import OwnerLoop

from .messages import IotlbType, Permission
from .payloads import Iotlb as IotlbMessage
from .rules import violation

__all__ = ["MAX_ENTRIES", "MISS_PAGE", "MISS_SECONDS", "Cache", "Entry", "Misses", "Need"]

MAX_ENTRIES: Final = 4096
"""Entries of one session; as many as the core shows at once."""
MISS_PAGE: Final = 4096
"""What is asked for at once: no IOMMU has smaller pages. What comes may be larger."""
MISS_SECONDS: Final = 10.0
"""How long the front-end may take. QEMU answers within a millisecond, and can be stopped for seconds."""
MAX_MISSES: Final = 64
_ROOM: Final = 63
_END: Final = 1 << 64
_ALIGN: Final = 8


class Entry(NamedTuple):
    """One translation, of bytes that lie side by side in the shared memory.

    Attributes:
        iova: where the device finds the first byte.
        size: bytes.
        user: where the front-end does.
        guest: its guest physical address.
        permission: what the device may do.
    """

    iova: int
    size: int
    user: int
    guest: int
    permission: Permission

    @property
    def end(self) -> int:
        """First address after it."""
        return self.iova + self.size

    def part(self, start: int, end: int) -> Entry:
        """What of it lies from `start` to before `end`."""
        skip = start - self.iova
        return Entry(start, end - start, self.user + skip, self.guest + skip, self.permission)

    def shown(self) -> tuple[int, int, int, bool, bool]:
        """As `GuestMemory.translate` takes it."""
        readable, writable = Permission.READ in self.permission, Permission.WRITE in self.permission
        return self.iova, self.size, self.guest, readable, writable


class Cache:
    """The entries, and the memory that shows them.

    Args:
        view: shows the entries, and nothing else from now on.
        shared: the memory that they are parts of.
        find: the pieces (guest address, size) of `size` bytes at a user address; None unless all of them are shared.
        keep: the ranges (start, size) whose entries must stay when the cache is full.
    """

    def __init__(
        self,
        view: GuestMemory,
        shared: GuestMemory,
        *,
        find: Callable[[int, int], list[tuple[int, int]] | None],
        keep: Callable[[], Iterable[tuple[int, int]]],
    ) -> None:
        self._view = view
        self._shared = shared
        self._find = find
        self._keep = keep
        # By IOVA, in the order in which they came; and the IOVAs in theirs.
        self._entries: dict[int, Entry] = {}
        self._starts: list[int] = []
        view.translate(shared)

    def __repr__(self) -> str:
        return f"<Cache of {len(self._entries)} translations>"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def judge(self, message: IotlbMessage) -> list[Entry]:
        """The entries that an UPDATE makes; none when all of them are here already.

        Raises:
            MessageError: IotlbRange, IotlbPermission, IotlbAddress.
        """
        iova, size, user = message.iova, message.size, message.user
        text = f"{size:#x} bytes at IOVA {iova:#x}, user {user:#x}"
        if size == 0 or iova + size > _END or user + size > _END:
            raise violation("IotlbRange", f"{text}: it is empty, or an address wraps")
        if iova % _ALIGN or size % _ALIGN:
            raise violation("IotlbRange", f"{text}: it is not aligned to {_ALIGN} bytes")
        if not 1 <= message.permissions <= int(Permission.READ | Permission.WRITE):
            raise violation("IotlbPermission", f"{text}: permission {message.permissions}, where 1 to 3 are legal")
        new = self._resolve(Entry(iova, size, user, 0, Permission(message.permissions)))
        if not new:
            raise violation("IotlbAddress", f"{text}: not all of it is shared")
        return [] if all(self._entries.get(each.iova) == each for each in new) else new

    def put(self, new: list[Entry]) -> None:
        """Take entries that `judge` has made; what was there for their addresses before goes.

        Raises:
            MessageError: IotlbAddress, the core cannot show them; nothing was changed.
        """
        gone, left = self._cut(new[0].iova, new[-1].end)
        self._change(gone, [*left, *new])

    def invalidate(self, start: int, end: int) -> None:
        """Forget `start` to before `end`; returns when nothing uses that any more."""
        gone, left = self._cut(start - start % _ALIGN, end + -end % _ALIGN)
        if gone:
            self._change(gone, left)

    def renew(self) -> None:
        """The shared memory is another one: show what is still shared, and forget the rest.

        What lay in one region may lie in many now. Then the newest stay, as far as there is room, and before them those
        that a running ring lies in.
        """
        newest_first = list(reversed(self._entries.values()))
        kept = self._kept()
        left: list[Entry] = []
        for each in sorted(newest_first, key=lambda each: each.iova not in kept):
            left += self._resolve(each)[: MAX_ENTRIES - len(left)]
        left.reverse()
        self._change([each.iova for each in newest_first], left)

    def missing(self, start: int, size: int, permission: Permission) -> int | None:
        """The first of `size` addresses that has no entry with at least that permission; None when all have."""
        at = start
        for each in self._over(start, start + size):
            if each.iova > at or permission & ~each.permission:
                return at
            at = each.end
        return at if at < start + size else None

    def users(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """The user addresses and sizes of the entries that `size` bytes from `start` on lie in."""
        return ((each.user, each.size) for each in self._over(start, start + size))

    def _resolve(self, entry: Entry) -> list[Entry]:
        """The entry as the shared memory has it, in pieces; nothing unless all is shared, and aligned."""
        found: list[Entry] = []
        at = entry.iova
        for guest, size in self._find(entry.user, entry.size) or ():
            if guest % _ALIGN or size % _ALIGN:
                return []
            found.append(entry.part(at, at + size)._replace(guest=guest))
            at += size
        return found

    def _over(self, start: int, end: int) -> Iterator[Entry]:
        """The entries that lie in `start` to before `end`, in part or wholly, by ascending address."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            entry = self._entries[self._starts[at]]
            if entry.end > start:
                yield entry
            at += 1

    def _cut(self, start: int, end: int) -> tuple[list[int], list[Entry]]:
        """What goes when `start` to before `end` is cut out, and what is left of that on both sides."""
        over = list(self._over(start, end))
        left = [each.part(each.iova, start) for each in over if each.iova < start]
        left += [each.part(end, each.end) for each in over if each.end > end]
        return [each.iova for each in over], left

    def _change(self, gone: list[int], new: list[Entry]) -> None:
        """All or nothing.

        Raises:
            MessageError: IotlbAddress, the core cannot show it there.
        """
        gone += self._oldest(set(gone), len(self._entries) - len(gone) + len(new) - MAX_ENTRIES)
        try:
            self._view.translate(self._shared, remove=gone, add=[each.shown() for each in new])
        except InvalidArgument as error:
            raise violation("IotlbAddress", str(error)) from error
        for iova in gone:
            del self._entries[iova]
        if len(gone) > len(self._entries):
            self._starts = sorted(self._entries)
        else:
            for iova in gone:
                del self._starts[bisect_right(self._starts, iova) - 1]
        for each in new:
            self._entries[each.iova] = each
            insort(self._starts, each.iova)

    def _kept(self) -> set[int]:
        """The IOVAs of the entries that must stay."""
        return {each.iova for start, size in self._keep() for each in self._over(start, start + size)}

    def _oldest(self, gone: set[int], count: int) -> list[int]:
        """At least `count` entries that go to make room: the oldest that need not stay, or else the oldest."""
        if count <= 0:
            return []
        # Some more, so that a full cache is not looked through for each entry that comes.
        count += _ROOM
        kept = self._kept()
        left = [iova for iova in self._entries if iova not in gone]
        free = [iova for iova in left if iova not in kept]
        return (free if len(free) >= count else left)[:count]


class Need(NamedTuple):
    """What a ring lacks: `size` addresses from `start` on, for what, and what is raised if that does not come."""

    start: int
    size: int
    permission: Permission
    error: Exception


class _Question(NamedTuple):
    start: int
    end: int
    permission: Permission
    deadline_ns: int


class Misses:
    """The pages that were asked for and have not come.

    Args:
        loop: its clock says how long that may take.
        send: sends one MISS.
        failed: called with a page that was refused, or has not come in time.
        missing: the first address from one to before another that has no entry with at least that permission.
    """

    def __init__(
        self,
        loop: OwnerLoop,
        *,
        send: Callable[[IotlbMessage], object],
        failed: Callable[[int], object],
        missing: Callable[[int, int, Permission], int | None],
    ) -> None:
        self._loop = loop
        self._send = send
        self._failed = failed
        self._missing = missing
        self._asked: dict[int, _Question] = {}
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<Misses of {len(self._asked)} pages>"

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, start: int, end: int, permission: Permission) -> int:
        """Ask for what `start` to before `end` lacks, as far as there is room for questions; how many that were."""
        count = 0
        deadline_ns = self._loop.clock.now_ns() + int(MISS_SECONDS * 1e9)
        at = self._missing(start, end, permission)
        # From one that is lacked to the next: a chain may have millions of pages, and nearly all of them an entry.
        while at is not None and len(self._asked) < MAX_MISSES:
            page = at - at % MISS_PAGE
            asked = self._asked.get(page)
            if asked is None or permission & ~asked.permission:
                # Perhaps it was asked for to read, and is now wanted for writing too.
                wanted = permission if asked is None else permission | asked.permission
                first, last = max(page, start), min(page + MISS_PAGE, end)
                self._asked[page] = _Question(first, last, wanted, deadline_ns)
                count += 1
                self._send(IotlbMessage(page, MISS_PAGE, 0, int(wanted), int(IotlbType.MISS)))
            at = self._missing(page + MISS_PAGE, end, permission) if page + MISS_PAGE < end else None
        self._watch()
        return count

    def settle(self) -> None:
        """Forget the questions that have been answered by entries."""
        for page, asked in list(self._asked.items()):
            if self._missing(asked.start, asked.end, asked.permission) is None:
                del self._asked[page]
        self._watch()

    def refused(self, page: int) -> None:
        """The front-end has no such translation."""
        if self._asked.pop(page, None) is not None:
            self._watch()
            self._failed(page)

    def clear(self) -> None:
        """Nobody wants an answer any more."""
        self._asked.clear()
        self._watch()

    def _watch(self) -> None:
        if not self._asked:
            if self._timer is not None:
                self._timer.stop()
                self._timer = None
        elif self._timer is None:
            self._timer = Timer(self._loop.clock, self._look, first_after=MISS_SECONDS / 10, every=MISS_SECONDS / 10)

    def _look(self) -> None:
        now = self._loop.clock.now_ns()
        late = [page for page, asked in self._asked.items() if asked.deadline_ns <= now]
        for page in late:
            del self._asked[page]
        self._watch()
        for page in late:
            self._failed(page)

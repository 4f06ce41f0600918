"""The cache of the device IOTLB against a model, a map of words; what is asked for when it lacks something."""

from __future__ import annotations

import os
from itertools import pairwise
from random import Random

import pytest
from virtio_test._core import GuestMemory
from virtio_test.loop import OwnerLoop
from virtio_test.transport.vhost_user.iotlb import MAX_ENTRIES, Cache, Entry, Misses
from virtio_test.transport.vhost_user.messages import Permission
from virtio_test.transport.vhost_user.payloads import Iotlb

PAGE = 4096
READ, WRITE, BOTH = Permission.READ, Permission.WRITE, Permission.READ | Permission.WRITE


@pytest.mark.row("M17")
def test_the_cache_is_what_a_map_of_words_is() -> None:
    """Updates and invalidations over each other in a small space, word by word; and the core shows the same."""
    random = Random(11)
    words, size = 64, 256
    shared, view = GuestMemory([(0, PAGE), (PAGE, PAGE)]), GuestMemory()

    def find(user: int, length: int) -> list[tuple[int, int]] | None:
        if user + length > 2 * size:
            return None
        first = max(0, min(length, size - user))
        parts = [(user, first), (PAGE + max(0, user - size), length - first)]
        return [(guest, each) for guest, each in parts if each]

    cache = Cache(view, shared, find=find, keep=tuple)
    model: dict[int, tuple[int, Permission]] = {}
    for word in range(size // 4):
        for at in (word * 8, PAGE + word * 8):
            if at % PAGE < size:
                shared.write(at, at.to_bytes(8, "little"))
    for _ in range(1500):
        start, length = random.randrange(words), random.randint(1, 12)
        span = range(start, min(start + length, words))
        if random.random() < 0.6:
            user = 8 * random.randrange(2 * size // 8 - len(span))
            permission = random.choice([READ, WRITE, BOTH])
            message = Iotlb(start * 8, len(span) * 8, user, int(permission), 2)
            if new := cache.judge(message):
                cache.put(new)
            for index, word in enumerate(span):
                at = user + 8 * index
                model[word] = (at if at < size else PAGE + at - size, permission)
        else:
            cache.invalidate(start * 8, span.stop * 8)
            for word in span:
                model.pop(word, None)
        for word in range(words):
            found = model.get(word)
            for want in (READ, WRITE, BOTH):
                has = found is not None and not want & ~found[1]
                assert (cache.missing(word * 8, 8, want) is None) == has
            readable = found is not None and READ in found[1]
            assert view.is_mapped(word * 8, 8) == readable
            if readable:
                assert found is not None
                assert view.read(word * 8, 8) == found[0].to_bytes(8, "little")
        covered = sum(each.size for each in cache)
        assert covered == 8 * len(model)


def test_an_entry_knows_its_parts() -> None:
    entry = Entry(0x1000, 0x100, 0x7000, 0x3000, READ)
    assert entry.end == 0x1100
    assert entry.part(0x1040, 0x1080) == Entry(0x1040, 0x40, 0x7040, 0x3040, READ)
    assert entry.shown() == (0x1000, 0x100, 0x3000, True, False)


@pytest.mark.row("M17")
def test_entries_that_are_cut_into_more_than_there_is_room_for() -> None:
    """The shared memory changes beneath a full cache: the newest stay, and what must; nothing shows the old memory."""
    shared, view = GuestMemory([(0, 2 * PAGE)]), GuestMemory()
    cuts = [2 * PAGE]

    def find(user: int, length: int) -> list[tuple[int, int]]:
        ends = [user, *(cut for cut in cuts if user < cut < user + length), user + length]
        return [(low, high - low) for low, high in pairwise(ends)]

    kept = 7 * PAGE
    cache = Cache(view, shared, find=find, keep=lambda: [(kept, PAGE)])
    for number in range(MAX_ENTRIES):
        cache.put(cache.judge(Iotlb(number * PAGE, PAGE, PAGE // 2, int(BOTH), 2)))
    assert len(cache) == MAX_ENTRIES
    cuts[:] = [PAGE]
    fd = os.memfd_create("new")
    os.truncate(fd, 2 * PAGE)
    shared.replace([(0, PAGE, fd, 0), (PAGE, PAGE, fd, PAGE)])
    os.close(fd)
    shared.write(PAGE, b"new")
    cache.renew()
    assert len(cache) == MAX_ENTRIES
    left = [number for number in range(MAX_ENTRIES) if cache.missing(number * PAGE, PAGE, BOTH) is None]
    assert left == [7, *range(MAX_ENTRIES // 2 + 1, MAX_ENTRIES)]
    for number in left:
        assert view.read(number * PAGE + PAGE // 2, 3) == b"new"
    assert not view.is_mapped(0, 8)


class Pages:
    """Misses over a set of pages that have entries."""

    def __init__(self) -> None:
        self.sent: list[Iotlb] = []
        self.looks = 0
        self.lacked = dict[int, Permission]()
        self.misses = Misses(OwnerLoop(), send=self.sent.append, failed=lambda _: None, missing=self.missing)

    def missing(self, start: int, end: int, permission: Permission) -> int | None:
        self.looks += 1
        found = [page for page, lack in self.lacked.items() if page + PAGE > start and page < end and lack & permission]
        return max(start, min(found)) if found else None


@pytest.mark.row("M17")
def test_pages_that_have_entries_are_not_looked_at_one_by_one() -> None:
    """A guest's buffer of 4 GiB of which a few pages are lacked is no work of seconds."""
    pages = Pages()
    lacked = [0, PAGE, (1 << 31) + PAGE, (1 << 32) - PAGE]
    pages.lacked = dict.fromkeys(lacked, BOTH)
    assert pages.misses.ask(8, (1 << 32) - 8, WRITE) == len(lacked)
    assert [each.iova for each in pages.sent] == lacked
    assert pages.looks <= 2 * len(lacked)
    pages.misses.clear()


@pytest.mark.row("M17")
def test_each_page_is_asked_for_with_its_own_permission() -> None:
    """That one page was asked for to read before is no reason to want that of the next as well."""
    pages = Pages()
    pages.lacked = {0: BOTH, PAGE: BOTH}
    pages.misses.ask(0, 8, READ)
    pages.misses.ask(0, 2 * PAGE, WRITE)
    assert [(each.iova, each.permissions) for each in pages.sent] == [(0, READ), (0, BOTH), (PAGE, WRITE)]
    pages.misses.clear()

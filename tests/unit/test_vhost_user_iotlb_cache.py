"""The cache of the device IOTLB against a model: a map of words."""

from __future__ import annotations

from random import Random

import pytest
from virtio_test._core import GuestMemory
from virtio_test.transport.vhost_user.iotlb import Cache, Entry
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

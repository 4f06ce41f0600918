"""Rows N01, N03, N04, N08 and N10 with any values: when the driver is notified, in indices of 16 bits."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.property.bench import Bench
from tests.property.ends import EVENT_IDX

NOTIFY_ON_EMPTY, VERSION_1 = 1 << 24, 1 << 32
index = st.one_of(st.sampled_from([0, 1, 2, 7, 8, 0x7FFF, 0x8000, 0xFFF8, 0xFFFE, 0xFFFF]), st.integers(0, 0xFFFF))


def passed(event: int, old: int, new: int) -> bool:
    """Whether `event` is one of the indices from `old` up to, without, `new`: said by counting, not by the formula."""
    return event in {(old + ahead) & 0xFFFF for ahead in range((new - old) & 0xFFFF)}


@pytest.mark.row("N01", "N03", "N04", "N10")
@given(start=index, rounds=st.lists(st.tuples(st.integers(1, 8), index), min_size=1, max_size=6))
@example(start=0xFFFE, rounds=[(4, 0xFFFF), (4, 0), (4, 3), (8, 0xFFFF)])
@example(start=0, rounds=[(1, 0x8000), (3, 2), (3, 3)])
def test_an_event_is_told_when_it_was_passed(start: int, rounds: list[tuple[int, int]]) -> None:
    """Whatever used_event is: it decides whether the driver is told, and nothing else; every buffer comes back."""
    bench = Bench(packed=False, start=start, features=EVENT_IDX)
    told = None
    for count, event in rounds:
        for _ in range(count):
            bench.single()
        bench.put("used_event", event)
        while (chain := bench.queue.pop()) is not None:
            bench.queue.push(chain, 0)
        new = bench.queue.state.used
        # The first time nothing is known of what was told before (N03).
        assert bench.queue.signal() is (told is None or passed(event, told, new))
        told = new
        assert len(bench.driver.take()) == count
    assert bench.queue.latched is None


@pytest.mark.row("N08")
@pytest.mark.parametrize(
    ("features", "packed", "wanted"),
    [
        (NOTIFY_ON_EMPTY, False, True),
        (NOTIFY_ON_EMPTY | EVENT_IDX, False, True),
        (0, False, False),
        # The bit belongs to the legacy interface, which has no VERSION_1 and no packed ring.
        (NOTIFY_ON_EMPTY | VERSION_1, False, False),
        (NOTIFY_ON_EMPTY, True, False),
    ],
)
def test_a_legacy_driver_hears_of_a_ring_that_ran_empty(*, features: int, packed: bool, wanted: bool) -> None:
    bench = Bench(packed=packed, features=features)

    def one(*, behind: int) -> bool:
        """Whether the use of one buffer is told, with as many more available."""
        for _ in range(1 + behind):
            bench.single()
        chain = bench.queue.pop()
        assert chain is not None
        bench.queue.push(chain, 0)
        told = bench.queue.signal()
        while (chain := bench.queue.pop()) is not None:
            bench.queue.push(chain, 0)
        bench.queue.signal()
        bench.driver.take()
        return told

    one(behind=0)
    # Nothing is to be told but that the ring is empty.
    if packed:
        bench.put("driver_event.flags", 1)
    elif features & EVENT_IDX:
        bench.put("used_event", (bench.queue.state.used - 1) & 0xFFFF)
    else:
        bench.put("avail.flags", 1)
    assert one(behind=1) is False
    assert one(behind=0) is wanted

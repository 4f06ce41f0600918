"""Sections 2.1 to 2.5 of the robustness catalogue, row by row: one defect in a legal ring, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from virtio_test._core import DeviceQueue, Policy, QueueState, rules
from virtio_test.errors import QueueViolation

from tests.property.bench import Bench
from tests.property.catalogue import packed, split
from tests.property.catalogue.buffers import BUFFERS
from tests.property.catalogue.defect import Defect, Refused
from tests.property.catalogue.rows import ELSEWHERE, ROWS
from tests.property.catalogue.special import SPECIAL, Special

DEFECTS = [*split.SPLIT, *BUFFERS, *packed.PACKED]
REFUSED = [*split.REFUSED, *packed.REFUSED]
POLICIES = {"interop": Policy.interop, "strict": Policy.strict}


def cases(name: str, found: Sequence[Defect | Refused | Special]) -> pytest.MarkDecorator:
    """One test for each, under its title, as one of its row."""
    return pytest.mark.parametrize(
        name, [pytest.param(case, id=str(case), marks=pytest.mark.row(case.row)) for case in found]
    )


policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@policies
@cases("defect", DEFECTS)
def test_one_defect(defect: Defect, policy: Policy) -> None:
    bench = defect.where.bench(policy)
    outcome = defect.outcomes.strict if policy == Policy.strict else defect.outcomes.interop
    defect.shape(bench)
    if outcome.rule is None:
        defect.change(bench)
        bench.drain()
        assert len(bench.popped) == outcome.chains
        if defect.check:
            defect.check(bench)
        bench.complete()
        assert bench.queue.latched is None
        return
    with pytest.raises(QueueViolation) as caught:
        change_and_drain(defect, bench)
    assert len(bench.popped) == outcome.chains
    bench.assert_broken(caught.value, outcome.rule)
    if bench.memory.is_mapped(bench.setup.base, 1):
        bench.assert_reset_heals()


def change_and_drain(defect: Defect, bench: Bench) -> None:
    """Some defects are made while the device end is at work, so either step may be the one that finds it."""
    defect.change(bench)
    bench.drain()


@policies
@pytest.mark.parametrize("is_packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("shape", "chains"),
    [
        (Bench.single, 1),
        (Bench.direct, 1),
        (Bench.pair, 2),
        (Bench.several, 5),
        (Bench.full, 8),
        (Bench.readers, 1),
        (Bench.tabled, 1),
    ],
)
def test_the_rings_are_legal_before_the_defect(
    shape: Callable[[Bench], None], chains: int, is_packed: bool, policy: Policy
) -> None:
    """Else the defect of a case would not be the only one."""
    bench = Bench(is_packed, policy=policy)
    shape(bench)
    bench.drain()
    assert len(bench.popped) == chains
    bench.complete()
    assert len(bench.driver.take()) == chains


@cases("refused", REFUSED)
def test_a_queue_that_cannot_be_is_refused(refused: Refused) -> None:
    """With nothing of guest memory touched; a queue that works keeps working when its reset is refused."""
    bench = Bench(refused.packed)
    bench.single()
    config = bench.config(**refused.changes)
    state = bench.setup.state() if refused.state is None else QueueState(*refused.state)
    before = bench.image()
    for end in refused.ends:
        with pytest.raises(QueueViolation) as caught:
            end(bench.memory, config, state=state)
        assert caught.value.rule == refused.rule
    if DeviceQueue in refused.ends:
        with pytest.raises(QueueViolation) as caught:
            bench.queue.reset(config, state=state)
        assert caught.value.rule == refused.rule
    assert bench.image() == before
    bench.drain()
    bench.complete()


@policies
@cases("special", SPECIAL)
def test_a_row_with_a_story(special: Special, policy: Policy) -> None:
    special.run(policy)


def test_every_row_is_tested_or_says_where_it_is() -> None:
    tested = {case.row for case in [*DEFECTS, *REFUSED, *SPECIAL]}
    assert tested <= ROWS, "a row that the catalogue does not have"
    assert set(ELSEWHERE) <= ROWS
    assert ROWS - tested == set(ELSEWHERE), "every row is either a case here or has a reason, not both"


def test_every_rule_of_the_core_is_broken_by_a_case() -> None:
    """Those about used buffers by an evil device (`test_driver_end.py`), all others by a row here.

    But one: that memory gets lost is no state of a ring (`tests/unit/test_memory_lost.py`, `rust/tests/lost.rs`).
    """
    broken = {outcome.rule for defect in DEFECTS for outcome in defect.outcomes if outcome.rule}
    broken |= {refused.rule for refused in REFUSED}
    assert {rule.name for rule in rules() if not rule.name.startswith("Used")} == broken | {"MemoryLost"}

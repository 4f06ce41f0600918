"""Sections 2.1 to 2.5 and 2.14 of the catalogue, row by row: one defect in a legal ring, and what must come of it.

Each row is played at every boundary, and in scenes of all kinds.
"""

from __future__ import annotations

from random import Random

import pytest
from virtio_test._core import Policy, rules
from virtio_test.strategies import ROWS, RingCase, cases, random_case
from virtio_test.strategies.case import Name

from tests.property import oracles
from tests.property.catalogue.rows import CATALOGUE, ELSEWHERE
from tests.property.catalogue.special import SPECIAL, Special

POLICIES = {"interop": Policy.interop, "strict": Policy.strict}
INTEROP: Name = "interop"
STRICT: Name = "strict"
SCENES = 20
"""Random ones for each row; `make deep` plays a million in all."""

by_row = pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.row(row)) for row in ROWS])


def judged(case: RingCase) -> None:
    """Both outcomes are what they must be, and whatever holds of all cases holds of this one."""
    for policy in (INTEROP, STRICT):
        wanted = case.outcome(policy)
        assert wanted is not None
        with case.play(policy, traced=True) as scene:
            found = scene.run()
            assert wanted.agrees(found), f"{case} under {policy}: {found} and not {wanted}"
            oracles.judge(scene)


@by_row
def test_one_defect(row: str) -> None:
    for case in cases(row):
        judged(case)


@by_row
def test_one_defect_in_any_scene(row: str) -> None:
    random = Random(row)
    for _ in range(SCENES):
        judged(random_case(random, row))


@by_row
def test_the_ring_is_legal_before_the_defect(row: str) -> None:
    """Else it would not be the only one: without it every buffer is handed out whole, and comes back."""
    random = Random(row)
    for case in (*cases(row), *(random_case(random, row) for _ in range(SCENES))):
        legal = case.but(writes=(), later=(), areas={}, state=None, end="device", interop=None, strict=None)
        with legal.play("strict", traced=True) as scene:
            found = scene.run()
            assert found.rule is None
            assert found.segments == tuple(buffer.segments for buffer in case.buffers)
            oracles.complete(scene)
            assert [number for number, _, _ in scene.returned()] == list(range(len(case.buffers)))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    "special", [pytest.param(each, id=str(each), marks=pytest.mark.row(each.row)) for each in SPECIAL]
)
def test_a_row_with_a_story(special: Special, policy: Policy) -> None:
    special.run(policy)


def test_every_row_is_tested_or_says_where_it_is() -> None:
    tested = {*ROWS, *(case.row for case in SPECIAL)}
    assert tested <= CATALOGUE, "a row that the catalogue does not have"
    assert set(ELSEWHERE) <= CATALOGUE
    assert CATALOGUE - tested == set(ELSEWHERE), "every row is either a case here or has a reason, not both"


def test_every_rule_of_the_core_is_broken_by_a_case() -> None:
    """But one: that memory gets lost is no state of a ring (`tests/unit/test_memory_lost.py`, `rust/tests/lost.rs`)."""
    found = {outcome.rule for case in cases() for outcome in (case.interop, case.strict) if outcome and outcome.rule}
    assert {rule.name for rule in rules()} == found | {"MemoryLost"}

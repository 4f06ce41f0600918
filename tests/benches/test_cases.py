"""Both sides judge the same cases and find the same; what comes to something else is found."""

from __future__ import annotations

from random import Random

import pytest
from virtio_test.strategies import CaseFailed, RingCase, random_case

from benches.pairs import cases
from benches.runner import BenchError, Case
from tests.benches.smoke import smoke


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.shape)
def test_both_sides_judge(case: Case) -> None:
    smoke(case)


def test_a_wrong_outcome_is_found_by_either() -> None:
    case = random_case(Random(1), "A04")
    assert case.strict is not None
    wrong = case.but(strict=case.strict._replace(rule="HeadInFlight"))
    with pytest.raises(CaseFailed):
        cases.ours(wrong)
    with pytest.raises(BenchError, match="is what must"):
        cases.plainly(wrong)


def test_sides_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: RingCase) -> None:
        return

    monkeypatch.setattr(cases, "plainly", nothing)
    with pytest.raises(BenchError, match="different rules"):
        smoke(cases.cases()[0])

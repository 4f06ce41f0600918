"""The pairs of the core run, and what is wrong with a side is said."""

from __future__ import annotations

import pytest

from benches.pairs import core
from benches.runner import BenchError, Case, MissingPeer, measure
from tests.benches.smoke import smoke


@pytest.mark.parametrize("case", core.cases(), ids=lambda case: case.shape)
def test_both_sides_do_the_work(case: Case) -> None:
    smoke(case)


def test_a_program_that_ends_says_why() -> None:
    # Of a packed ring the peer knows nothing: it finds no chain where ours finds a burst.
    case = core.case("device:pop", "virtio-queue pop", core.Ring(packed=True))
    with pytest.raises(BenchError, match="chains of one burst"):
        measure(case, rounds=1, quick=True)


def test_a_case_that_is_none_is_refused() -> None:
    case = core.case("device:guess", "nobody", core.Ring())
    with pytest.raises(BenchError, match="there is no case"):
        measure(case, rounds=1, quick=True)


@pytest.mark.peers
@pytest.mark.parametrize("what", ["device:pop", "driver"])
def test_instructions_are_those_of_what_is_timed(what: str) -> None:
    counted = measure(core.case(what, "a peer", core.Ring()), rounds=1, quick=True, instructions=True).instructions
    assert counted is not None
    # A chain is a few hundred instructions; what sets the ring up for it is as much again, and starting is millions.
    assert all(100 < count < 2000 for count in counted)
    again = measure(core.case(what, "a peer", core.Ring()), rounds=1, quick=True, instructions=True).instructions
    assert again == pytest.approx(counted, rel=0.01)


def test_without_valgrind_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = core.case("driver", "virtio-driver", core.Ring()).count
    assert counting is not None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPeer, match="no valgrind on the path"):
        counting()


def test_without_cargo_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    core.build.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPeer, match="no cargo on the path"):
        core.build()

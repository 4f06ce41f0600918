"""The disk and the ping-pong: a quick round in which both sides answer what they are asked; a wrong answer is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches.pairs import blk, pingpong
from benches.runner import BenchError, Case
from tests.benches.smoke import smoke

pytestmark = pytest.mark.peers


@pytest.mark.timeout(600)  # the driver program may have to be built first
@pytest.mark.parametrize("case", [*blk.cases(), *pingpong.cases()], ids=lambda case: case.shape)
def test_both_sides_answer(case: Case) -> None:
    smoke(case)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("which", "said"), [(0, "status 0, sectors 0 to 0"), (2, "ERROR:block [1-9][0-9]* is wrong")])
def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, which: int, said: str) -> None:
    def empty(path: Path) -> None:
        path.write_bytes(bytes(blk.BYTES))

    monkeypatch.setattr(blk, "fill", empty)
    with pytest.raises(BenchError, match=said):
        smoke(blk.cases()[which])

"""The reasons why some mutants are none are those of mutants that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutants, mutants_rust, reasons

LINES = """# a remark
driver.alloc.Heap.take away: size < 0 -> False
driver.alloc.Heap.take  edge:  size < 0 -> size <= 0

    Nobody asks for less,
    or for nothing.
errors.Error.explain away: self.rule is None -> False
    Another reason.
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "reasons.txt"
    path.write_text(text)
    return path


def test_mutants_that_stand_together_share_a_reason(tmp_path: Path) -> None:
    assert reasons.read(written(tmp_path, LINES)) == {
        "driver.alloc.Heap.take away: size < 0 -> False": "Nobody asks for less, or for nothing.",
        "driver.alloc.Heap.take edge: size < 0 -> size <= 0": "Nobody asks for less, or for nothing.",
        "errors.Error.explain away: self.rule is None -> False": "Another reason.",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("  a reason\n", "reasons.txt:1: a reason for no mutant"),
        ("a mutant\n", "reasons.txt: a mutant has no reason"),
        ("one\n  why\nother\n", "reasons.txt: other has no reason"),
        ("one\none\n  why\n", "reasons.txt:2: this mutant has a reason already"),
        ("one\n  why\none\n  why\n", "reasons.txt:3: this mutant has a reason already"),
    ],
)
def test_half_a_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}$"):
        reasons.read(written(tmp_path, text))


def test_a_reason_whose_mutant_is_gone_is_stale() -> None:
    assert reasons.stale(["a  b", "c"], ["a   b"]) == ["a  b", "c"]
    assert reasons.stale(["a b", "c"], ["a   b"]) == ["c"]


def test_mutants_that_are_called_alike_have_reasons_of_their_own() -> None:
    assert reasons.numbered(["a  b", "c", "a b", "a b"]) == ["a b", "c", "a b (2)", "a b (3)"]
    assert reasons.stale(["a b (2)", "c (2)"], ["a  b", "c", "a b"]) == ["c (2)"]


def test_each_python_mutant_with_a_reason_is_there() -> None:
    there = [mutant.name for mutant in mutants.everywhere()]
    assert len(there) > 2500
    assert reasons.stale(reasons.read(mutants.REASONS), there) == []


def test_each_rust_mutant_with_a_reason_is_there() -> None:
    found, texts = mutants_rust.everywhere()
    assert len(found) > 1500
    assert all(f"crate::mutant({number})" in texts[one.file] for number, one in enumerate(found, 1))
    assert reasons.stale(reasons.read(mutants_rust.REASONS), (one.name for one in found)) == []

"""The plugin for pytest as a project of one's own has it: profiles, the marker, and a corpus of what failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from virtio_test.strategies import load

PROJECT = """
import sys
assert "virtio_test" not in sys.modules
import pytest
from hypothesis import given, settings
from virtio_test.strategies import cases, legal


class Deaf:
    def __init__(self, *args):
        pass

    def pop(self):
        return None

    has_work = push = lambda self, *args: False


@pytest.mark.row("A04")
def test_profile():
    assert (settings().max_examples, settings().deadline) == (5000, None)
    next(cases("A04")).check()


def test_one():
    next(cases("A08")).check(device=Deaf)


def test_wrapped():
    try:
        next(cases("A02")).check(device=Deaf)
    except AssertionError as error:
        raise RuntimeError("no device") from error


@settings(max_examples=30, database=None)
@given(legal(packed=True, features=0))
def test_drawn(case):
    case.check(device=Deaf)


def test_other():
    assert not True
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(PROJECT)
    command = [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


def test_what_failed_is_kept_and_said(tmp_path: Path) -> None:
    ran = run(tmp_path, "--hypothesis-profile=virtio-deep", "--virtio-corpus=found")
    assert "4 failed, 1 passed" in ran.stdout
    kept = dict(load(tmp_path / "found"))
    rows = sorted((case.row, case.packed) for case in kept.values())
    assert rows == [("", True), ("A02", False), ("A08", False)]
    # Hypothesis had made it as small as it can be.
    (drawn,) = [case for case in kept.values() if not case.row]
    assert len(drawn.buffers) == 1
    assert all(f"found/{name}.json" in ran.stdout for name in kept)
    for case in kept.values():
        case.check()


def test_nothing_is_kept_unless_asked_for(tmp_path: Path) -> None:
    assert "1 failed" in run(tmp_path, "-k", "test_one").stdout
    assert not list(tmp_path.rglob("*.json"))

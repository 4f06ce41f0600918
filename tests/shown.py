"""Which rows of the robustness catalogue have a test: read from the tests as pytest collects them.

A test says so by the marker `row`, itself, by a parameter, its class or its module. A run of all tests has collected
what is needed when it starts; of a part of them the rest is collected by a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILE = "VIRTIO_TEST_SHOWN"
"""Names the file that a run which only collects writes them to."""

_KEY = pytest.StashKey[dict[str, list[str]] | None]()


def note(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Keeps the rows of all tests; of a part of them, nothing."""
    found: dict[str, list[str]] = {}
    files: set[Path] = set()
    for item in items:
        files.add(item.path)
        for mark in item.iter_markers("row"):
            for row in mark.args:
                found.setdefault(row, []).append(item.nodeid)
    config.stash[_KEY] = found if files >= set(FOLDER.rglob("test_*.py")) else None
    if file := os.environ.get(FILE):
        Path(file).write_text(json.dumps(found), encoding="utf-8")


def rows(config: pytest.Config) -> dict[str, list[str]]:
    """Row to its tests, of all tests that there are."""
    found = config.stash[_KEY]
    if found is not None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", str(FOLDER)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ran = subprocess.run(
            command, env=environ | {FILE: str(file)}, cwd=FOLDER.parent, capture_output=True, check=False
        )
        assert ran.returncode == 0, ran.stdout.decode()
        return json.loads(file.read_text(encoding="utf-8"))

"""Facts about the tree that no other tool watches: sizes, borders, and what must not be written down.

Each is a function over a folder, tried on a planted fault as well: a check that finds nothing proves nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = {".git", ".venv", "target", "dist", "build", "__pycache__", "LICENSE", "LICENSE-APACHE"}
"""Folders that are made, not written, and texts that are not ours."""

LONGEST = 600
HOSTS = {"docs.oasis-open.org"}
"""Where a URL of ours may lead. Anything else, a package index or a mirror above all, is found by its absence here."""


def broken(text: str) -> str:
    """`text` without its tildes, which keep this file from finding itself."""
    return text.replace("~", "")


UNFINISHED = re.compile(
    broken(r"\b(TO~DO|FIX~ME|X~XX|NotImplemented~Error|un~implemented!|to~do!)|\b(mark|pytest)\.(x~fail|sk~ip)")
)
MACHINE = re.compile(broken(r"(?<![\w.])/(?:wo~rk|ro~ot|ho~me)/\w+"))


def written(root: Path, *suffixes: str) -> Iterator[tuple[str, str]]:
    """(path, text) of every file that people wrote; only those with one of `suffixes`, if any is given."""
    for folder, folders, files in os.walk(root):
        hidden = {name for name in folders if name.startswith(".") and name != ".ci"}
        folders[:] = sorted(set(folders) - MADE - hidden)
        for name in sorted(set(files) - MADE):
            path = Path(folder, name)
            if (not suffixes or path.suffix in suffixes) and not path.is_symlink():
                try:
                    yield str(path.relative_to(root)), path.read_text()
                except UnicodeDecodeError:
                    continue  # compiled


def code(line: str) -> str:
    """A line of Rust without its comment."""
    return line.split("//", 1)[0]


def too_long(root: Path) -> list[str]:
    # A stub is as long as the module that it mirrors has names.
    return [
        f"{path}: {text.count(chr(10))} lines"
        for path, text in written(root, ".rs", ".py", ".c", ".h", ".md")
        if text.count("\n") > LONGEST
    ]


def python_outside_its_folder(root: Path) -> list[str]:
    return [
        f"{path}: names pyo3"
        for path, text in written(root, ".rs")
        if "pyo3" in text and not path.startswith("rust/src/py/") and path != "rust/src/lib.rs"
    ]


def unsafe_unexplained(root: Path) -> list[str]:
    """Files with `unsafe` code and files that SAFETY.md speaks of are the same."""
    used = {
        path
        for path, text in written(root, ".rs")
        if any(re.search(r"\bunsafe\b", code(line)) for line in text.splitlines())
    }
    explained = set(re.findall(r"`((?:rust|fuzz|benches)/[\w/]+\.rs)`", (root / "SAFETY.md").read_text()))
    return [f"{path}: unsafe, and not in SAFETY.md" for path in sorted(used - explained)] + [
        f"SAFETY.md: {path} has no unsafe code" for path in sorted(explained - used)
    ]


def unfinished(root: Path) -> list[str]:
    return [f"{path}: {found[0]}" for path, text in written(root) if (found := UNFINISHED.search(text))]


def local(root: Path) -> list[str]:
    """Paths of the machine it was written on, and hosts that it should not know."""
    wrong: list[str] = []
    for path, text in written(root):
        if Path(path).name == "Cargo.lock":
            continue  # cargo's own words
        hosts = set(re.findall(r"\w+://([\w.-]+\.\w+)", text)) - HOSTS
        wrong += [f"{path}: {found}" for found in (*MACHINE.findall(text), *sorted(hosts))]
    return wrong


def dead_links(root: Path) -> list[str]:
    return [
        f"{path}: {link}"
        for path, text in written(root, ".md")
        for link in re.findall(r"\]\(([^)#:]+)\)", text)
        if not (root / path).parent.joinpath(link).exists()
    ]


@pytest.mark.parametrize(
    ("check", "path", "fault"),
    [
        (too_long, "python/a.py", "x = 1\n" * (LONGEST + 1)),
        (python_outside_its_folder, "rust/src/ring/split.rs", "use pyo3::prelude::*;"),
        (unsafe_unexplained, "rust/src/ring/split.rs", "fn f() { unsafe { g() } }"),
        (unsafe_unexplained, "SAFETY.md", "`rust/src/ring/desc.rs`"),
        (unfinished, "python/a.py", broken("# FIX~ME")),
        (unfinished, "rust/src/a.rs", broken("to~do!()")),
        (unfinished, "tests/a.py", broken("pytest.sk~ip()")),
        (local, ".ci/run", broken("cd /ro~ot/x")),
        (local, "requirements-dev.txt", broken("--index-url https:/~/packages.example/simple")),
        (dead_links, "README.md", "see [the map](MAP.md)"),
    ],
)
def test_the_tree(tmp_path: Path, check: Callable[[Path], list[str]], path: str, fault: str) -> None:
    assert check(ROOT) == []
    (tmp_path / "SAFETY.md").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(fault)
    assert len(check(tmp_path)) == 1

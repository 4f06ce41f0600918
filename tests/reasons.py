"""Why a mutant that no test notices is none: a list beside each tool that makes mutants.

One line for each mutant, as the tool names it, without the number of its line; below one or more of them, indented,
the reason that they share. Where several of one function are called alike, those behind the first end in ` (2)`, ` (3)`
and so on, in the order of the text. What begins with `#` is a remark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def plain(name: str) -> str:
    """A name of a mutant with no more than one space in a row."""
    return " ".join(name.split())


def read(path: Path) -> dict[str, str]:
    """The reason of each mutant; `ValueError` names a line without its other half."""
    found, names, told = dict[str, str](), list[str](), False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace():
            names, told = [plain(line)] if told else [*names, plain(line)], False
            if names[-1] in found or names[-1] in names[:-1]:
                raise ValueError(f"{path.name}:{number}: this mutant has a reason already")
        elif names:
            told = True
            for name in names:
                found[name] = f"{found.get(name, '')} {line.strip()}".lstrip()
        else:
            raise ValueError(f"{path.name}:{number}: a reason for no mutant")
    if names and not told:
        raise ValueError(f"{path.name}: {names[-1]} has no reason")
    return found


def stale(reasons: Iterable[str], mutants: Iterable[str]) -> list[str]:
    """What has a reason and is no mutant any more."""
    there = set(numbered(mutants))
    return [name for name in reasons if name not in there]


def numbered(names: Iterable[str]) -> list[str]:
    """The same, each once: of those that are called alike each but the first gets its number."""
    seen = Counter[str]()
    told = list[str]()
    for name in map(plain, names):
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told

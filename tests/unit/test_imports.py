"""The package's imports run one way, from the specification up to the command.

Every import statement counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING. What a module
names, it knows, and a lower part that knows a higher one cannot be used or understood without it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "virtio_test"

# A part may import whatever stands in a row above its own, and its neighbours in the row as long as that makes no
# circle. The compiled core stands where its errors end and its users begin. FRONT is the package's own `__init__`: it
# gathers from everywhere below it, and only what stands on the whole package may import it.
FRONT = ""
ORDER: tuple[tuple[str, ...], ...] = (
    ("spec",),
    ("errors",),
    ("_core",),
    ("features", "status", "config", "clock", "console", "loop"),
    ("sockets",),
    ("device", "driver"),
    ("devices", "transport"),
    ("carrier",),
    ("strategies", "checks"),
    ("report", "judge"),
    (FRONT,),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

# Neighbours that must not know each other: the same device runs behind every transport without a changed line.
STRANGERS = frozenset({("devices", "transport"), ("transport", "devices")})


@dataclass(frozen=True)
class Import:
    """`part` of the package imports `target`, another part, at `where`; FRONT is a part as well."""

    part: str
    target: str
    where: str


def parts_of(package: Path) -> set[str]:
    """Names of the package's parts: its modules and sub-packages, not the package's own `__init__`."""
    files = {path.stem for path in package.iterdir() if path.suffix in {".py", ".pyi"}}
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    return (files | folders) - {"__init__"}


def imported_names(tree: ast.AST, package_of_module: list[str]) -> Iterator[tuple[list[str], int]]:
    """Every import in `tree` as (dotted name split, line); `from a import b` is a.b, relative ones are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package_of_module[: len(package_of_module) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield [*base, alias.name], node.lineno


def imports(package: Path) -> Iterator[Import]:
    """Every import from one part of `package` of another part, or of the package itself."""
    parts = parts_of(package)
    for path in sorted((*package.rglob("*.py"), *package.rglob("*.pyi"))):
        inside = path.relative_to(package)
        part = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        part = FRONT if part == "__init__" else part
        tree = ast.parse(path.read_text(), str(path))
        for name, line in imported_names(tree, [PACKAGE, *inside.parts[:-1]]):
            if name[0] != PACKAGE:
                continue
            # `from . import x` names a part only if there is one called so; in `from .x import y` it always does.
            target = name[1] if len(name) > 2 or (name[1:2] and name[1] in parts) else FRONT
            if target != part:
                yield Import(part, target, f"{inside}:{line}")


def circles(found: list[Import]) -> list[list[str]]:
    """Circles among neighbours of one row, each once, as the parts that it runs through."""
    graph: dict[str, set[str]] = {}
    for edge in found:
        if RANK.get(edge.part) == RANK.get(edge.target, -1):
            graph.setdefault(edge.part, set()).add(edge.target)
    seen: dict[frozenset[str], list[str]] = {}

    def walk(path: list[str]) -> None:
        for target in sorted(graph.get(path[-1], ())):
            if target in path:
                circle = path[path.index(target) :]
                seen.setdefault(frozenset(circle), circle)
            else:
                walk([*path, target])

    for start in sorted(graph):
        walk([start])
    return list(seen.values())


def violations(package: Path) -> list[str]:
    """What is wrong with the imports of `package`, one line each; empty when all is well."""
    found = list(imports(package))
    wrong = [f"{part} has no place in ORDER" for part in sorted(parts_of(package) - RANK.keys())]
    for edge in found:
        if edge.part in RANK and edge.target in RANK:
            if RANK[edge.target] > RANK[edge.part]:
                wrong.append(
                    f"{edge.where}: {edge.part or PACKAGE} imports {edge.target or PACKAGE}, which comes after it"
                )
            elif (edge.part, edge.target) in STRANGERS:
                wrong.append(f"{edge.where}: {edge.part} imports {edge.target}, and they must not know each other")
    return wrong + [f"imports run in a circle: {' → '.join([*circle, circle[0]])}" for circle in circles(found)]


def test_the_package_imports_one_way() -> None:
    assert violations(ROOT / "python" / PACKAGE) == []


def test_the_core_knows_only_the_errors() -> None:
    rust = (ROOT / "rust" / "src").rglob("*.rs")
    named = {name for path in rust for name in re.findall(rf"\b{PACKAGE}\.(\w+)", path.read_text())}
    assert named <= {"errors", "_core"}


def plant(package: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"spec/ids.py": "from virtio_test.errors import UsageError"}, "spec/ids.py:1: spec imports errors"),
        ({"clock.py": "import os\nimport virtio_test.cli.main as c"}, "clock.py:2: clock imports cli"),
        ({"device.py": "from .transport import pci"}, "device.py:1: device imports transport"),
        ({"device.py": "from .transport.pci import caps"}, "device.py:1: device imports transport"),
        ({"device.py": "from . import transport"}, "device.py:1: device imports transport"),
        ({"config.py": "def f():\n    from virtio_test import cli"}, "config.py:2: config imports cli"),
        ({"_core.pyi": "from .driver import Driver"}, "_core.pyi:1: _core imports driver"),
        ({"transport/pci/caps.py": "from ...carrier import uml"}, "transport/pci/caps.py:1: transport imports carrier"),
        ({"driver/__init__.py": "from ..devices import blk"}, "driver/__init__.py:1: driver imports devices"),
        (
            {"status.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .driver import Driver"},
            "status.py:3: status imports driver",
        ),
        ({"report/a.py": "from virtio_test import Device"}, "report/a.py:1: report imports virtio_test, which"),
        ({"report/a.py": "import virtio_test"}, "report/a.py:1: report imports virtio_test, which"),
        ({"__init__.py": "from .cli import main"}, "__init__.py:1: virtio_test imports cli"),
        ({"devices/blk.py": "from virtio_test.transport import mmio"}, "they must not know each other"),
        ({"odds.py": ""}, "odds has no place in ORDER"),
        (
            {
                "config.py": "from . import clock",
                "clock.py": "from .status import S",
                "status.py": "from . import config",
            },
            "in a circle: clock → status → config → clock",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    every_part = {str(Path(part, "__init__.py")): "" for part in RANK}
    package = plant(tmp_path / PACKAGE, every_part | files)
    found = violations(package)
    assert len(found) == 1
    assert complaint in found[0]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .carrier import loopback\nfrom .errors import UsageError",
        "carrier/loopback.py": "",
        "spec/ids.py": "import os\nfrom . import clauses\nfrom .clauses import CLAUSES",
        "spec/clauses.py": "",
        "errors.py": "import virtio_test_other",
        "config.py": "from .errors import UsageError\nfrom .spec.ids import NET",
        "features.py": "from .spec import ids\nfrom .config import Layout",
        "device.py": "from virtio_test.features import FeatureSet",
        "cli/__init__.py": "from virtio_test import __version__, device\nfrom .main import run",
        "cli/main.py": "from ..spec import ids",
    }
    assert violations(plant(tmp_path / PACKAGE, files)) == []

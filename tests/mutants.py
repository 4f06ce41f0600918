"""Mutants of the Python protocol code: each check is taken away, turned round or moved by one, and a test must fail.

A check is an `if` that raises, goes on with the next, or gives up with an early return of nothing, False or an error;
and what a predicate returns. Its mutants:

* **away**: the condition never holds; **always**: a predicate that holds whatever it is asked;
* **round**: it holds when it does not;
* **less**: one operand of an `and` or an `or` is left out;
* **edge**: `<` for `<=`, `>` for `>=`, and the other way.

All of them are compiled into the modules as they are imported, behind a question that costs next to nothing. pytest
collects once; a first run of every test notes which checks it reaches and how long it takes. For each mutant a process
is then forked, which runs the tests that reach its check, the quickest first, until one fails. Usage:
``python -m tests.mutants [module …] [--jobs N] [--list] [--tests FILE …]``; the exit status is 1 if any survives.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import importlib
import importlib.abc
import importlib.machinery
import mmap
import os
import pickle
import pkgutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import settings

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = "virtio_test"
SECONDS: Final = 400
"""One test alone."""
BUDGET: Final = 60.0
"""All tests of one mutant, by what they took without it: the quickest."""
LEFT_OUT: Final = ("spec", "cli", "checks", "strategies", "judge")
"""What is no protocol code: it checks what its own user says."""


class Mutant(NamedTuple):
    """One other condition: which check, which of its variants, and what it says."""

    check: int
    variant: int
    module: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.module.removeprefix('virtio_test.')}:{self.line} {self.kind:6} {self.text}"


MUTANTS: Final[list[Mutant]] = []
REACHED: Final = mmap.mmap(-1, 1 << 14)
"""One byte for each check, shared with whatever a test forks."""


class Active:
    """The mutant that is alive in this process."""

    check = 0
    variant = 0


def _usual(check: int) -> bool:
    """What stands before each condition: whether it is to be asked as it was written."""
    REACHED[check] = 1
    return check != Active.check


# --- what can be changed -------------------------------------------------------------------------------------------

_EDGES: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def is_check(node: ast.If) -> bool:
    """Whether the branch refuses: it ends by raising, by going on, or by a return of nothing, False or None."""
    last = node.body[-1]
    if isinstance(last, ast.Raise | ast.Continue | ast.Break):
        return True
    if not isinstance(last, ast.Return):
        return False
    return last.value is None or (isinstance(last.value, ast.Constant) and last.value.value in (None, False, b""))


def changes(test: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Every other condition that could stand there."""
    yield "away", ast.Constant(value=False)
    yield "round", ast.UnaryOp(op=ast.Not(), operand=copy.deepcopy(test))
    for number, node in enumerate(ast.walk(test)):
        if isinstance(node, ast.BoolOp):
            for operand in range(len(node.values)):
                changed, at = _copied(test, number)
                assert isinstance(at, ast.BoolOp)
                at.values[operand] = ast.Constant(value=isinstance(at.op, ast.And))
                yield "less", changed
        elif isinstance(node, ast.Compare):
            for place, operator in enumerate(node.ops):
                if type(operator) in _EDGES:
                    changed, at = _copied(test, number)
                    assert isinstance(at, ast.Compare)
                    at.ops[place] = _EDGES[type(operator)]()
                    yield "edge", changed


def _copied(test: ast.expr, number: int) -> tuple[ast.expr, ast.AST]:
    changed = copy.deepcopy(test)
    return changed, list(ast.walk(changed))[number]


class Changeable(ast.NodeTransformer):
    """Puts all variants of each check into a module, and itself into `MUTANTS`."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if is_check(node):
            node.test = self.choice(node.test, changes(node.test))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.returns, ast.Name) and node.returns.id == "bool":
            for last in ast.walk(node):
                if isinstance(last, ast.Return) and isinstance(
                    last.value, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Call
                ):
                    always: tuple[str, ast.expr] = ("always", ast.Constant(value=True))
                    last.value = self.choice(last.value, [*changes(last.value), always])
        return node

    def choice(self, test: ast.expr, others: Iterable[tuple[str, ast.expr]]) -> ast.expr:
        """A condition that is `test`, or one of the others where its mutant is active."""
        check = MUTANTS[-1].check + 1 if MUTANTS else 1
        result: ast.expr = ast.Constant(value=False)
        variants = list(others)
        for variant, (kind, changed) in enumerate(variants):
            text = f"{ast.unparse(test)}  ->  {ast.unparse(changed)}"
            MUTANTS.append(Mutant(check, variant, self.module, test.lineno, kind, text))
        for variant, (_, changed) in reversed(list(enumerate(variants))):
            chosen = ast.parse(f"__active__.variant == {variant}", mode="eval").body
            result = ast.IfExp(test=chosen, body=changed, orelse=result)
        usual = ast.parse(f"__usual__({check})", mode="eval").body
        return ast.fix_missing_locations(ast.copy_location(ast.IfExp(test=usual, body=test, orelse=result), test))


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with all its mutants; nothing is cached."""

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        if fullname != PACKAGE and fullname.split(".")[1] not in LEFT_OUT:
            tree = ast.fix_missing_locations(Changeable(fullname).visit(tree))
        return compile(tree, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules of the package as they are found without it, for our loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> Any:
        if f"{name}.".partition(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            spec.loader = Loader(name, spec.origin)
        return spec


def import_all() -> None:
    """Import the whole package, changeable."""
    sys.meta_path.insert(0, Finder())
    builtins.__usual__, builtins.__active__ = _usual, Active  # type: ignore[attr-defined]
    package = importlib.import_module(PACKAGE)
    for each in pkgutil.walk_packages(package.__path__, PACKAGE + "."):
        if not each.name.endswith("__main__"):
            importlib.import_module(each.name)


# --- running them --------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A test without any mutant: where it is, seconds, and the checks that it reached."""

    item: int
    seconds: float
    reached: bytes
    failed: bool


class Judge:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, chosen: Callable[[Mutant], bool], jobs: int, show: Callable[[str], object]) -> None:
        self.chosen, self.jobs, self.show = chosen, jobs, show
        self.failed = self.late = False
        self.survivors: list[str] = []
        self.status = 2

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed
        self.late = self.late or (report.failed and "Timeout (>" in str(report.longrepr))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # In a process of its own: threads and locks that a test leaves would go along into every mutant.
        with tempfile.NamedTemporaryFile() as file:
            os.waitpid(self.fork(lambda: self.look(session, Path(file.name))), 0)
            seen: list[Seen] = pickle.loads(file.read())
        for each in seen:
            if each.failed:
                self.show(f"fails without any mutant: {session.items[each.item].nodeid}")
        self.run(session, sorted((each for each in seen if not each.failed), key=lambda each: each.seconds))
        return True

    def fork(self, do: Callable[[], int]) -> int:
        """Do it in a process of its own, whose status it gives."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                nowhere = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(nowhere, fd)
                status = do()
            finally:
                os._exit(status)
        return pid

    @staticmethod
    def one(session: pytest.Session, item: pytest.Item, following: pytest.Item | None) -> None:
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def look(self, session: pytest.Session, path: Path) -> int:
        """Run every test once, and note what it reaches."""
        found: list[Seen] = []
        for number, item in enumerate(session.items):
            REACHED[:] = bytes(len(REACHED))
            self.failed, begin = False, time.monotonic()
            self.one(session, item, session.items[number + 1] if number + 1 < len(session.items) else None)
            found.append(Seen(number, time.monotonic() - begin, REACHED[:].rstrip(b"\0"), self.failed))
            if number % 200 == 199:
                self.show(f"{number + 1} of {len(session.items)} tests")
        path.write_bytes(pickle.dumps(found))
        return 0

    def judge(self, session: pytest.Session, mutant: Mutant, items: list[pytest.Item]) -> int:
        """0 when no test notices, 1 when one does, 3 when only time did."""
        os.setsid()
        Active.check, Active.variant = mutant.check, mutant.variant
        for item in items:
            self.one(session, item, None)
            if self.failed:
                return 3 if self.late else 1
        return 0

    def run(self, session: pytest.Session, seen: list[Seen]) -> None:
        waiting = [mutant for mutant in reversed(MUTANTS) if self.chosen(mutant)]
        total, done, begin = len(waiting), 0, time.monotonic()
        running: dict[int, Mutant] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                items, left = list[pytest.Item](), BUDGET
                for each in seen:
                    if len(each.reached) > mutant.check and each.reached[mutant.check] and left > 0:
                        items.append(session.items[each.item])
                        left -= each.seconds
                if items:
                    running[self.fork(lambda mutant=mutant, items=items: self.judge(session, mutant, items))] = mutant
                else:
                    done += 1
                    self.lives(f"NOT REACHED: {mutant}")
            if not running:
                continue
            pid, status = os.wait()
            mutant = running.pop(pid)
            done += 1
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            if code == 3:
                self.show(f"LATE: {mutant}")
            if code == 0:
                self.lives(f"SURVIVES: {mutant}")
            if done % 50 == 0:
                self.show(f"{done} of {total} after {time.monotonic() - begin:.0f} s, {len(self.survivors)} survive")
        self.show(f"{total} mutants, {len(self.survivors)} survive")
        self.status = 1 if self.survivors else 0

    def lives(self, line: str) -> None:
        self.survivors.append(line)
        self.show(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "modules", nargs="*", help="names of modules or packages, or ends of them; all when none is given"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", default="away,always,round,less,edge")
    parser.add_argument(
        "--tests", nargs="*", default=["tests"], help="files of tests that judge; all when none is given"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run none")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import_all()
    kinds, names = arguments.kinds.split(","), arguments.modules

    def chosen(mutant: Mutant) -> bool:
        module = mutant.module.removeprefix(PACKAGE + ".")
        at = any(module.startswith(name) or module.endswith(name) for name in names)
        return mutant.kind in kinds and (at or not names)

    if arguments.list:
        found = [mutant for mutant in MUTANTS if chosen(mutant)]
        print(*found, f"{len(found)} mutants", sep="\n")
        return 0
    settings.register_profile("virtio-mutants", parent=settings(), max_examples=15, deadline=None, derandomize=True)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    judge = Judge(chosen, arguments.jobs, lambda line: print(line, file=out))
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-s", f"--timeout={SECONDS}", "-W", "ignore"]
    options += ["-m", "not kernel and not peers", "--ignore=tests/benches", "--hypothesis-profile=virtio-mutants"]
    pytest.main([*options, *arguments.tests], plugins=[judge])
    return judge.status


if __name__ == "__main__":
    sys.exit(main())

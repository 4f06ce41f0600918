"""Mutants of the Python protocol code: each check is taken away, turned round or moved by one, and a test must fail.

A check is an `if` that raises, goes on with the next, or gives up with an early return of nothing, False or an error;
and what a predicate returns. Its mutants:

* **away**: the condition never holds; **always**: a predicate that holds whatever it is asked;
* **round**: it holds when it does not;
* **less**: one operand of an `and` or an `or` is left out;
* **edge**: `<` for `<=`, `>` for `>=`, and the other way.

All of them are compiled into the modules as they are imported, behind a question that costs next to nothing. pytest
collects once; a first run of every test notes which checks it reaches and how long it takes. For each mutant a process
is then forked, which runs the tests that reach its check, the quick ones and those of its module first, until one
fails. One that only time ended is run once more. What survives with a reason in `tests/mutants.txt` is shown as
equivalent. Usage: ``python -m tests.mutants [module …] [--jobs N] [--list] [--tests FILE …]``; the exit status is 1 if
any other survives.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import importlib
import importlib.abc
import importlib.machinery
import itertools
import mmap
import os
import pickle
import pkgutil
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import settings

from tests import reasons

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = "virtio_test"
SECONDS: Final = 400
"""One test alone, without a mutant."""
PATIENCE: Final = 15.0
"""One test alone with a mutant, beside twenty times what it takes without."""
SEEN: Final = ROOT / "target/mutants-python"
"""What the tests reached."""
LATE: Final = (3, -signal.SIGKILL)
"""How a process ends where only time ended a test."""
REASONS: Final = ROOT / "tests/mutants.txt"
LEFT_OUT: Final = ("spec", "cli", "checks", "strategies", "judge")
"""What is no protocol code: it checks what its own user says."""


class Mutant(NamedTuple):
    """One other condition: which check, which of its variants, where, and what it says."""

    check: int
    variant: int
    module: str
    line: int
    function: str
    kind: str
    text: str

    @property
    def name(self) -> str:
        """What it is called wherever its lines move to."""
        return f"{self.module}.{self.function} {self.kind}: {self.text}"

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.function} {self.kind}: {self.text}"


MUTANTS: Final[list[Mutant]] = []


class Active:
    """The mutant that is alive in this process, and what was reached in it."""

    check = 0
    variant = 0
    reached = mmap.mmap(-1, 1 << 14)
    """One byte for each check, shared with whatever a test forks."""


def _usual(check: int) -> bool:
    """What stands before each condition: whether it is to be asked as it was written."""
    Active.reached[check] = 1
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
    """Puts all variants of each check into a module, and their descriptions into `found`."""

    def __init__(self, module: str, found: list[Mutant]) -> None:
        self.module, self.inside, self.found = module.removeprefix(PACKAGE + "."), list[str](), found

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.within(node)
        return node

    def within(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if is_check(node):
            node.test = self.choice(node.test, changes(node.test))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.within(node)
        self.inside.append(node.name)
        if isinstance(node.returns, ast.Name) and node.returns.id == "bool":
            for last in ast.walk(node):
                if isinstance(last, ast.Return) and isinstance(
                    last.value, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Call
                ):
                    always: tuple[str, ast.expr] = ("always", ast.Constant(value=True))
                    last.value = self.choice(last.value, [*changes(last.value), always])
        self.inside.pop()
        return node

    def choice(self, test: ast.expr, others: Iterable[tuple[str, ast.expr]]) -> ast.expr:
        """A condition that is `test`, or one of the others where its mutant is active."""
        check = self.found[-1].check + 1 if self.found else 1
        result: ast.expr = ast.Constant(value=False)
        variants = list(others)
        for variant, (kind, changed) in enumerate(variants):
            text, function = f"{ast.unparse(test)} -> {ast.unparse(changed)}", ".".join(self.inside)
            self.found.append(Mutant(check, variant, self.module, test.lineno, function, kind, text))
        for variant, (_, changed) in reversed(list(enumerate(variants))):
            chosen = ast.parse(f"__active__.variant == {variant}", mode="eval").body
            result = ast.IfExp(test=chosen, body=changed, orelse=result)
        usual = ast.parse(f"__usual__({check})", mode="eval").body
        return ast.fix_missing_locations(ast.copy_location(ast.IfExp(test=usual, body=test, orelse=result), test))


def changeable(module: str, text: bytes, found: list[Mutant]) -> ast.Module:
    """A module with all its mutants, which it puts into `found`; as it was where it is no protocol code."""
    tree = ast.parse(text)
    if module != PACKAGE and module.split(".")[1] not in LEFT_OUT:
        Changeable(module, found).visit(tree)
    return tree


def everywhere() -> list[Mutant]:
    """The mutants of all modules, as their texts say, and nothing imported."""
    found = list[Mutant]()
    for path in sorted((ROOT / "python" / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / "python").with_suffix("").parts
        changeable(".".join(part for part in parts if part != "__init__"), path.read_bytes(), found)
    return found


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with all its mutants; nothing is cached."""

    def get_code(self, fullname: str) -> CodeType:
        tree = changeable(fullname, self.get_data(self.path), MUTANTS)
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
    """A test without any mutant: which, seconds, and the checks that it reached."""

    test: str
    seconds: float
    reached: bytes
    failed: bool

    def limit(self) -> float:
        """How long it may take with a mutant."""
        return PATIENCE + 20 * self.seconds


class Running(NamedTuple):
    """A mutant whose tests run, how many, and until when they may."""

    mutant: Mutant
    tests: int
    end: float


class Judge:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, mutants: Sequence[Mutant], jobs: int, budget: float, show: Callable[[str], object]) -> None:
        self.mutants, self.jobs, self.budget, self.show = mutants, jobs, budget, show
        self.reasons = reasons.read(REASONS)
        self.names = dict(zip(MUTANTS, reasons.numbered(mutant.name for mutant in MUTANTS), strict=True))
        self.failed = self.late = False
        self.survive = self.equivalent = 0
        self.ran = False
        self.items: dict[str, pytest.Item] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed
        self.late = self.late or (report.failed and "Timeout (>" in str(report.longrepr))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        seen = list(self.look(session))
        for each in seen:
            if each.failed:
                self.show(f"fails without any mutant: {each.test}")
        self.run(session, [each for each in seen if not each.failed])
        self.ran = True
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

    def look(self, session: pytest.Session) -> Iterator[Seen]:
        """Run every test once, and note what it reaches: file by file, each taken by the process that is free.

        Not in this process: threads and locks that a test leaves would go along into every mutant. What was seen of a
        file of tests is kept for as long as it and the checks are as they were.
        """
        SEEN.mkdir(parents=True, exist_ok=True)
        checks = "\n".join(mutant.name for mutant in MUTANTS).encode()
        files = dict[Path, list[pytest.Item]]()
        for path, group in itertools.groupby(session.items, lambda item: item.path):
            items = list(group)
            text = "\n".join(item.nodeid for item in items).encode()
            files[SEEN / sha256(checks + path.read_bytes() + text).hexdigest()] = items
        left, right = os.pipe()
        unseen = [(path, items) for path, items in files.items() if not path.exists()]
        os.write(right, b"".join(number.to_bytes(2) for number in range(len(unseen))))
        os.close(right)
        for pid in [self.fork(partial(self.note, session, unseen, left)) for _ in range(self.jobs)]:
            os.waitpid(pid, 0)
        os.close(left)
        for path in files:
            found: list[Seen] = pickle.loads(path.read_bytes())
            yield from found
            if any(each.failed for each in found):
                path.unlink()

    def note(self, session: pytest.Session, files: list[tuple[Path, list[pytest.Item]]], left: int) -> int:
        Active.reached = mmap.mmap(-1, len(Active.reached))
        while number := os.read(left, 2):
            path, items = files[int.from_bytes(number)]
            found: list[Seen] = []
            for item, following in itertools.zip_longest(items, items[1:]):
                Active.reached[:] = bytes(len(Active.reached))
                self.failed, begin = False, time.monotonic()
                self.one(session, item, following)
                reached = Active.reached[:].rstrip(b"\0")
                found.append(Seen(item.nodeid, time.monotonic() - begin, reached, self.failed))
            path.with_suffix(".part").write_bytes(pickle.dumps(found))
            path.with_suffix(".part").rename(path)
            self.show(f"looked at {items[0].path.name}")
        return 0

    def tests(self, seen: list[Seen], mutant: Mutant) -> list[Seen]:
        """Those that reach it, as many as the budget allows."""

        def price(each: Seen) -> float:
            words = set(re.split(r"\W|_", self.items[each.test].path.stem))
            return each.seconds / (1 + 4 * len(words & set(re.split(r"\W|_", mutant.module))))

        found, left = list[Seen](), self.budget
        there = (each for each in seen if len(each.reached) > mutant.check and each.reached[mutant.check])
        for each in sorted(there, key=price):
            if left > 0:
                found.append(each)
                left -= each.seconds
        return found

    def judge(self, session: pytest.Session, mutant: Mutant, tests: list[Seen]) -> int:
        """0 when no test notices, 1 when one does, and late when only time did."""
        os.setsid()
        Active.check, Active.variant = mutant.check, mutant.variant
        for each in tests:
            item = self.items[each.test]
            item.add_marker(pytest.mark.timeout(each.limit()), append=False)
            self.one(session, item, None)
            if self.failed:
                return LATE[0] if self.late else 1
        return 0

    def run(self, session: pytest.Session, seen: list[Seen]) -> None:
        waiting, running, late = deque(self.mutants), dict[int, Running](), set[Mutant]()
        done, begin = 0, time.monotonic()
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.popleft()
                tests = self.tests(seen, mutant)
                pid = self.fork(partial(self.judge, session, mutant, tests))
                end = time.monotonic() + 8 * PATIENCE + 5 * sum(each.seconds for each in tests)
                running[pid] = Running(mutant, len(tests), end)
            ended = [(pid, code) for pid, each in running.items() if (code := _status(pid, each.end)) is not None]
            if not ended:
                time.sleep(0.005)
            for pid, code in ended:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                mutant, tests, _ = running.pop(pid)
                if code in LATE and mutant not in late:
                    late.add(mutant)
                    waiting.append(mutant)
                    continue
                done += 1
                self.say(mutant, tests, code)
                if done % 50 == 0:
                    self.show(f"{done} of {len(self.mutants)} after {time.monotonic() - begin:.0f} s")

    def say(self, mutant: Mutant, tests: int, code: int) -> None:
        """What is worth a line of a mutant that was judged."""
        reason = self.reasons.get(self.names[mutant])
        if code != 0 and reason:
            self.show(f"noticed, though it has a reason: {mutant}")
        elif code in LATE:
            self.show(f"ended by time alone: {mutant}")
        elif code == 0 and reason:
            self.equivalent += 1
            self.show(f"equivalent: {mutant}: {reason}")
        elif code == 0:
            self.survive += 1
            self.show(f"{f'SURVIVES {tests} tests' if tests else 'NOT REACHED'}: {mutant}")

    def end(self) -> int:
        """The last line, and the exit status."""
        for name in (stale := reasons.stale(self.reasons, (mutant.name for mutant in MUTANTS))):
            self.show(f"no such mutant, though it has a reason: {name}")
        self.show(f"{len(self.mutants)} mutants, {self.survive} survive, {self.equivalent} are equivalent")
        return 1 if self.survive or stale else 0


def _status(pid: int, end: float) -> int | None:
    """How a process ended, if it has; at its end in time it is killed."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done == 0 and time.monotonic() > end:
        os.kill(pid, signal.SIGKILL)
        done, status = os.waitpid(pid, 0)
    return None if done == 0 else os.waitstatus_to_exitcode(status)


def _is_of(mutant: Mutant, name: str) -> bool:
    return mutant.module.startswith(name) or mutant.module.endswith(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "modules", nargs="*", help="names of modules or packages, or ends of them; all when none is given"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="all tests of a mutant, as long as they took without",
    )
    parser.add_argument("--kinds", default="away,always,round,less,edge")
    parser.add_argument(
        "--tests", nargs="*", default=["tests"], help="files of tests that judge; all when none is given"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run none")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import_all()
    kinds, names = arguments.kinds.split(","), arguments.modules or [""]
    mutants = [mutant for name in names for mutant in MUTANTS if mutant.kind in kinds and _is_of(mutant, name)]
    mutants = list(dict.fromkeys(mutants))
    if arguments.list:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0
    settings.register_profile("virtio-mutants", parent=settings(), max_examples=15, deadline=None, derandomize=True)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    judge = Judge(mutants, arguments.jobs, arguments.budget, lambda line: print(line, file=out))
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-s", f"--timeout={SECONDS}", "-W", "ignore"]
    options += ["-m", "not kernel and not peers", "--ignore=tests/benches", "--hypothesis-profile=virtio-mutants"]
    pytest.main([*options, *arguments.tests], plugins=[judge])
    return judge.end() if judge.ran else 2


if __name__ == "__main__":
    sys.exit(main())

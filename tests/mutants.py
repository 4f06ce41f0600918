"""Mutants of the Python protocol code: each check is taken away, turned round or moved by one, and a test must fail.

A check is an `if` that raises, or gives up with an early return of nothing, False or an error. Its mutants:

* **away**: the condition never holds;
* **round**: it holds when it does not;
* **less**: one operand of an `and` or an `or` is left out;
* **edge**: `<` for `<=`, `>` for `>=`, and the other way.

One process imports everything once and forks for each mutant; the child exchanges the code of the mutated function and
runs the tests that belong to the module, the quickest first, until one fails. A run that takes too long counts as one
that fails. Usage: ``python -m tests.mutants [module …] [--jobs N] [--list]``; the exit status is 1 if any survives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple, cast

import pytest
from hypothesis import settings

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "python"
UNIT, HOSTILE = "tests/unit/test_", "tests/hostile/test_"
SECONDS: Final = 300

_VHOST: Final = [
    *(UNIT + f"vhost_user_{name}.py" for name in ("codec", "hostile")),
    HOSTILE + "cve_protocol.py",
    *(UNIT + f"vhost_user_{name}.py" for name in ("backend", "misuse", "messages", "iotlb", "log")),
]
_VFIO: Final = [UNIT + f"vfio_user_{name}.py" for name in ("codec", "session", "hostile", "irqs", "remote")]

TESTS: Final[dict[str, list[str]]] = {
    "virtio_test.sockets.frames": [*_VHOST[:2], *_VFIO[:1]],
    "virtio_test.sockets.endpoint": [UNIT + "sockets_endpoint.py", HOSTILE + "server.py"],
    "virtio_test.sockets.server": [*_VHOST[1:2], HOSTILE + "server.py"],
    "virtio_test.transport.vhost_user.codec": _VHOST,
    "virtio_test.transport.vhost_user.payloads": _VHOST,
    "virtio_test.transport.vhost_user.memory": [_VHOST[1], *_VHOST[2:4]],
    "virtio_test.transport.vhost_user.session": [*_VHOST[1:5], *_VHOST[6:], "tests/property/test_message_programs.py"],
    "virtio_test.transport.vhost_user.rings": [*_VHOST[1:5], *_VHOST[6:], UNIT + "vhost_user_registers.py"],
    "virtio_test.carrier.vfio_user.codec": _VFIO,
    "virtio_test.carrier.vfio_user.payloads": _VFIO,
    "virtio_test.carrier.vfio_user.capabilities": _VFIO,
    "virtio_test.carrier.vfio_user.dma": _VFIO[1:],
    "virtio_test.carrier.vfio_user.irqs": [_VFIO[3], *_VFIO[1:3]],
    "virtio_test.carrier.vfio_user.session": _VFIO[1:],
    "virtio_test.carrier.uml": [UNIT + "uml_pci.py", HOSTILE + "bounded.py"],
}
"""Module to the tests that hold it."""


class Mutant(NamedTuple):
    """One changed module: which, where, what, and its new tree."""

    module: str
    line: int
    kind: str
    text: str
    tree: ast.Module
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.module.removeprefix('virtio_test.')}:{self.line} {self.kind:5} {self.text}"


# --- what can be changed -------------------------------------------------------------------------------------------


def is_check(node: ast.If) -> bool:
    """Whether the branch refuses: it ends by raising, or by a return of nothing, False, None or a refusal."""
    last = node.body[-1]
    if isinstance(last, ast.Raise):
        return True
    if not isinstance(last, ast.Return):
        return False
    return last.value is None or (isinstance(last.value, ast.Constant) and last.value.value in (None, False, b""))


_EDGES: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def changes(test: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Every other condition that could stand there."""
    yield "away", ast.Constant(value=False)
    yield "round", ast.UnaryOp(op=ast.Not(), operand=copy.deepcopy(test))
    for number, node in enumerate(ast.walk(test)):
        if isinstance(node, ast.BoolOp):
            for operand in range(len(node.values)):
                changed, at = _copied(test, number)
                assert isinstance(at, ast.BoolOp)
                del at.values[operand]
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


def mutants(module: str) -> Iterator[Mutant]:
    """All mutants of one module."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = [number for number, node in enumerate(ast.walk(tree)) if isinstance(node, ast.If) and is_check(node)]
    for number in checks:
        original = list(ast.walk(tree))[number]
        assert isinstance(original, ast.If)
        for kind, test in changes(original.test):
            mutated = copy.deepcopy(tree)
            node = list(ast.walk(mutated))[number]
            assert isinstance(node, ast.If)
            node.test = test
            ast.fix_missing_locations(mutated)
            text = f"{ast.unparse(original.test)}  ->  {ast.unparse(test)}"
            yield Mutant(module, original.lineno, kind, text, mutated, rule_of(original))


def rule_of(check: ast.If) -> str:
    """The rule that the check names, if it does."""
    names = (node.value for node in ast.walk(check.body[-1]) if isinstance(node, ast.Constant))
    return next((name for name in names if isinstance(name, str) and name.isalpha() and name[0].isupper()), "")


# --- putting it in place -------------------------------------------------------------------------------------------


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Every function of a module, in its classes too, behind whatever decorates it."""
    seen: set[int] = set()

    def found(value: Any) -> Iterator[FunctionType]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if value.__module__ == module.__name__:
                yield value
            yield from found(getattr(value, "__wrapped__", None))
        elif isinstance(value, (staticmethod, classmethod)):
            yield from found(cast("Any", value).__func__)
        elif isinstance(value, property):
            for each in (value.fget, value.fset):
                yield from found(each)
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for each in list(vars(value).values()):
                yield from found(each)

    for value in list(vars(module).values()):
        yield from found(value)


def codes(code: CodeType) -> Iterator[CodeType]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from codes(each)


def put_in_place(mutant: Mutant) -> bool:
    """Exchange the code of the functions that the mutant changes; whether there was one."""
    module = importlib.import_module(mutant.module)
    new = {each.co_qualname: each for each in codes(compile(mutant.tree, module.__file__ or "", "exec"))}
    changed = False
    for function in functions(module):
        code = new.get(function.__code__.co_qualname)
        if code is not None and code != function.__code__ and code.co_freevars == function.__code__.co_freevars:
            function.__code__ = code
            changed = True
    return changed


# --- running it ----------------------------------------------------------------------------------------------------


def child(mutant: Mutant) -> int:
    """In a process of its own: 0 when no test notices, 1 when one does, 2 when nothing could be changed."""
    os.setsid()
    signal.alarm(SECONDS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    if mutant.kind == "none":
        signal.alarm(0)
    elif not put_in_place(mutant):
        return 2
    paths = [str(ROOT / path) for path in TESTS.get(mutant.module, [mutant.text])]
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "--hypothesis-profile=virtio-mutants"]
    # The cases of its rule come first, then the other plain tests, then the generated ones and those that take long.
    naming = [path for path in paths if mutant.rule and mutant.rule in Path(path).read_text(encoding="utf-8")]
    plain = ["-m", "not hypothesis and not deep"]
    for chosen, which in (
        (naming, [*plain, "-k", mutant.rule]),
        (paths, [*plain, "-k", "not thousand"]),
        (paths, ["-m", "not deep"]),
    ):
        if chosen and pytest.main([*options, *which, *chosen]) not in (0, 5):
            return 1
    return 0


def start(mutant: Mutant) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child(mutant)
        finally:
            os._exit(status)
    return pid


def run(all_of_them: list[Mutant], jobs: int, show: Callable[[str], object]) -> list[Mutant]:
    """Run them; those that survive."""
    waiting, running = list(reversed(all_of_them)), dict[int, Mutant]()
    survivors: list[Mutant] = []
    begin, done = time.monotonic(), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(mutant)] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        done += 1
        # Whatever of its processes is left.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        if code in (0, 2):
            survivors.append(mutant)
            show(f"{'SURVIVES' if code == 0 else 'NOT CHANGED'}: {mutant}")
        if done % 20 == 0:
            show(f"{done} of {len(all_of_them)} after {time.monotonic() - begin:.0f} s, {len(survivors)} survive")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", help="names of modules, or ends of them; all when none is given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", default="away,round,less,edge")
    parser.add_argument("--no-check", dest="check", action="store_false", help="take it that the tests pass")
    parser.add_argument("--list", action="store_true", help="show the mutants and run none")
    arguments = parser.parse_args()
    chosen = [name for name in TESTS if not arguments.modules or any(name.endswith(end) for end in arguments.modules)]
    kinds = arguments.kinds.split(",")
    found = [mutant for module in chosen for mutant in mutants(module) if mutant.kind in kinds]
    if arguments.list:
        for mutant in found:
            print(mutant)
        print(f"{len(found)} mutants of {len(chosen)} modules")
        return 0
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    settings.register_profile("virtio-mutants", parent=settings(), max_examples=15, deadline=None)
    for module in chosen:
        importlib.import_module(module)
    # What the tests import is there before the first fork.
    for path in sorted({path for module in chosen for path in TESTS[module]}):
        importlib.import_module(path.removesuffix(".py").replace("/", "."))
    # First none at all: tests that fail without a mutant would kill every one.
    for path in sorted({path for module in chosen for path in TESTS[module]}) if arguments.check else ():
        if os.waitstatus_to_exitcode(os.waitpid(start(Mutant("", 0, "none", path, ast.Module([], []))), 0)[1]):
            print(f"{path} fails without any mutant")
            return 2
    survivors = run(found, arguments.jobs, lambda line: print(line, flush=True))
    print(f"{len(found)} mutants of {len(chosen)} modules, {len(survivors)} survive")
    for mutant in survivors:
        print(f"  {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
